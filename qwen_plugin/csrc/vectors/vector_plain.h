// Four float lanes in portable C++ (GCC and Clang vector extensions).
//
// Like the other vector headers, included by exactly one instruction set's sources: everything has internal
// linkage, so that the linker can never pick code compiled for a larger instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#include "vectors/half.h"

namespace {

inline uint16_t FloatToHalf(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));  // NaN stays NaN
  if (magnitude >= 0x47800000u) return uint16_t(sign | 0x7c00u);                              // 65536 and more
  uint32_t drop = 13, mantissa = magnitude - (112u << 23);
  if (magnitude < 0x38800000u) {  // a subnormal half
    if (magnitude < 0x33000000u) return uint16_t(sign);
    drop = 126 - (magnitude >> 23);
    mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  }
  const uint32_t rest = mantissa & ((1u << drop) - 1), tie = 1u << (drop - 1);
  const uint32_t half = mantissa >> drop;
  return uint16_t(sign | (half + (rest > tie || (rest == tie && (half & 1)))));
}

struct Plain {
  typedef float Vector __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef int16_t Words __attribute__((vector_size(16)));  // two for each lane
  typedef int32_t Sums __attribute__((vector_size(16)));
  using Narrow = Plain;  // vectors of at most 8 lanes, for what is left of a row
  static constexpr int kLanes = 4, kMaxRows = 4;

  static Vector Zero() { return Vector{}; }
  static Vector Set1(float x) { return Vector{x, x, x, x}; }
  static Vector Load(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static Vector Load(const uint16_t* p) {
    return Vector{HalfToFloat(p[0]), HalfToFloat(p[1]), HalfToFloat(p[2]), HalfToFloat(p[3])};
  }
  static void Store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }
  static void Store(uint16_t* p, Vector v) {
    for (int i = 0; i < kLanes; ++i) p[i] = FloatToHalf(v[i]);
  }
  static void StoreWords(int16_t* p, Vector v) {  // rounded to whole numbers, that int16 can hold
    const Bits whole = (Bits)(v + kMagic) - 0x4b400000u;
    for (int i = 0; i < kLanes; ++i) p[i] = int16_t(whole[i]);
  }
  static Words LoadWords(const int8_t* p) { return Words{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}; }
  static Words Repeat4(const int16_t* p) { return Words{p[0], p[1], p[2], p[3], p[0], p[1], p[2], p[3]}; }
  static Sums ZeroSums() { return Sums{}; }
  // Each lane's two products are added to its sum.
  static Sums AddProducts(Sums sum, Words a, Words b) {
    for (int i = 0; i < kLanes; ++i) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
  }
  // Lanes 0 + 1, 2 + 3 of a, then of b.
  static Vector AddNeighbours(Sums a, Sums b) {
    return Vector{float(a[0] + a[1]), float(a[2] + a[3]), float(b[0] + b[1]), float(b[2] + b[3])};
  }
  static Vector Add(Vector a, Vector b) { return a + b; }
  static Vector Mul(Vector a, Vector b) { return a * b; }
  // a where a > b, else b: also b where a is NaN.
  static Vector Max(Vector a, Vector b) {
    Vector m;
    for (int i = 0; i < kLanes; ++i) m[i] = a[i] > b[i] ? a[i] : b[i];
    return m;
  }
  // 0 where a is 0, whatever b is.
  static Vector MulOrZero(Vector a, Vector b) { return (Vector)((Bits)(a * b) & (Bits)(a != Zero())); }
  // |a| or b, of which NaN counts as the largest; b is no less than 0.
  static Vector MaxMagnitude(Vector a, Vector b) {
    const Sums magnitude = (Sums)((Bits)a & 0x7fffffffu), other = (Sums)b;
    const Sums larger = magnitude > other;
    return (Vector)((magnitude & larger) | (other & ~larger));
  }
  // Rounded once, as everywhere: a call of the C library where the processor may lack the instruction.
  static Vector Fma(Vector a, Vector b, Vector c) {
    Vector r;
    for (int i = 0; i < kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
  }
  static Vector Round(Vector x) { return (x + kMagic) - kMagic; }
  // p * 2^n for whole n, or 0 where x < limit.
  static Vector Scale(Vector p, Vector n, Vector x, float limit) {
    const Bits exponent = (Bits)(n + kMagic) - 0x4b400000u + 127u;
    const Vector scaled = p * (Vector)(exponent << 23);
    return (Vector)((Bits)scaled & ~(Bits)(x < Set1(limit)));
  }
  static float ReduceAdd(Vector v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static float ReduceMax(Vector v) {
    float m = v[0];
    for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
    return m;
  }
  // The largest of lanes that are no less than 0, NaN before all.
  static float ReduceMaxMagnitude(Vector v) {
    Vector most = Zero();
    for (int i = 0; i < kLanes; ++i) most = MaxMagnitude(Set1(v[i]), most);
    return most[0];
  }

 private:
  static constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it leaves a whole number in the low bits
};

}  // namespace
