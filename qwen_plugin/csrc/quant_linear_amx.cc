// qwen::QuantLinear with AMX tiles, for int8 and int8x2.
//
// A tile of activations is 16 rows, those that are missing zero:
//   [columns / 64][planes][16 rows][64 columns] bytes, [groups][16 rows] float32 scales,
//   [groups][16 rows] factors of the zero points (only if asymmetric with 8 bits)
// Weights are unpacked, a chunk of columns of a panel at a time, into bytes with a sign: q - zero point with 4 bits,
// q - 128 with 8. A tile product leaves sums of 16 rows and 16 outputs over one group in memory, from where vectors
// take them into y.
#include <immintrin.h>

#include "lanes_avx512.h"
#include "quant_linear_kernels.h"

#define INLINE inline __attribute__((always_inline))

namespace quant_linear {
namespace {

using Lanes = Avx512Lanes;

constexpr int kRows = 16, kLanes = 16, kHalves = kPanel / kLanes;
constexpr int kColumns = 64;        // of a tile of activations
constexpr int kChunkColumns = 512;  // a chunk of a panel, 16 KiB unpacked, stays in the first-level cache
constexpr int kMaxTiles = 32;       // whose y, 64 KiB, stays in the second-level cache
constexpr int kTileBytes = kRows * kColumns;
constexpr int kMaxUnit = 4;  // groups whose sums are in memory

// ---- Tile registers. The intrinsics take their numbers from literals only.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

enum Register { kSums = 0, kActivations = 4, kWeights = 6 };  // the first of each kind

void ConfigureTiles(int columns) {
  TileConfig config;
  for (int i = kSums; i < kActivations; ++i) config.rows[i] = kRows, config.row_bytes[i] = 4 * kLanes;
  for (int i = kActivations; i < kWeights; ++i) config.rows[i] = kRows, config.row_bytes[i] = uint16_t(columns);
  for (int i = kWeights; i < 8; ++i) config.rows[i] = uint8_t(columns / 4), config.row_bytes[i] = 4 * kLanes;
  asm volatile("ldtilecfg %0" : : "m"(config));
}

template <int kTile>
INLINE void ZeroTile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile, int kOffset>
INLINE void LoadTile(const void* p) {
  asm volatile("tileloadd %c3(%0,%1,1), %%tmm%c2" : : "r"(p), "r"(int64_t{64}), "i"(kTile), "i"(kOffset) : "memory");
}
template <int kTile, int kOffset>
INLINE void StoreTile(void* p) {
  asm volatile("tilestored %%tmm%c2, %c3(%0,%1,1)" : : "r"(p), "r"(int64_t{64}), "i"(kTile), "i"(kOffset) : "memory");
}
template <int kSum, int kA, int kB>
INLINE void AddProduct() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

// ---- Preparing

int Planes(const Problem& p) { return p.precision == Precision::kInt8 ? 1 : 2; }
bool HasCorrection(const Problem& p) { return p.bits == 8 && !p.symmetric; }

// With columns up to a whole unit, which are multiplied but don't count.
int64_t ValueBytes(const Problem& p) {
  const int64_t unit = kMaxUnit * p.group_size;
  return (p.groups * p.group_size + unit - 1) / unit * unit * kRows * Planes(p);
}

int64_t MaxTileRowsAmx(const Problem&) { return kRows; }

int64_t TileBytesAmx(const Problem& p) {
  return ValueBytes(p) + p.groups * kRows * int64_t(sizeof(float)) * (HasCorrection(p) ? 2 : 1);
}

template <int kPlanes>
void PrepareRowAmx(const Problem& p, const float* x, int64_t row, char* tile) {
  float* const scales = reinterpret_cast<float*>(tile + ValueBytes(p)) + row;
  int32_t* const factors = reinterpret_cast<int32_t*>(scales + p.groups * kRows);
  for (int64_t g = 0; g < p.groups; ++g) {
    int8_t planes[kPlanes][kMaxGroup];
    const QuantizedGroup group = QuantizeGroup<Lanes, kPlanes>(x + g * p.group_size, p.group_size, planes);
    for (int64_t k = 0; k < p.group_size; k += 32) {
      const int64_t column = g * p.group_size + k;
      for (int plane = 0; plane < kPlanes; ++plane)
        std::memcpy(tile + (column / kColumns * kPlanes + plane) * kTileBytes + row * kColumns + column % kColumns,
                    planes[plane] + k, 32);
    }
    scales[g * kRows] = group.scale;
    if (HasCorrection(p)) {
      const uint32_t low = uint32_t(group.sums[kPlanes - 1]), high = kPlanes == 1 ? 0 : uint32_t(group.sums[0]);
      factors[g * kRows] = int32_t(((0 - low) & 0xffff) | (0 - high) << 16);
    }
  }
}

void PrepareAmx(const Problem& p, int64_t tiles, Range range, char* activations) {
  for (int64_t t = range.first; t < range.last; ++t) {
    const int64_t begin = RowBegin(p, tiles, t), rows = RowBegin(p, tiles, t + 1) - begin;
    char* const tile = activations + t * TileBytesAmx(p);
    if (rows < kRows) std::memset(tile, 0, size_t(TileBytesAmx(p)));
    for (int64_t r = 0; r < rows; ++r)
      (p.precision == Precision::kInt8 ? PrepareRowAmx<1> : PrepareRowAmx<2>)(p, InputRow<Lanes>(p, begin + r), r,
                                                                              tile);
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

// Every byte in the four bytes of a lane.
__m512i FourTimes(const uint8_t* bytes) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm512_mullo_epi32(_mm512_cvtepu8_epi32(v), _mm512_set1_epi32(0x01010101));
}

// Groups [first, first + count) of a panel.
void Unpack(const Problem& p, const uint8_t* panel, int64_t first, int64_t count, Chunk& chunk) {
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  int8_t* out = chunk.weights;
  const int64_t half = p.group_size * kLanes;
  for (int64_t g = 0; g < count; ++g, out += 2 * half) {
    const uint8_t* block = panel + p.zero_point_bytes + (first + g) * p.block_bytes;
    GroupFactors& factors = chunk.factors[g];
    __m512i zero_points[kHalves] = {_mm512_set1_epi8(8), _mm512_set1_epi8(8)};
    if (p.bits == 4 && !p.symmetric) {
      const __m512i both = FourTimes(panel + (first + g) * 16);
      zero_points[0] = _mm512_and_si512(both, low_nibbles);
      zero_points[1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_nibbles);
    }
    for (int h = 0; h < kHalves; ++h) {
      factors.units[h] = Lanes::Mul(Lanes::LoadHalves(block + 32 * h), Lanes::Set(kScaleUnit));
      factors.offsets[h] = Lanes::Mul(factors.units[h], Lanes::Set(-kFloatStartValue));  // exact
      if (HasCorrection(p)) {
        const uint8_t* const bytes = panel + (first + g) * 32 + 16 * h;
        const __m512i less = _mm512_sub_epi32(
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))), _mm512_set1_epi32(128));
        factors.zero_points[h] = _mm512_mask_mov_epi16(_mm512_slli_epi32(less, 24), 0x55555555, less);
      }
    }
    block += 2 * kPanel;
    for (int64_t i = 0; i < half; i += 64) {
      if (p.bits == 4) {
        const __m512i v = _mm512_loadu_si512(block + i), high = _mm512_srli_epi16(v, 4);
        _mm512_store_si512(out + i, _mm512_sub_epi8(_mm512_and_si512(v, low_nibbles), zero_points[0]));
        _mm512_store_si512(out + half + i, _mm512_sub_epi8(_mm512_and_si512(high, low_nibbles), zero_points[1]));
      } else {
        for (int h = 0; h < kHalves; ++h)
          _mm512_store_si512(out + half * h + i,
                             _mm512_xor_si512(_mm512_loadu_si512(block + 2 * i + 64 * h), _mm512_set1_epi8(-128)));
      }
    }
  }
}

// Groups of a tile of activations and a panel.
struct Unit {
  int64_t groups;  // at most Sums::kGroups
  bool first;      // groups of the row: y starts at 0
  const char* values;
  const int8_t* weights;
  const GroupFactors* factors;
  const float* scales;         // (groups, 16 rows)
  const int32_t* row_factors;  // the same
  float (*y)[kPanel];          // (16 rows, 32)
};

// Its tile products, (groups, 2 halves, planes, 16 rows, 16 outputs). Two of these and a chunk leave the first-level
// cache room.
template <int kGroupSize, int kPlanes>
struct Sums {
  static constexpr int kGroups = kPlanes == 2 || kGroupSize == 128 ? 2 : kMaxUnit, kTile = kRows * kLanes,
                       kGroup = kHalves * kPlanes * kTile;
  alignas(64) int32_t values[kGroups * kGroup];
};

template <int kPlanes, int kTo>
INLINE void StoreSums(int32_t* sums) {
  StoreTile<kSums, kTo>(sums);
  StoreTile<kSums + 1, kTo + kTileBytes>(sums);
  if constexpr (kPlanes == 2) {
    StoreTile<kSums + 2, kTo + 2 * kTileBytes>(sums);
    StoreTile<kSums + 3, kTo + 3 * kTileBytes>(sums);
  }
}

// One tile of columns: from where it starts in a unit's activations and weights.
template <int kPlanes, int kFrom, int kWeightsFrom, int kNextHalf>
INLINE void AddProducts(const char* values, const int8_t* weights) {
  LoadTile<kActivations, kFrom>(values);
  LoadTile<kWeights, kWeightsFrom>(weights);
  AddProduct<kSums, kActivations, kWeights>();
  if constexpr (kPlanes == 2) {
    LoadTile<kActivations + 1, kFrom + kTileBytes>(values);
    AddProduct<kSums + 1, kActivations + 1, kWeights>();
  }
  LoadTile<kWeights + 1, kWeightsFrom + kNextHalf>(weights);
  AddProduct<kSums + kPlanes, kActivations, kWeights + 1>();
  if constexpr (kPlanes == 2) AddProduct<kSums + 3, kActivations + 1, kWeights + 1>();
}

// Products of group kIndex of a unit, left in tiles. What they held goes to memory first: a store right after the
// product would wait for it.
template <int kGroup, int kPlanes, int kIndex>
INLINE void MultiplyGroup(const char* values, const int8_t* weights, int32_t* sums, int32_t* last_sums) {
  using S = Sums<kGroup, kPlanes>;
  StoreSums<kPlanes, (kIndex + S::kGroups - 1) % S::kGroups * S::kGroup * 4>(kIndex == 0 ? last_sums : sums);
  ZeroTile<kSums>();
  ZeroTile<kSums + 1>();
  if constexpr (kPlanes == 2) {
    ZeroTile<kSums + 2>();
    ZeroTile<kSums + 3>();
  }
  constexpr int kColumn = kIndex * kGroup, kWeightsFrom = kColumn * kPanel;
  constexpr int kFrom = kColumn / kColumns * kPlanes * kTileBytes + kColumn % kColumns;
  AddProducts<kPlanes, kFrom, kWeightsFrom, kGroup * kLanes>(values, weights);
  if constexpr (kGroup > kColumns)
    AddProducts<kPlanes, kFrom + kPlanes * kTileBytes, kWeightsFrom + kColumns * kLanes, kGroup * kLanes>(values,
                                                                                                          weights);
}

constexpr int kSlice = 8;  // rows whose y is in registers

template <int kGroup, int kPlanes, bool kCorrection, int kIndex, int kFirst>
INLINE void AddGroup(const Unit& unit, const int32_t* sums, __m512 (&y)[kSlice][kHalves]) {
  if (kIndex >= unit.groups) return;
  const GroupFactors& factors = unit.factors[kIndex];
  UNROLL_FOR(r, kSlice) UNROLL_FOR(h, kHalves) {
    const int32_t* const at = sums + kIndex * Sums<kGroup, kPlanes>::kGroup +
                              h * kPlanes * Sums<kGroup, kPlanes>::kTile + (kFirst + r) * kLanes;
    const int64_t row = kIndex * kRows + kFirst + r;
    __m512i dot = _mm512_load_si512(at);
    if constexpr (kPlanes == 1) {
      dot = _mm512_add_epi32(dot, _mm512_set1_epi32(kFloatStart));
    } else {
      dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 8), _mm512_load_si512(at + Sums<kGroup, kPlanes>::kTile));
    }
    if constexpr (kCorrection)
      dot = _mm512_dpwssd_epi32(dot, factors.zero_points[h], _mm512_set1_epi32(unit.row_factors[row]));
    const __m512 product = kPlanes == 1
                               ? _mm512_fmadd_ps(_mm512_castsi512_ps(dot), factors.units[h], factors.offsets[h])
                               : _mm512_mul_ps(_mm512_cvtepi32_ps(dot), factors.units[h]);
    y[r][h] = _mm512_fmadd_ps(product, _mm512_set1_ps(unit.scales[row]), y[r][h]);
  }
}

// Step kStep and those after it of a unit's products (kMultiply), alternating with the sums of the unit before, which
// enter y: two slices of rows, group by group.
template <int kGroup, int kPlanes, bool kCorrection, bool kMultiply, int kStep = 0>
INLINE void Steps(const Unit& unit, int32_t* sums, const Unit& last, int32_t* last_sums, __m512 (&y)[kSlice][kHalves]) {
  constexpr int kGroups = Sums<kGroup, kPlanes>::kGroups, kIndex = kStep % kGroups, kFirst = kStep / kGroups * kSlice;
  float (*const rows)[kPanel] = last.y + kFirst;
  if constexpr (kMultiply && kStep % 2 == 0)
    MultiplyGroup<kGroup, kPlanes, kStep / 2>(unit.values, unit.weights, sums, last_sums);
  if constexpr (kIndex == 0) {
    UNROLL_FOR(r, kSlice) UNROLL_FOR(h, kHalves) {
      y[r][h] = last.first ? _mm512_setzero_ps() : _mm512_load_ps(rows[r] + h * kLanes);
    }
  }
  AddGroup<kGroup, kPlanes, kCorrection, kIndex, kFirst>(last, last_sums, y);
  if constexpr (kIndex == kGroups - 1) {
    UNROLL_FOR(r, kSlice) UNROLL_FOR(h, kHalves) _mm512_store_ps(rows[r] + h * kLanes, y[r][h]);
  }
  if constexpr (kStep + 1 < 2 * kGroups)
    Steps<kGroup, kPlanes, kCorrection, kMultiply, kStep + 1>(unit, sums, last, last_sums, y);
}

template <int kGroup, int kPlanes, bool kCorrection>
__attribute__((noinline)) void MultiplyUnit(const Unit& unit, Sums<kGroup, kPlanes>& sums, const Unit& last,
                                            Sums<kGroup, kPlanes>& last_sums) {
  __m512 y[kSlice][kHalves];
  Steps<kGroup, kPlanes, kCorrection, true>(unit, sums.values, last, last_sums.values, y);
}

template <int kGroup, int kPlanes, bool kCorrection>
__attribute__((noinline)) void FinishUnit(const Unit& last, Sums<kGroup, kPlanes>& sums) {
  StoreSums<kPlanes, (Sums<kGroup, kPlanes>::kGroups - 1) * Sums<kGroup, kPlanes>::kGroup * 4>(sums.values);
  __m512 y[kSlice][kHalves];
  Steps<kGroup, kPlanes, kCorrection, false>(last, nullptr, last, sums.values, y);
}

// Adds groups [first, first + count), which `chunk` holds, of tiles and a panel to y.
template <int kGroup, int kPlanes, bool kCorrection>
void MultiplyChunk(const Problem& p, const Chunk& chunk, int64_t first, int64_t count, const char* tile, int64_t tiles,
                   float (*y)[kRows][kPanel]) {
  Sums<kGroup, kPlanes> sums[2];
  alignas(64) float nowhere[kRows][kPanel];
  Unit last = {};
  last.first = true;
  last.y = nowhere;
  int turn = 0;
  for (int64_t t = 0; t < tiles; ++t, tile += TileBytesAmx(p), ++y) {
    const float* const scales = reinterpret_cast<const float*>(tile + ValueBytes(p));
    for (int64_t g = 0; g < count; g += sums[0].kGroups, turn ^= 1) {
      const int64_t row = (first + g) * kRows;
      const Unit unit = {count - g < sums[0].kGroups ? count - g : sums[0].kGroups,
                         first + g == 0,
                         tile + row * kGroup * kPlanes,
                         chunk.weights + g * kGroup * kPanel,
                         chunk.factors + g,
                         scales + row,
                         reinterpret_cast<const int32_t*>(scales + p.groups * kRows) + row,
                         *y};
      MultiplyUnit<kGroup, kPlanes, kCorrection>(unit, sums[turn], last, sums[turn ^ 1]);
      last = unit;
    }
  }
  FinishUnit<kGroup, kPlanes, kCorrection>(last, sums[turn ^ 1]);
}

template <int kGroup>
auto ChooseMultiplyChunk(const Problem& p) {
  if (Planes(p) == 1) return HasCorrection(p) ? MultiplyChunk<kGroup, 1, true> : MultiplyChunk<kGroup, 1, false>;
  return HasCorrection(p) ? MultiplyChunk<kGroup, 2, true> : MultiplyChunk<kGroup, 2, false>;
}

void MultiplyAmx(const Problem& p, int64_t tiles, Range of_tiles, Range of_panels, const char* activations) {
  const auto multiply = p.group_size == 32   ? ChooseMultiplyChunk<32>(p)
                        : p.group_size == 64 ? ChooseMultiplyChunk<64>(p)
                                             : ChooseMultiplyChunk<128>(p);
  ConfigureTiles(p.group_size < kColumns ? int(p.group_size) : kColumns);
  const int64_t chunk_groups = kChunkColumns / p.group_size;
  for (int64_t first = of_tiles.first; first < of_tiles.last; first += kMaxTiles) {
    const int64_t last = first + kMaxTiles < of_tiles.last ? first + kMaxTiles : of_tiles.last;
    for (int64_t n = of_panels.first; n < of_panels.last; ++n) {
      alignas(64) float y[kMaxTiles][kRows][kPanel];
      for (int64_t g = 0; g < p.groups; g += chunk_groups) {
        const int64_t count = p.groups - g < chunk_groups ? p.groups - g : chunk_groups;
        Chunk chunk;
        Unpack(p, PanelOf(p, n), g, count, chunk);
        const uint8_t* const next = PanelOf(p, n) + p.zero_point_bytes + (g + count) * p.block_bytes;
        for (int64_t i = 0; i < chunk_groups * p.block_bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
        multiply(p, chunk, g, count, activations + first * TileBytesAmx(p), last - first, y);
      }
      for (int64_t t = first; t < last; ++t) {
        const int64_t begin = RowBegin(p, tiles, t), end = RowBegin(p, tiles, t + 1);
        for (int64_t row = end; row < end + kRows; ++row) {  // the next tile's y, far apart in memory
          __builtin_prefetch(p.y + row * p.out_features + n * kPanel, 1);
          __builtin_prefetch(p.y + row * p.out_features + n * kPanel + kLanes, 1);
        }
        Finish(p, n, begin, end - begin, y[t - first]);
      }
    }
  }
  asm volatile("tilerelease");
}

}  // namespace

const Kernels kAmxKernels = {MaxTileRowsAmx, TileBytesAmx, PrepareAmx, MultiplyAmx};

}  // namespace quant_linear
