// qwen::QuantLinear with AMX tiles, where blocks of 128 columns share a scale of the activations, or are groups
// themselves, unless these have zero points of 8 bits.
//
// A block's weights are whole numbers of units that fit a byte with a sign. So tiles add up the products of a block,
// and vectors see its sums once, where the groups of quant_linear_amx.cc take up to four turns.
//
// A tile of activations is 16 rows, those that are missing zero, as are columns beyond the last group:
//   [blocks][2][planes][rows][64 columns] bytes, [blocks][rows] float32 scales
// with one plane (int8) or the high and the low parts (int8x2).
// Weights are unpacked, a few blocks of a panel at a time. y lies in totals, in the first- or second-level cache.
#include "linear/quant_linear_amx.h"

namespace quant_linear {
namespace {

constexpr int kRows = 16;        // of a tile; a single one may have half of them
constexpr int kColumns = 64;     // of a tile
constexpr int kParts = 2;        // tiles of columns of a block
constexpr int kChunkBlocks = 2;  // that are unpacked, 8 KiB
constexpr int kTileSize = kRows * kColumns;

int64_t ValueBytes(const Problem& p) { return p.blocks * kParts * Planes(p) * kTileSize; }

int64_t TileRows(const Problem&) { return kRows; }
int64_t TileBytes(const Problem& p) { return ValueBytes(p) + p.blocks * kRows * int64_t(sizeof(float)); }

// ---- Preparing

template <int kPlanes>
void PrepareRow(const Problem& p, int64_t of_product, int64_t row, char* tile) {
  float* const scales = reinterpret_cast<float*>(tile + ValueBytes(p)) + row;
  RowQuantizer<Lanes, kPlanes> quantizer(p, of_product);
  for (int64_t g = 0; g < p.groups; ++g) {
    const auto place = [&](int plane, int64_t i) {
      const int64_t column = g * p.group_size + i;
      char* const values = tile + (column / kColumns * kPlanes + plane) * kTileSize;
      return reinterpret_cast<int8_t*>(values + row * kColumns + column % kColumns);
    };
    scales[g / p.block_groups * kRows] = quantizer.Quantize(g, place).scale;
  }
}

void Prepare(const Problem& p, int64_t tiles, Range range, char* activations) {
  for (int64_t t = range.first; t < range.last; ++t) {
    const int64_t begin = RowBegin(p, tiles, t), rows = RowBegin(p, tiles, t + 1) - begin;
    char* const tile = activations + t * TileBytes(p);
    if (rows < kRows || p.groups * p.group_size % kColumns != 0) std::memset(tile, 0, size_t(TileBytes(p)));
    for (int64_t r = 0; r < rows; ++r) (Planes(p) == 1 ? PrepareRow<1> : PrepareRow<2>)(p, begin + r, r, tile);
  }
}

// ---- Multiplying

struct Block {
  alignas(64) int8_t weights[kHalves][kParts][kTileSize];  // tiles (columns / 4, 16 outputs, 4 columns)
  __m512 units[kHalves];
  int parts;  // that have columns
};

// Bytes times the word in both words of their lane, none of the products above 255.
INLINE __m512i Times(__m512i bytes, __m512i words) { return _mm512_mullo_epi16(bytes, words); }

// What weights are before they are unpacked: their bits, and whether their groups have multiples as scales.
template <int kBits_, bool kMultiples_>
struct Form {
  static constexpr int kBits = kBits_;
  static constexpr bool kMultiples = kMultiples_;
};

// Unpacks a block of a panel; calls read() for every four of its lines.
template <class F, class Function>
inline void Unpack(const Problem& p, const uint8_t* panel, int64_t block, Block& out, const Function& read) {
  constexpr int kBits = F::kBits;
  const int64_t first = block * p.block_groups;
  const int64_t groups = p.groups - first < p.block_groups ? p.groups - first : p.block_groups;
  const uint8_t* const stored = BlockOf(p, panel, block);
  const __m512i less_1 = _mm512_set1_epi16((256 >> kBits) - 1), one = _mm512_set1_epi16(1);
  for (int64_t i = 0; i < p.header_bytes; i += 4 * kLineBytes) read();
  for (int h = 0; h < kHalves; ++h)
    out.units[h] = Lanes::Mul(Lanes::LoadHalves(stored + 32 * h), Lanes::Set(kScaleUnit));
  out.parts = int(CeilDiv(groups * p.group_size, kColumns));
  int64_t step = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t *const steps = StepsOf(p, stored, g), *const numbers = MultiplesOf(stored, g);
    __m512i less[kHalves], multiples[kHalves];  // less: zero points
    less[0] = less[1] = _mm512_set1_epi8(1 << (kBits < 8 ? kBits - 1 : 0));
    if (kBits < 8 && !p.symmetric) {
      const uint8_t* const bytes = ZeroPointsOf(p, panel, first + g);
      if constexpr (F::kMultiples || kBits == 4) {
        LoadZeroPointBytes<kBits>(bytes, numbers, less);
      } else {
        for (int h = 0; h < kHalves; ++h) less[h] = FourTimes(bytes + 16 * h);
      }
    }
    if constexpr (F::kMultiples) {
      SplitNibbles(FourTimes(numbers), multiples);
      for (int h = 0; h < kHalves; ++h) {
        multiples[h] = _mm512_add_epi16(_mm512_and_si512(multiples[h], less_1), one);
        less[h] = Times(less[h], multiples[h]);
      }
    }
    __m512i lines[UnitLines(kBits)];
    for (int64_t i = 0; i < p.group_size / 4; i += 4, step += 4) {
      read();
      if (kBits == 8 || (kBits > 4 && i / 4 % (kBits == 5 ? 4 : 2) == 0)) read();
      UNROLL_FOR(j, 4) {
        __m512i q[kHalves];
        if constexpr (kBits < 8) LoadStep<kBits>(steps, i + j, lines, q);
        UNROLL_FOR(h, kHalves) {
          if constexpr (kBits == 8) {
            q[h] = _mm512_xor_si512(_mm512_loadu_si512(steps + 128 * (i + j) + 64 * h), _mm512_set1_epi8(-128));
          } else {
            if constexpr (F::kMultiples) q[h] = Times(q[h], multiples[h]);
            q[h] = _mm512_sub_epi8(q[h], less[h]);
          }
          _mm512_store_si512(out.weights[h][0] + 64 * (step + j), q[h]);
        }
      }
    }
  }
  for (; step < 16 * out.parts; ++step)
    for (int h = 0; h < kHalves; ++h) _mm512_store_si512(out.weights[h][0] + 64 * step, _mm512_setzero_si512());
}

// Where a product's sums go.
struct Target {
  const Block* block;
  const float* scales;
  float (*totals)[kPanel];
  bool first;  // the totals start here
};

// The product of a tile, or of its first rows, and a block.
template <int kPlanes, class F, int kTileRows = kRows>
struct Product {
  using Sums = int32_t[kHalves][kPlanes][kTileRows][kLanes];
  static constexpr int64_t kPartBytes = kPlanes * kTileSize, kBlockBytes = kParts * kPartBytes;
  static constexpr int kTurns = 2 * kParts;  // of tile registers and vectors

  template <int kHalf, int kPlane>
  static constexpr int kSum = kSums + kHalf * kPlanes + kPlane;

  // A tile of columns.
  template <int kPart, class Function>
  static INLINE void AddPart(const Block& block, const char* values, const Function& meanwhile) {
    constexpr int kA = kActivations, kW = kWeights;
    LoadTile<kA, kColumns>(values + kPart * kPartBytes);
    LoadTile<kW, kColumns>(block.weights[0][kPart]);
    AddProduct<kSum<0, 0>, kA, kW>();
    if constexpr (kPlanes == 1) meanwhile(2 * kPart);
    LoadTile<kW + 1, kColumns>(block.weights[1][kPart]);
    AddProduct<kSum<1, 0>, kA, kW + 1>();
    if constexpr (kPlanes == 2) {
      meanwhile(2 * kPart);
      LoadTile<kA + 1, kColumns>(values + kPart * kPartBytes + kTileSize);
      AddProduct<kSum<0, 1>, kA + 1, kW>();
      AddProduct<kSum<1, 1>, kA + 1, kW + 1>();
    }
    meanwhile(2 * kPart + 1);
  }

  // Calls meanwhile(turn) for each of kTurns, where vectors have time.
  template <class Function>
  static INLINE void Multiply(const Block& block, const char* values, const Function& meanwhile) {
    ZeroTile<kSum<0, 0>>();
    ZeroTile<kSum<1, 0>>();
    if constexpr (kPlanes == 2) {
      ZeroTile<kSum<0, 1>>();
      ZeroTile<kSum<1, 1>>();
    }
    AddPart<0>(block, values, meanwhile);
    if (block.parts > 1) {
      AddPart<1>(block, values, meanwhile);
    } else {
      meanwhile(2);
      meanwhile(3);
    }
  }

  static INLINE void Store(Sums& to) {
    StoreTile<kSum<0, 0>>(to[0][0]);
    StoreTile<kSum<1, 0>>(to[1][0]);
    if constexpr (kPlanes == 2) {
      StoreTile<kSum<0, 1>>(to[0][1]);
      StoreTile<kSum<1, 1>>(to[1][1]);
    }
  }

  // Adds some of the rows to their totals.
  static INLINE void Add(const Sums& from, const Target& to, int turn) {
    constexpr int kSome = kTileRows / kTurns;
    UNROLL_FOR(h, kHalves) {
      const __m512 unit = to.block->units[h];
      UNROLL_FOR(i, kSome) {
        const int r = turn * kSome + i;
        const auto sum = [&](int plane) { return _mm512_load_si512(from[h][plane][r]); };
        __m512 product;
        if constexpr (kPlanes == 1) {
          product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum(0)), unit);
        } else if constexpr (F::kMultiples) {
          product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum(0)), _mm512_mul_ps(unit, _mm512_set1_ps(256.f)));
          product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum(1)), unit, product);
        } else {
          const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(sum(0), 8), sum(1));
          product = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), unit);
        }
        float* const total = to.totals[r] + h * kLanes;
        const __m512 before = to.first ? _mm512_setzero_ps() : _mm512_load_ps(total);
        _mm512_store_ps(total, _mm512_fmadd_ps(product, _mm512_set1_ps(to.scales[r]), before));
      }
    }
  }
};

// Adds the products of tiles and a panel's blocks [first, first + count) to totals. Meanwhile it fetches the weights at
// `fetch`.
template <int kPlanes, class F>
void MultiplyChunk(const Problem& p, const Block* blocks, int64_t first, int64_t count, Range of_tiles,
                   const uint8_t* fetch, const char* activations, float (*totals)[kPanel]) {
  using P = Product<kPlanes, F>;
  alignas(64) typename P::Sums sums;
  const int64_t tile_bytes = TileBytes(p), value_bytes = ValueBytes(p);
  const int64_t fetch_bytes = kChunkBlocks * p.block_bytes;
  const int64_t step_bytes = CeilDiv(fetch_bytes, (of_tiles.last - of_tiles.first) * count * 64) * 64;
  const uint8_t* const fetch_last = fetch + fetch_bytes;
  activations += of_tiles.first * tile_bytes;
  Target target = {};
  for (int64_t t = of_tiles.first; t < of_tiles.last; ++t, activations += tile_bytes, totals += kRows) {
    const char* values = activations + first * P::kBlockBytes;
    const float* scales = reinterpret_cast<const float*>(activations + value_bytes) + first * kRows;
    for (int64_t b = 0; b < count; ++b, values += P::kBlockBytes, scales += kRows) {
      // While tile registers multiply, vectors add the block before. They take turns: few tiles are under way at once,
      // and what comes after them waits with them.
      if (target.block == nullptr) {
        P::Multiply(blocks[b], values, [](int) {});
      } else {
        P::Multiply(blocks[b], values, [&](int turn) ALWAYS_INLINE { P::Add(sums, target, turn); });
      }
      P::Store(sums);
      target = {blocks + b, scales, totals, first + b == 0};
      const uint8_t* const fetch_end = fetch + step_bytes;
      for (; fetch < fetch_end && fetch < fetch_last; fetch += 64) __builtin_prefetch(fetch, 0, 2);
    }
  }
  for (int turn = 0; turn < P::kTurns; ++turn) P::Add(sums, target, turn);
}

// A single tile and panels. A tile load waits long for what was just stored: a block is unpacked while the one before
// is multiplied, and its sums are added while the one after is.
template <int kPlanes, class F, int kTileRows>
void MultiplySingle(const Problem& p, Range rows, Range of_panels, const char* tile) {
  using P = Product<kPlanes, F, kTileRows>;
  struct Place {
    int64_t panel, block;
    int buffer;
  };
  const auto after = [&](Place at) {
    at.buffer = at.buffer == 2 ? 0 : at.buffer + 1;
    if (++at.block == p.blocks) at.block = 0, ++at.panel;
    return at;
  };
  alignas(64) typename P::Sums sums[2];
  alignas(64) float totals[kTileRows][kPanel];
  Block blocks[3];
  const float* const scales = reinterpret_cast<const float*>(tile + ValueBytes(p));
  Stream stream =
      StartWindows(PanelOf(p, of_panels.first), (of_panels.last - of_panels.first) * p.panel_bytes, kLineBytes);
  const auto unpack = [&](Place at) {
    if (at.panel == of_panels.last) return;
    Unpack<F>(p, PanelOf(p, at.panel), at.block, blocks[at.buffer], [&] { stream.Fetch<1, 4>(); });
  };
  const auto add = [&](Place at, const typename P::Sums& from) {
    const Target target = {&blocks[at.buffer], scales + at.block * kRows, totals, at.block == 0};
    for (int turn = 0; turn < P::kTurns; ++turn) P::Add(from, target, turn);
    if (at.block + 1 == p.blocks) Finish(p, rows, {at.panel, at.panel + 1}, totals[0], 0);
  };
  ConfigureTiles(kTileRows, kColumns);
  const int64_t count = (of_panels.last - of_panels.first) * p.blocks;
  Place at = {of_panels.first, 0, 0}, before = at;
  unpack(at);
  for (int64_t i = 0; i < count; ++i, before = at, at = after(at)) {
    P::Multiply(blocks[at.buffer], tile + at.block * P::kBlockBytes, [](int) {});
    unpack(after(at));
    if (i > 0) add(before, sums[(i - 1) % 2]);
    P::Store(sums[i % 2]);
  }
  if (count > 0) add(before, sums[(count - 1) % 2]);
}

int64_t ChunkGroups(const Problem& p) { return kChunkBlocks * p.block_groups; }

Share ShareOf(const Problem& p) { return ShareOf(p, kRows, TileBytes(p), ChunkGroups(p)); }

template <int kPlanes, class F>
void MultiplyTiles(const Problem& p, int64_t tiles, Range of_tiles, Range of_panels, const char* activations) {
  if (of_tiles.last - of_tiles.first == 1) {
    const Range rows = {RowBegin(p, tiles, of_tiles.first), RowBegin(p, tiles, of_tiles.last)};
    const auto multiply =
        rows.last - rows.first <= kRows / 2 ? MultiplySingle<kPlanes, F, kRows / 2> : MultiplySingle<kPlanes, F, kRows>;
    return multiply(p, rows, of_panels, activations + of_tiles.first * TileBytes(p));
  }
  ConfigureTiles(kRows, kColumns);
  TakeTurns(p, tiles, of_tiles, of_panels, kRows, TileBytes(p), ChunkGroups(p),
            [&](int64_t panel, int64_t group, int64_t groups, const uint8_t* next, float (*totals)[kPanel]) {
              const int64_t first = group / p.block_groups, count = CeilDiv(groups, p.block_groups);
              Block chunk[kChunkBlocks];
              for (int64_t i = 0; i < count; ++i) Unpack<F>(p, PanelOf(p, panel), first + i, chunk[i], [] {});
              MultiplyChunk<kPlanes, F>(p, chunk, first, count, of_tiles, next, activations, totals);
            });
}

template <int kPlanes, int kBits>
auto ChooseScales(const Problem& p) {
  return p.block_groups > 1 ? MultiplyTiles<kPlanes, Form<kBits, true>> : MultiplyTiles<kPlanes, Form<kBits, false>>;
}

template <int kPlanes>
auto ChooseForm(const Problem& p) {
  return p.bits == 4   ? ChooseScales<kPlanes, 4>(p)
         : p.bits == 5 ? ChooseScales<kPlanes, 5>(p)
         : p.bits == 6 ? ChooseScales<kPlanes, 6>(p)
                       : MultiplyTiles<kPlanes, Form<8, false>>;
}

void Multiply(const Problem& p, int64_t tiles, Range of_tiles, Range of_panels, const char* activations) {
  const auto multiply = Planes(p) == 1 ? ChooseForm<1>(p) : ChooseForm<2>(p);
  multiply(p, tiles, of_tiles, of_panels, activations);
  asm volatile("tilerelease");
  _mm_sfence();  // other threads shall see what was streamed
}

}  // namespace

const Kernels kAmxBlockKernels = {TileRows, TileBytes, Prepare, ShareOf, QuantizeRows<Lanes>, Multiply};

}  // namespace quant_linear
