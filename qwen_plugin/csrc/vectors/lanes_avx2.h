// Sixteen float lanes with AVX2, FMA and F16C; see lanes_plain.h.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Avx2Lanes {
  struct Floats {
    __m256 low, high;
  };
  struct Ints {
    __m256i low, high;
  };

  static Floats Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void Store(float* p, Floats v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
  }
  static Floats LoadHalves(const uint8_t* p) {
    const __m128i* const eights = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(eights)), _mm256_cvtph_ps(_mm_loadu_si128(eights + 1))};
  }
  static Floats Set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Floats Add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static Floats Mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static Floats Div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
  static Floats Fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static Floats Max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  static Floats Negate(Floats a) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    return {_mm256_xor_ps(a.low, sign), _mm256_xor_ps(a.high, sign)};
  }
  static Ints Round(Floats a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
  static Floats ToFloats(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
  static Floats PowerOfTwo(Ints n) {
    const auto power = [](__m256i eight) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(eight, _mm256_set1_epi32(127)), 23));
    };
    return {power(n.low), power(n.high)};
  }
  static float Sum(Floats v) {
    const __m256 eight = _mm256_add_ps(v.low, v.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static Ints Zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Ints MagnitudeBits(Floats a) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    return {_mm256_and_si256(_mm256_castps_si256(a.low), mask), _mm256_and_si256(_mm256_castps_si256(a.high), mask)};
  }
  static Ints MaxInts(Ints a, Ints b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
  static Ints AddInts(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
  static Ints SubInts(Ints a, Ints b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
  static Ints HighPart(Ints a) {
    const __m256i half = _mm256_set1_epi32(128), mask = _mm256_set1_epi32(~255);
    return {_mm256_and_si256(_mm256_add_epi32(a.low, half), mask),
            _mm256_and_si256(_mm256_add_epi32(a.high, half), mask)};
  }
  static int32_t SumInts(Ints v) {
    const __m256i eight = _mm256_add_epi32(v.low, v.high);
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }
  static int32_t MaxOfInts(Ints v) {
    const __m256i eight = _mm256_max_epi32(v.low, v.high);
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }
  template <int kShift>
  static void StoreBytes(int8_t* p, Ints v) {
    // Four bytes of each quarter, then the quarters in order.
    const __m256i order =
        _mm256_set1_epi32((kShift / 8) * 0x01010101 + 0x0c080400);  // bytes kShift / 8, 4 more, 8 more, 12 more
    const __m256i lows = _mm256_shuffle_epi8(v.low, order), highs = _mm256_shuffle_epi8(v.high, order);
    const __m256i mixed = _mm256_unpacklo_epi32(lows, highs);  // dwords: 0 of low, 0 of high, ...
    const __m128i first = _mm256_castsi256_si128(mixed), second = _mm256_extracti128_si256(mixed, 1);
    const __m128i both = _mm_unpacklo_epi32(first, second);  // low 0, low 1, high 0, high 1
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), both);
  }
  static Ints Column(const uint8_t* p, int column, int shift, uint32_t mask) {
    const __m128i count = _mm_cvtsi32_si128(8 * column + shift);
    const __m256i* const eights = reinterpret_cast<const __m256i*>(p);
    const auto bits = [&](__m256i eight) {
      return _mm256_and_si256(_mm256_srl_epi32(eight, count), _mm256_set1_epi32(int32_t(mask)));
    };
    return {bits(_mm256_loadu_si256(eights)), bits(_mm256_loadu_si256(eights + 1))};
  }
};

}  // namespace
