// qwen::QuantLinear with AMX tiles, for int8 and int8x2 and the groups that quant_linear_blocks_amx.cc does not take.
//
// A tile of activations is 8 or 12 rows, those that are missing zero; with columns = min(group_size, 64):
//   [in_features / columns][planes][rows][columns] bytes, [groups][rows] float32 scales,
//   [groups][rows] factors of the zero points (only if asymmetric with 8 bits)
// Weights are unpacked, a chunk of columns of a panel at a time, into bytes with a sign: q - zero point below 8 bits,
// q - 128 with 8. A tile product leaves sums of the rows and 16 outputs over one group in memory, from where vectors
// take them into y, which stays in registers for a chunk.
#include "linear/quant_linear_amx.h"

namespace quant_linear {
namespace {

constexpr int kFewRows = 8, kManyRows = 12;  // of a tile: y of more would not leave registers for anything else
constexpr int kMaxColumns = 64;              // of a tile of activations
constexpr int kChunkColumns = 512;           // a chunk of a panel, 16 KiB unpacked, stays in the first-level cache

// ---- Preparing

bool HasCorrection(const Problem& p) { return p.bits == 8 && !p.symmetric; }

int64_t TileRows(const Problem& p) {
  const bool as_few_tiles = CeilDiv(p.rows, kFewRows) == CeilDiv(p.rows, kManyRows);
  return as_few_tiles ? kFewRows : kManyRows;
}

int64_t ValueBytes(const Problem& p) { return CeilDiv(p.groups * p.group_size * TileRows(p) * Planes(p), 64) * 64; }

int64_t TileBytesAmx(const Problem& p) {
  const int64_t factors = p.groups * TileRows(p) * int64_t(sizeof(float)) * (HasCorrection(p) ? 2 : 1);
  return ValueBytes(p) + CeilDiv(factors, 64) * 64;
}

template <int kPlanes>
void PrepareRowAmx(const Problem& p, int64_t of_product, int64_t row, char* tile) {
  const int64_t rows = TileRows(p), columns = p.group_size < kMaxColumns ? p.group_size : kMaxColumns;
  float* const scales = reinterpret_cast<float*>(tile + ValueBytes(p)) + row;
  int32_t* const factors = reinterpret_cast<int32_t*>(scales + p.groups * rows);
  RowQuantizer<Lanes, kPlanes> quantizer(p, of_product);
  int8_t* values = reinterpret_cast<int8_t*>(tile) + row * columns;
  for (int64_t g = 0; g < p.groups; ++g, values += p.group_size * kPlanes * rows) {
    const QuantizedGroup group = quantizer.Quantize(g, [&](int plane, int64_t k) {
      const int64_t part = k >= columns;  // of at most two
      return values + (part * kPlanes + plane) * rows * columns + k - part * columns;
    });
    scales[g * rows] = group.scale;
    if (HasCorrection(p)) {
      const uint32_t low = uint32_t(group.sums[kPlanes - 1]), high = kPlanes == 1 ? 0 : uint32_t(group.sums[0]);
      factors[g * rows] = int32_t(((0 - low) & 0xffff) | (0 - high) << 16);
    }
  }
}

void PrepareAmx(const Problem& p, int64_t tiles, Range range, char* activations) {
  for (int64_t t = range.first; t < range.last; ++t) {
    const int64_t begin = RowBegin(p, tiles, t), rows = RowBegin(p, tiles, t + 1) - begin;
    char* const tile = activations + t * TileBytesAmx(p);
    if (rows < TileRows(p)) std::memset(tile, 0, size_t(TileBytesAmx(p)));
    for (int64_t r = 0; r < rows; ++r) (Planes(p) == 1 ? PrepareRowAmx<1> : PrepareRowAmx<2>)(p, begin + r, r, tile);
  }
}

// ---- Multiplying

// What a group's sums are multiplied with; each half is 16 outputs.
struct GroupFactors {
  __m512 units[kHalves], offsets[kHalves];  // scales, and what turns a sum at kFloatStart into one at 0
  __m512i zero_points[kHalves];             // less 128, times (1, 256), where the tile product leaves them out
};

struct Chunk {
  alignas(64) int8_t weights[kChunkColumns * kPanel];  // (groups, 2 halves, group_size / 4, 16 outputs, 4 columns)
  GroupFactors factors[kChunkColumns / 32];
};

// Groups [first, first + count) of a panel.
template <int kBits>
void Unpack(const Problem& p, const uint8_t* panel, int64_t first, int64_t count, Chunk& chunk) {
  int8_t* out = chunk.weights;
  const int64_t half = p.group_size * kLanes;
  for (int64_t g = 0; g < count; ++g, out += 2 * half) {
    const uint8_t* const block = BlockOf(p, panel, first + g);  // of one group
    const uint8_t* const zero_bytes = ZeroPointsOf(p, panel, first + g);
    GroupFactors& factors = chunk.factors[g];
    __m512i zero_points[kHalves];
    zero_points[0] = zero_points[1] = _mm512_set1_epi8(1 << (kBits < 8 ? kBits - 1 : 0));
    if (kBits == 4 && !p.symmetric) SplitNibbles(FourTimes(zero_bytes), zero_points);
    for (int h = 0; h < kHalves; ++h) {
      factors.units[h] = Lanes::Mul(Lanes::LoadHalves(block + 32 * h), Lanes::Set(kScaleUnit));
      factors.offsets[h] = Lanes::Mul(factors.units[h], Lanes::Set(-kFloatStartValue));  // exact
      const uint8_t* const bytes = zero_bytes + 16 * h;
      if ((kBits == 5 || kBits == 6) && !p.symmetric) zero_points[h] = FourTimes(bytes);
      if (HasCorrection(p)) {
        const __m512i less = _mm512_sub_epi32(
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))), _mm512_set1_epi32(128));
        factors.zero_points[h] = _mm512_mask_mov_epi16(_mm512_slli_epi32(less, 24), 0x55555555, less);
      }
    }
    const uint8_t* const steps = StepsOf(p, block, 0);
    __m512i lines[UnitLines(kBits)];
    for (int64_t j = 0; j < p.group_size / 4; ++j) {
      __m512i q[kHalves];
      if constexpr (kBits < 8) LoadStep<kBits>(steps, j, lines, q);
      for (int h = 0; h < kHalves; ++h) {
        if constexpr (kBits == 8) {
          q[h] = _mm512_xor_si512(_mm512_loadu_si512(steps + 128 * j + 64 * h), _mm512_set1_epi8(-128));
        } else {
          q[h] = _mm512_sub_epi8(q[h], zero_points[h]);
        }
        _mm512_store_si512(out + half * h + 64 * j, q[h]);
      }
    }
  }
}

// The product of tiles of activations and a chunk, group by group. While tile registers multiply a group, vectors add
// the sums of an earlier one to y; in between these are left in tile registers, as a store right after the product
// would wait for it, and then in memory. So the groups of all tiles are one sequence, in which each tile has an even
// number: one that is missing is multiplied, as its neighbour, and not added.
template <int kRows, int kGroup, int kPlanes, bool kCorrection>
struct Product {
  static constexpr int kColumns = kGroup < kMaxColumns ? kGroup : kMaxColumns, kTileBytes = kRows * kColumns;
  static constexpr int kSets = kPlanes == 1 ? 2 : 1;  // of registers for sums, which groups use in turn

  using GroupSums = int32_t[kHalves][kPlanes][kRows][kLanes];
  using Totals = __m512[kRows][kHalves];

  const Chunk& chunk;
  const int64_t groups, tile_bytes;
  const char* const last_tile;  // of activations
  GroupSums* const sums;        // two, which groups use in turn

  // What is multiplied next, and the weights wanted after this chunk: each step fetches some lines of them, as too many
  // at once would make the loads behind them wait.
  struct Cursor {
    const char* tile;
    int64_t group;
    const uint8_t *fetch, *fetch_last;
    int64_t step_bytes;
  };

  template <int kSet, int kHalf>
  static INLINE void Store(GroupSums& to) {
    constexpr int kSum = kSums + (kSet * kHalves + kHalf) * kPlanes;
    StoreTile<kSum>(to[kHalf][0]);
    if constexpr (kPlanes == 2) StoreTile<kSum + 1>(to[kHalf][1]);
  }

  // A tile of columns. Its activations are still in their registers for the second half, unless they are four tiles.
  template <int kSum, int kHalf, int kTile>
  static INLINE void AddProducts(const char* values, const int8_t* weights) {
    constexpr bool kLoad = kHalf == 0 || kPlanes * kGroup > 2 * kMaxColumns;
    constexpr int kA = kActivations + (kPlanes == 1 ? kTile : 0), kW = kWeights + (kHalf + kTile) % 2;
    if constexpr (kLoad) LoadTile<kA, kColumns>(values + kTile * kPlanes * kTileBytes);
    LoadTile<kW, 4 * kLanes>(weights + kTile * kColumns * kLanes);
    AddProduct<kSum, kA, kW>();
    if constexpr (kPlanes == 2) {
      if constexpr (kLoad) LoadTile<kA + 1, kColumns>(values + (kTile * kPlanes + 1) * kTileBytes);
      AddProduct<kSum + 1, kA + 1, kW>();
    }
  }

  template <int kSet, int kHalf>
  INLINE void Multiply(const Cursor& at) const {
    constexpr int kSum = kSums + (kSet * kHalves + kHalf) * kPlanes;
    ZeroTile<kSum>();
    if constexpr (kPlanes == 2) ZeroTile<kSum + 1>();
    const char* const values = at.tile + at.group * kGroup * kRows * kPlanes;
    const int8_t* const weights = chunk.weights + (at.group * kHalves + kHalf) * kGroup * kLanes;
    AddProducts<kSum, kHalf, 0>(values, weights);
    if constexpr (kGroup > kColumns) AddProducts<kSum, kHalf, 1>(values, weights);
  }

  // To the group after an even or an odd one; after the last of the last tile to one that is not needed.
  template <int kParity>
  INLINE void Advance(Cursor& at) const {
    ++at.group;
    if (at.group < groups) return;
    if (kParity == 0) {
      --at.group;
    } else {
      at.group = 0;
      if (at.tile != last_tile) at.tile += tile_bytes;
    }
  }

  // Rows [kFirst, kLast) of a group.
  template <int kFirst, int kLast>
  static INLINE void Add(const GroupSums& from, const GroupFactors& factors, const float* scales,
                         const int32_t* row_factors, Totals& y) {
    UNROLL_FOR(i, kLast - kFirst) UNROLL_FOR(h, kHalves) {
      const int r = kFirst + i;
      __m512i dot = _mm512_load_si512(from[h][0][r]);
      if constexpr (kPlanes == 1) {
        dot = _mm512_add_epi32(dot, _mm512_set1_epi32(kFloatStart));
      } else {
        dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 8), _mm512_load_si512(from[h][1][r]));
      }
      if constexpr (kCorrection)
        dot = _mm512_dpwssd_epi32(dot, factors.zero_points[h], _mm512_set1_epi32(row_factors[r]));
      const __m512 product = kPlanes == 1
                                 ? _mm512_fmadd_ps(_mm512_castsi512_ps(dot), factors.units[h], factors.offsets[h])
                                 : _mm512_mul_ps(_mm512_cvtepi32_ps(dot), factors.units[h]);
      y[r][h] = _mm512_fmadd_ps(product, _mm512_set1_ps(scales[r]), y[r][h]);
    }
  }

  // The products before the first step.
  INLINE void Start(Cursor& at) const {
    Multiply<0, 0>(at);
    Multiply<0, 1>(at);
    Advance<0>(at);
    if constexpr (kSets == 2) {
      Multiply<1, 0>(at);
      Multiply<1, 1>(at);
      Advance<1>(at);
    }
    Store<0, 0>(sums[0]);
    Store<0, 1>(sums[0]);
    Multiply<0, 0>(at);
    Multiply<0, 1>(at);
    Advance<kSets % 2>(at);
  }

  // Adds group g of a tile, stores the sums of the one after it, and multiplies the one that takes their registers.
  template <int kParity>
  INLINE void Step(Cursor& at, int64_t g, const float* scales, const int32_t* row_factors, Totals& y) const {
    constexpr int kSet = kSets == 2 ? 1 - kParity : 0;
    const bool add = kParity == 0 || g < groups;
    const float* const group_scales = scales + g * kRows;
    const int32_t* const group_factors = row_factors + g * kRows;
    Store<kSet, 0>(sums[1 - kParity]);
    Multiply<kSet, 0>(at);
    if (add) Add<0, kRows / 2>(sums[kParity], chunk.factors[g], group_scales, group_factors, y);
    Store<kSet, 1>(sums[1 - kParity]);
    Multiply<kSet, 1>(at);
    if (add) Add<kRows / 2, kRows>(sums[kParity], chunk.factors[g], group_scales, group_factors, y);
    Advance<(kParity + kSets + 1) % 2>(at);
    const uint8_t* const fetch_last = at.fetch + at.step_bytes;
    for (; at.fetch < fetch_last && at.fetch < at.fetch_last; at.fetch += 64) __builtin_prefetch(at.fetch, 0, 2);
  }

  // Adds all groups of a tile to `total`, which starts at 0 if these are the first ones.
  INLINE void AddTile(Cursor& at, const float* scales, const int32_t* row_factors, bool first,
                      float (*total)[kPanel]) const {
    Totals y;
    UNROLL_FOR(r, kRows) UNROLL_FOR(h, kHalves) {
      y[r][h] = first ? _mm512_setzero_ps() : _mm512_load_ps(total[r] + h * kLanes);
    }
    for (int64_t g = 0; g < groups; g += 2) {
      Step<0>(at, g, scales, row_factors, y);
      Step<1>(at, g + 1, scales, row_factors, y);
    }
    UNROLL_FOR(r, kRows) UNROLL_FOR(h, kHalves) _mm512_store_ps(total[r] + h * kLanes, y[r][h]);
  }
};

// Adds groups [first, first + count) of a panel, which `chunk` holds, to the totals of tiles. Meanwhile it fetches the
// weights at `fetch`.
template <int kRows, int kGroup, int kPlanes, bool kCorrection>
void MultiplyChunk(const Problem& p, const Chunk& chunk, int64_t first, int64_t count, Range of_tiles,
                   const uint8_t* fetch, const char* activations, float (*totals)[kPanel]) {
  using P = Product<kRows, kGroup, kPlanes, kCorrection>;
  const int64_t row = first * kRows, tile_bytes = TileBytesAmx(p), value_bytes = ValueBytes(p);
  const char* tile = activations + of_tiles.first * tile_bytes;
  const char* const values = tile + row * kGroup * kPlanes;
  alignas(64) typename P::GroupSums sums[2];
  const P product = {chunk, count, tile_bytes, values + (of_tiles.last - of_tiles.first - 1) * tile_bytes, sums};
  const int64_t fetch_bytes = p.prefix_bytes + kChunkColumns / kGroup * p.block_bytes,
                steps = (of_tiles.last - of_tiles.first) * count;
  typename P::Cursor at = {values, 0, fetch, fetch + fetch_bytes, CeilDiv(fetch_bytes, steps * 64) * 64};
  product.Start(at);
  for (int64_t t = of_tiles.first; t < of_tiles.last; ++t, tile += tile_bytes, totals += kRows) {
    const float* const scales = reinterpret_cast<const float*>(tile + value_bytes);
    const int32_t* const row_factors = reinterpret_cast<const int32_t*>(scales + p.groups * kRows);
    product.AddTile(at, scales + row, row_factors + row, first == 0, totals);
  }
}

using ChunkMultiplier = decltype(&MultiplyChunk<8, 32, 1, false>);

template <int kRows, int kGroup>
ChunkMultiplier ChoosePrecision(const Problem& p) {
  if (Planes(p) == 1)
    return HasCorrection(p) ? MultiplyChunk<kRows, kGroup, 1, true> : MultiplyChunk<kRows, kGroup, 1, false>;
  return HasCorrection(p) ? MultiplyChunk<kRows, kGroup, 2, true> : MultiplyChunk<kRows, kGroup, 2, false>;
}

template <int kRows>
ChunkMultiplier ChooseGroup(const Problem& p) {
  if (p.group_size == 32) return ChoosePrecision<kRows, 32>(p);
  if (p.group_size == 64) return ChoosePrecision<kRows, 64>(p);
  return Planes(p) == 1 ? MultiplyChunk<kRows, 128, 1, true> : MultiplyChunk<kRows, 128, 2, true>;  // others are blocks
}

int64_t ChunkGroups(const Problem& p) { return kChunkColumns / p.group_size; }

Share ShareOf(const Problem& p) { return ShareOf(p, TileRows(p), TileBytesAmx(p), ChunkGroups(p)); }

void MultiplyAmx(const Problem& p, int64_t tiles, Range of_tiles, Range of_panels, const char* activations) {
  const int64_t rows = TileRows(p);
  const auto unpack = p.bits == 4 ? Unpack<4> : p.bits == 5 ? Unpack<5> : p.bits == 6 ? Unpack<6> : Unpack<8>;
  const ChunkMultiplier multiply = rows == kFewRows ? ChooseGroup<kFewRows>(p) : ChooseGroup<kManyRows>(p);
  ConfigureTiles(int(rows), int(p.group_size < kMaxColumns ? p.group_size : kMaxColumns));
  TakeTurns(p, tiles, of_tiles, of_panels, rows, TileBytesAmx(p), ChunkGroups(p),
            [&](int64_t panel, int64_t first, int64_t count, const uint8_t* next, float (*totals)[kPanel]) {
              Chunk chunk;
              unpack(p, PanelOf(p, panel), first, count, chunk);
              multiply(p, chunk, first, count, of_tiles, next, activations, totals);
            });
  asm volatile("tilerelease");
  _mm_sfence();  // other threads shall see what was streamed
}

}  // namespace

const Kernels kAmxKernels = {TileRows, TileBytesAmx, PrepareAmx, ShareOf, QuantizeRows<Lanes>, MultiplyAmx};

}  // namespace quant_linear
