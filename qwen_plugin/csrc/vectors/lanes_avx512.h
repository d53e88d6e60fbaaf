// Sixteen float lanes with AVX-512; see lanes_plain.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct Avx512Lanes {
  using Floats = __m512;
  using Ints = __m512i;

  static Floats Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats LoadHalves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Floats Set(float x) { return _mm512_set1_ps(x); }
  static Floats Add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats Mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats Div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats Fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats Max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats Negate(Floats a) { return _mm512_xor_ps(a, Set(-0.f)); }
  static Ints Round(Floats a) { return _mm512_cvtps_epi32(a); }
  static Floats ToFloats(Ints a) { return _mm512_cvtepi32_ps(a); }
  static Floats PowerOfTwo(Ints n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
  }
  static float Sum(Floats v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static Ints Zero() { return _mm512_setzero_si512(); }
  static Ints MagnitudeBits(Floats a) {
    return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
  }
  static Ints MaxInts(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
  static Ints AddInts(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints SubInts(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  static Ints HighPart(Ints a) {
    return _mm512_and_si512(_mm512_add_epi32(a, _mm512_set1_epi32(128)), _mm512_set1_epi32(~255));
  }
  static int32_t SumInts(Ints v) { return _mm512_reduce_add_epi32(v); }
  static int32_t MaxOfInts(Ints v) { return _mm512_reduce_max_epi32(v); }
  template <int kShift>
  static void StoreBytes(int8_t* p, Ints v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_srli_epi32(v, kShift)));
  }
  static Ints Column(const uint8_t* p, int column, int shift, uint32_t mask) {
    const __m128i count = _mm_cvtsi32_si128(8 * column + shift);
    return _mm512_and_si512(_mm512_srl_epi32(_mm512_loadu_si512(p), count), _mm512_set1_epi32(int32_t(mask)));
  }
};

// The 64 bytes of a vector, as quant_weight.h's UnpackStep wants them.
struct Avx512Bytes {
  using Bytes = __m512i;
  static Bytes And(Bytes a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi8(char(mask))); }
  static Bytes Choose(int mask, Bytes a, Bytes b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(char(mask)), a, b, 0xca);
  }
  template <int kCount>
  static Bytes Left(Bytes a) {
    return _mm512_slli_epi16(a, kCount);
  }
  template <int kCount>
  static Bytes Right(Bytes a) {
    return _mm512_srli_epi16(a, kCount);
  }
};

}  // namespace
