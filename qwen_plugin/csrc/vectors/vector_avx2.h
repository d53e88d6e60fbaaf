// Eight float lanes with AVX2, FMA and F16C.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Avx2 {
  using Vector = __m256;
  using Words = __m256i;  // int16, two for each lane
  using Sums = __m256i;   // int32
  using Narrow = Avx2;    // vectors of at most 8 lanes, for what is left of a row
  static constexpr int kLanes = 8, kMaxRows = 6;

  static Vector Zero() { return _mm256_setzero_ps(); }
  static Vector Set1(float x) { return _mm256_set1_ps(x); }
  static Vector Load(const float* p) { return _mm256_loadu_ps(p); }
  static Vector Load(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void Store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static void Store(uint16_t* p, Vector v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void StoreWords(int16_t* p, Vector v) {  // rounded to whole numbers, that int16 can hold
    const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(v), _mm256_setzero_si256());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, _MM_SHUFFLE(3, 1, 2, 0))));
  }
  static Words LoadWords(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Words Repeat4(const int16_t* p) {  // the same four in every two lanes
    int64_t four;
    std::memcpy(&four, p, sizeof four);
    return _mm256_set1_epi64x(four);
  }
  static Sums ZeroSums() { return _mm256_setzero_si256(); }
  // Each lane's two products are added to its sum.
  static Sums AddProducts(Sums sum, Words a, Words b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  // Lanes 0 + 1, 2 + 3, ... of a, then of b.
  static Vector AddNeighbours(Sums a, Sums b) {
    return _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), _MM_SHUFFLE(3, 1, 2, 0)));
  }
  static Vector Add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector Mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  // a where a > b, else b: also b where a is NaN.
  static Vector Max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
  // 0 where a is 0, whatever b is.
  static Vector MulOrZero(Vector a, Vector b) {
    return _mm256_and_ps(_mm256_mul_ps(a, b), _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NEQ_UQ));
  }
  // |a| or b, of which NaN counts as the largest; b is no less than 0.
  static Vector MaxMagnitude(Vector a, Vector b) {
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epi32(magnitude, _mm256_castps_si256(b)));
  }
  static Vector Fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector Round(Vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // p * 2^n for whole n, or 0 where x < limit.
  static Vector Scale(Vector p, Vector n, Vector x, float limit) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    const Vector scaled = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    return _mm256_and_ps(scaled, _mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_NLT_UQ));
  }
  static float ReduceAdd(Vector v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static float ReduceMax(Vector v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  // The largest of lanes that are no less than 0, NaN before all.
  static float ReduceMaxMagnitude(Vector v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    const __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(two, _mm_shuffle_epi32(two, 1))));
  }
};

}  // namespace
