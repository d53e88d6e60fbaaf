// Sixteen float lanes in portable C++. All lanes_*.h give the same bits.
//
// Like the others, included by exactly one instruction set's sources: everything has internal linkage, so that
// the linker can never pick code compiled for a larger instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#include "vectors/half.h"

namespace {

struct PlainLanes {
  struct Floats {
    float lane[16];
  };
  struct Ints {
    uint32_t lane[16];  // two's complement: what wraps is not undefined
  };

  static Floats Load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void Store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
  static Floats LoadHalves(const uint8_t* p) {
    uint16_t half[16];
    std::memcpy(half, p, sizeof half);
    return Each([&](int i) { return HalfToFloat(half[i]); });
  }
  static Floats Set(float x) {
    return Each([&](int) { return x; });
  }
  static Floats Add(Floats a, Floats b) {
    return Each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Floats Mul(Floats a, Floats b) {
    return Each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Floats Div(Floats a, Floats b) {
    return Each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static Floats Fma(Floats a, Floats b, Floats c) {
    return Each([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
  }
  // a where a > b, else b: also b where a is NaN.
  static Floats Max(Floats a, Floats b) {
    return Each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Floats Negate(Floats a) {
    return Each([&](int i) { return -a.lane[i]; });
  }
  // To the nearest whole number, below 2^22 and not NaN; else anything.
  static Ints Round(Floats a) {
    Ints v;
    for (int i = 0; i < 16; ++i) {
      const float shifted = a.lane[i] + 12582912.f;  // 1.5 * 2^23 leaves the number in the low bits
      std::memcpy(&v.lane[i], &shifted, 4);
      v.lane[i] -= 0x4b400000u;
    }
    return v;
  }
  static Floats ToFloats(Ints a) {
    return Each([&](int i) { return float(int32_t(a.lane[i])); });
  }
  // 2^n for n from -126 to 127.
  static Floats PowerOfTwo(Ints n) {
    return Each([&](int i) {
      const uint32_t bits = (n.lane[i] + 127u) << 23;
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    });
  }
  static float Sum(Floats v) {
    for (int half = 8; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) v.lane[i] += v.lane[i + half];
    return v.lane[0];
  }

  static Ints Zero() { return Ints{}; }
  static Ints MagnitudeBits(Floats a) {
    Ints v;
    std::memcpy(&v, &a, sizeof v);
    for (uint32_t& bits : v.lane) bits &= 0x7fffffffu;
    return v;
  }
  static Ints MaxInts(Ints a, Ints b) {  // neither negative
    for (int i = 0; i < 16; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  static Ints AddInts(Ints a, Ints b) {
    for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Ints SubInts(Ints a, Ints b) {
    for (int i = 0; i < 16; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  // 256 * rint(a / 256), with ties upwards.
  static Ints HighPart(Ints a) {
    for (uint32_t& lane : a.lane) lane = (lane + 128u) & ~255u;
    return a;
  }
  static int32_t SumInts(Ints v) {
    uint32_t sum = 0;
    for (const uint32_t lane : v.lane) sum += lane;
    return int32_t(sum);
  }
  static int32_t MaxOfInts(Ints v) {
    uint32_t most = 0;
    for (const uint32_t lane : v.lane) most = lane > most ? lane : most;
    return int32_t(most);
  }
  // Bits kShift to kShift + 7 of every lane.
  template <int kShift>
  static void StoreBytes(int8_t* p, Ints v) {
    for (int i = 0; i < 16; ++i) p[i] = int8_t(uint8_t(v.lane[i] >> kShift));
  }
  // (byte 4i + column of 64 >> shift) & mask
  static Ints Column(const uint8_t* p, int column, int shift, uint32_t mask) {
    Ints v;
    for (int i = 0; i < 16; ++i) v.lane[i] = (uint32_t(p[4 * i + column]) >> shift) & mask;
    return v;
  }

 private:
  template <class Function>
  static Floats Each(Function function) {
    Floats v;
    for (int i = 0; i < 16; ++i) v.lane[i] = function(i);
    return v;
  }
};

}  // namespace
