// Sixteen float lanes with AVX-512.
#pragma once
#include "vector_avx2.h"

namespace {

struct Avx512 {
  using Vector = __m512;
  using Narrow = Avx2;  // vectors of at most 8 lanes, for what is left of a row
  static constexpr int kLanes = 16, kMaxRows = 12;

  static Vector Zero() { return _mm512_setzero_ps(); }
  static Vector Set1(float x) { return _mm512_set1_ps(x); }
  static Vector Load(const float* p) { return _mm512_loadu_ps(p); }
  static Vector Load(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void Store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static void Store(uint16_t* p, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static Vector Add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector Mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  // a where a > b, else b: also b where a is NaN.
  static Vector Max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static Vector Fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector Round(Vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // p * 2^n for whole n, or 0 where x < limit.
  static Vector Scale(Vector p, Vector n, Vector x, float limit) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), p, n);
  }
  static float ReduceAdd(Vector v) {
    return Avx2::ReduceAdd(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
  }
  static float ReduceMax(Vector v) {
    return Avx2::ReduceMax(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
  }
};

}  // namespace
