// What the AMX kernels of qwen::QuantLinear share.
#pragma once
#include <immintrin.h>

#include "lanes_avx512.h"
#include "quant_linear_kernels.h"

#define INLINE inline __attribute__((always_inline))

namespace quant_linear {
namespace {

using Lanes = Avx512Lanes;

constexpr int kLanes = 16, kHalves = kPanel / kLanes;
constexpr int64_t kStreamBytes = 8 << 20;  // of y, from which it is written past the caches, measured

inline int64_t CeilDiv(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

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
  return _mm512_mullo_epi32(_mm512_cvtepu8_epi32(v), _mm512_set1_epi32(0x01010101));
}

// Whether y is written past the caches, which could not hold it, instead of being read into them first.
inline bool Streams(const Problem& p) {
  return p.rows * p.out_features * int64_t(sizeof(float)) >= kStreamBytes && p.out_features % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(p.y) % 64 == 0;
}

// y of a tile's rows and a panel, from their totals.
inline void FinishRows(const Problem& p, Range rows, int64_t panel, const float (*totals)[kPanel]) {
  const bool stream = Streams(p);
  for (int h = 0; h < kHalves; ++h) {
    const int64_t column = panel * kPanel + h * kLanes, left = p.out_features - column;
    const __mmask16 mask = left >= kLanes ? 0xffff : left <= 0 ? 0 : __mmask16((1 << left) - 1);
    const __m512 bias = p.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, p.bias + column);
    for (int64_t row = rows.first; row < rows.last; ++row) {
      const int64_t at = row * p.out_features + column;
      __m512 y = _mm512_load_ps(totals[row - rows.first] + h * kLanes);
      if (p.bias != nullptr) y = _mm512_add_ps(y, bias);
      if (p.residual != nullptr) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p.residual + at));
      if (stream && mask == 0xffff) {
        _mm512_stream_ps(p.y + at, y);
      } else {
        _mm512_mask_storeu_ps(p.y + at, mask, y);
      }
    }
  }
}

}  // namespace
}  // namespace quant_linear
