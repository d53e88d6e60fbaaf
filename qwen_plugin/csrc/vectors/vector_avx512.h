// Sixteen float lanes with AVX-512 and its VNNI.
#pragma once
#include "vectors/vector_avx2.h"

namespace {

struct Avx512 {
  using Vector = __m512;
  using Words = __m512i;  // int16, two for each lane
  using Sums = __m512i;   // int32
  using Narrow = Avx2;    // vectors of at most 8 lanes, for what is left of a row
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
  static void StoreWords(int16_t* p, Vector v) {  // rounded to whole numbers, that int16 can hold
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)));
  }
  static Words LoadWords(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Words Repeat4(const int16_t* p) {  // the same four in every two lanes
    int64_t four;
    std::memcpy(&four, p, sizeof four);
    return _mm512_set1_epi64(four);
  }
  static Sums ZeroSums() { return _mm512_setzero_si512(); }
  // Each lane's two products are added to its sum.
  static Sums AddProducts(Sums sum, Words a, Words b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // g++ 12 keeps the intrinsic's sums on the stack
    return sum;
  }
  // Lanes 0 + 1, 2 + 3, ... of a, then of b.
  static Vector AddNeighbours(Sums a, Sums b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    return _mm512_cvtepi32_ps(
        _mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b)));
  }
  static Vector Add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector Mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  // a where a > b, else b: also b where a is NaN.
  static Vector Max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  // 0 where a is 0, whatever b is.
  static Vector MulOrZero(Vector a, Vector b) {
    return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ), a, b);
  }
  // |a| or b, of which NaN counts as the largest; b is no less than 0.
  static Vector MaxMagnitude(Vector a, Vector b) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epi32(magnitude, _mm512_castps_si512(b)));
  }
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
  // The largest of lanes that are no less than 0, NaN before all.
  static float ReduceMaxMagnitude(Vector v) {
    return Avx2::ReduceMaxMagnitude(Avx2::MaxMagnitude(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
  }
};

}  // namespace
