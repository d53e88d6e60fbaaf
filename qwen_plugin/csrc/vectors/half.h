#pragma once
#include <cstdint>
#include <cstring>

// A float16, exactly.
static inline float HalfToFloat(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu, sign = uint32_t(half & 0x8000u) << 16;
  float value = float(magnitude) * 5.9604644775390625e-8f;  // zero or subnormal: a multiple of 2^-24
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (magnitude >= 0x0400u) bits = (magnitude << 13) + ((magnitude >= 0x7c00u ? 224u : 112u) << 23);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}
