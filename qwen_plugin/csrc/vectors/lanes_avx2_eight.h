// Eight lanes with AVX2: what the products of qwen::QuantLinear need of them.
#pragma once
#include "vectors/lanes_avx2.h"

namespace {

struct Avx2Eight {
  using Lanes = Avx2Lanes;
  using Floats = __m256;
  using Ints = __m256i;
  static constexpr int kLanes = 8;

  static void Store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static Floats LoadHalves(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Floats Set(float x) { return _mm256_set1_ps(x); }
  static Floats Add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats Mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats Fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats ToFloats(Ints a) { return _mm256_cvtepi32_ps(a); }
  static Floats BitsToFloats(Ints a) { return _mm256_castsi256_ps(a); }

  static Ints LoadInts(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Ints LoadBytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Ints SetInts(int32_t x) { return _mm256_set1_epi32(x); }
  static Ints AddInts(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  // Of bytes, as LoadBytes has them: the mask is that of UnpackLines, or the compiler broadcasts it at every step.
  static Ints And(Ints v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8(char(mask))); }
  template <int kBits>
  static Ints ShiftLeft(Ints v) {
    return _mm256_slli_epi32(v, kBits);
  }
  template <int kBits>
  static Ints ShiftRight(Ints v) {
    return _mm256_srli_epi32(v, kBits);
  }
};

// The 32 bytes of a vector, as quant_weight.h's UnpackStep wants them.
struct Avx2Bytes {
  using Bytes = __m256i;
  static Bytes And(Bytes a, int mask) { return _mm256_and_si256(a, _mm256_set1_epi8(char(mask))); }
  static Bytes Choose(int mask, Bytes a, Bytes b) {
    return _mm256_or_si256(And(a, mask), _mm256_andnot_si256(_mm256_set1_epi8(char(mask)), b));
  }
  template <int kCount>
  static Bytes Left(Bytes a) {
    return _mm256_slli_epi16(a, kCount);
  }
  template <int kCount>
  static Bytes Right(Bytes a) {
    return _mm256_srli_epi16(a, kCount);
  }
};

}  // namespace
