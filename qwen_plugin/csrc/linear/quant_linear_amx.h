// What the AMX kernels of qwen::QuantLinear share.
#pragma once
#include <immintrin.h>

#include "linear/quant_linear_kernels.h"
#include "vectors/lanes_avx512.h"

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

namespace quant_linear {
namespace {

using Lanes = Avx512Lanes;

constexpr int kLanes = 16, kHalves = kPanel / kLanes;
// Rows at a time, in tiles, and totals of the panels that they are multiplied with: both stay in a second-level cache
// of 2 MiB, of which neighbours may take a part. Measured: 64 tiles take 1.1 to 1.2 times as long.
constexpr int kMaxTiles = 16;
constexpr int64_t kTotalBytes = 512 << 10;
constexpr int64_t kLeastTasks = 6;         // of such panels, so that the threads end together
constexpr int64_t kStreamBytes = 8 << 20;  // of y, from which it is written past the caches, measured

// ---- Turns. Where the activations of all rows do not stay in the second-level cache, panels take turns after a range
// of columns, and the weights are unpacked once for all rows; or, if there are few panels, rows are given in blocks.

// Panels that have totals at the same time, at least one.
inline int64_t PanelsAtOnce(int64_t tiles, int64_t tile_rows) {
  const int64_t panels = kTotalBytes / (tiles * tile_rows * kPanel * int64_t(sizeof(float)));
  return panels < 1 ? 1 : panels;
}

// Groups of a turn, a multiple of `unit`.
inline int64_t TurnGroups(const Problem& p, int64_t tiles, int64_t tile_bytes, int64_t unit) {
  const int64_t turns = CeilDiv(tiles * tile_bytes, kCachedBytes);
  return CeilDiv(CeilDiv(p.groups, turns), unit) * unit;
}

inline Share ShareOf(const Problem& p, int64_t tile_rows, int64_t tile_bytes, int64_t unit) {
  const int64_t all = CeilDiv(p.rows, tile_rows), tiles = all < kMaxTiles ? all : kMaxTiles;
  const int64_t panels = PanelsAtOnce(tiles, tile_rows);
  if (TurnGroups(p, tiles, tile_bytes, unit) < p.groups && CeilDiv(p.panels, panels) >= kLeastTasks)
    return {kMaxTiles, panels};
  const int64_t cached = kCachedBytes / tile_bytes;
  return {cached > kMaxTiles ? kMaxTiles : cached > 1 ? cached : 1, 0};
}

// ---- Tile registers. The intrinsics take their numbers from literals only.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

enum Register { kSums = 0, kActivations = 4, kWeights = 6 };  // the first of each kind

inline void ConfigureTiles(int rows, int columns) {
  TileConfig config;
  for (int i = kSums; i < kActivations; ++i) config.rows[i] = uint8_t(rows), config.row_bytes[i] = 4 * kLanes;
  for (int i = kActivations; i < kWeights; ++i) config.rows[i] = uint8_t(rows), config.row_bytes[i] = uint16_t(columns);
  for (int i = kWeights; i < 8; ++i) config.rows[i] = uint8_t(columns / 4), config.row_bytes[i] = 4 * kLanes;
  asm volatile("ldtilecfg %0" : : "m"(config));
}

template <int kTile>
INLINE void ZeroTile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// kStride: bytes from row to row.
template <int kTile, int kStride>
INLINE void LoadTile(const void* p) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(int64_t{kStride}), "i"(kTile) : "memory");
}
template <int kTile>
INLINE void StoreTile(void* p) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(int64_t{4 * kLanes}), "i"(kTile) : "memory");
}
template <int kSum, int kA, int kB>
INLINE void AddProduct() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

// Every byte in the four bytes of a lane.
inline __m512i FourTimes(const uint8_t* bytes) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  const __m128i firsts = _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
  return _mm512_shuffle_epi8(_mm512_cvtepu8_epi32(v), _mm512_broadcast_i32x4(firsts));
}

// The low nibbles, and the high ones.
INLINE void SplitNibbles(__m512i v, __m512i* q) {
  q[0] = _mm512_and_si512(v, _mm512_set1_epi8(15));
  q[1] = _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64(0x1020408000000000), 0);  // bits shifted by four
}

// Step j of the integers of a group of 4, 5 or 6 bits; `lines` stay with the next.
template <int kBits>
INLINE void LoadStep(const uint8_t* steps, int64_t j, __m512i (&lines)[UnitLines(kBits)], __m512i* q) {
  constexpr int kUnit = UnitSteps(kBits), kLines = UnitLines(kBits);
  if constexpr (kBits == 4) {
    SplitNibbles(_mm512_loadu_si512(steps + 64 * j), q);
  } else {
    if (j % kUnit == 0) UNROLL_FOR(l, kLines) lines[l] = _mm512_loadu_si512(steps + (j / kUnit * kLines + l) * 64);
    UnpackStep<kBits, Avx512Bytes>(lines, int(j % kUnit), q);
    q[1] = _mm512_srli_epi16(q[1], 8 - kBits);  // 0 leaves a byte
  }
}

// A group's zero points in a block of 4, 5 or 6 bits, each in the four bytes of its lane; `numbers`: of the multiples.
template <int kBits>
INLINE void LoadZeroPointBytes(const uint8_t* low, const uint8_t* numbers, __m512i* out) {
  SplitNibbles(FourTimes(low), out);
  if constexpr (kBits > 4) {
    __m512i upper[kHalves];
    SplitNibbles(FourTimes(numbers), upper);
    constexpr int kAbove = 16 - (256 >> kBits);
    for (int h = 0; h < kHalves; ++h) {
      const __m512i bits = _mm512_slli_epi16(_mm512_and_si512(upper[h], _mm512_set1_epi8(kAbove)), kBits - 4);
      out[h] = _mm512_or_si512(out[h], bits);
    }
  }
}

// Whether y is written past the caches, which could not hold it, instead of being read into them first.
inline bool Streams(const Problem& p) {
  return p.rows * p.width * int64_t(sizeof(float)) >= kStreamBytes && p.width % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(p.y) % 64 == 0;
}

// Which of the outputs of a half of a panel there are.
inline __mmask16 OutputMask(const Problem& p, int64_t column) {
  const int64_t left = p.out_features - column;
  return left >= kLanes ? 0xffff : left <= 0 ? 0 : __mmask16((1 << left) - 1);
}

// ---- From totals to y

// y of a panel and a row, from its totals.
INLINE void FinishRow(const Problem& p, int64_t row, int64_t panel, bool stream, const float* totals) {
  if (p.swiglu) {
    __m512 halves[kHalves];
    for (int h = 0; h < kHalves; ++h) {
      halves[h] = _mm512_load_ps(totals + h * kLanes);
      if (p.bias != nullptr)
        halves[h] = _mm512_add_ps(halves[h], _mm512_loadu_ps(p.bias + panel * kPanel + h * kLanes));
    }
    const __m512 y = Gate<Lanes>(halves[0], halves[1]);
    float* const at = p.y + row * p.width + panel * kLanes;
    stream ? _mm512_stream_ps(at, y) : _mm512_storeu_ps(at, y);
    return;
  }
  for (int h = 0; h < kHalves; ++h) {
    const int64_t column = panel * kPanel + h * kLanes, at = row * p.width + column;
    const __mmask16 mask = OutputMask(p, column);
    __m512 y = _mm512_load_ps(totals + h * kLanes);
    if (p.bias != nullptr) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p.bias + column));
    if (p.residual != nullptr) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p.residual + at));
    if (stream && mask == 0xffff) {
      _mm512_stream_ps(p.y + at, y);
    } else {
      _mm512_mask_storeu_ps(p.y + at, mask, y);
    }
  }
}

// y of rows and panels, row by row: memory takes few bytes of many rows at a fraction of its speed. The totals of a row
// and the next are kPanel floats apart, those of a panel and the next panel_floats.
inline void Finish(const Problem& p, Range rows, Range panels, const float* totals, int64_t panel_floats) {
  const bool stream = Streams(p);
  for (int64_t row = rows.first; row < rows.last; ++row, totals += kPanel)
    for (int64_t n = panels.first; n < panels.last; ++n)
      FinishRow(p, row, n, stream, totals + (n - panels.first) * panel_floats);
}

// ---- The order of the work

// Computes y of tiles and panels. Calls multiply(panel, first group, count, weights that are wanted next, totals
// (rows of the tiles, 32)) for chunks of `unit` groups: for as many panels as have totals that stay in a cache, turn by
// turn.
template <class Function>
inline void TakeTurns(const Problem& p, int64_t tiles, Range of_tiles, Range of_panels, int64_t tile_rows,
                      int64_t tile_bytes, int64_t unit, const Function& multiply) {
  const int64_t count = of_tiles.last - of_tiles.first, turn = TurnGroups(p, count, tile_bytes, unit);
  const int64_t tile_floats = tile_rows * kPanel, floats = count * tile_floats;
  const int64_t cached = PanelsAtOnce(count, tile_rows), all = of_panels.last - of_panels.first;
  const int64_t most = cached < all ? cached : all;
  float* const totals = TotalScratch(most * floats);
  for (Range panels = {of_panels.first, 0}; panels.first < of_panels.last; panels.first = panels.last) {
    panels.last = panels.first + most < of_panels.last ? panels.first + most : of_panels.last;
    for (int64_t begin = 0; begin < p.groups; begin += turn) {
      const int64_t end = begin + turn < p.groups ? begin + turn : p.groups;
      for (int64_t n = panels.first; n < panels.last; ++n)
        for (int64_t g = begin; g < end; g += unit) {
          const bool more = g + unit < end;  // of this panel
          const uint8_t* const next = BlockOf(p, PanelOf(p, n + !more), (more ? g + unit : begin) / p.block_groups);
          multiply(n, g, end - g < unit ? end - g : unit, next,
                   reinterpret_cast<float (*)[kPanel]>(totals + (n - panels.first) * floats));
        }
    }
    for (int64_t t = of_tiles.first; t < of_tiles.last; ++t)
      Finish(p, {RowBegin(p, tiles, t), RowBegin(p, tiles, t + 1)}, panels, totals + (t - of_tiles.first) * tile_floats,
             floats);
  }
}

}  // namespace
}  // namespace quant_linear
