// Sixteen float lanes with NEON; see lanes_plain.h.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace {

struct NeonLanes {
  struct Floats {
    float32x4_t four[4];
  };
  struct Ints {
    int32x4_t four[4];
  };

  static Floats Load(const float* p) {
    return Each<Floats>([&](int i) { return vld1q_f32(p + 4 * i); });
  }
  static void Store(float* p, Floats v) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.four[i]);
  }
  static Floats LoadHalves(const uint8_t* p) {
    return Each<Floats>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i))); });
  }
  static Floats Set(float x) {
    return Each<Floats>([&](int) { return vdupq_n_f32(x); });
  }
  static Floats Add(Floats a, Floats b) {
    return Each<Floats>([&](int i) { return vaddq_f32(a.four[i], b.four[i]); });
  }
  static Floats Mul(Floats a, Floats b) {
    return Each<Floats>([&](int i) { return vmulq_f32(a.four[i], b.four[i]); });
  }
  static Floats Div(Floats a, Floats b) {
    return Each<Floats>([&](int i) { return vdivq_f32(a.four[i], b.four[i]); });
  }
  static Floats Fma(Floats a, Floats b, Floats c) {
    return Each<Floats>([&](int i) { return vfmaq_f32(c.four[i], a.four[i], b.four[i]); });
  }
  static Floats Max(Floats a, Floats b) {  // the instruction for it returns NaN where a is
    return Each<Floats>([&](int i) { return vbslq_f32(vcgtq_f32(a.four[i], b.four[i]), a.four[i], b.four[i]); });
  }
  static Floats Negate(Floats a) {
    return Each<Floats>([&](int i) { return vnegq_f32(a.four[i]); });
  }
  static Ints Round(Floats a) {
    return Each<Ints>([&](int i) { return vcvtnq_s32_f32(a.four[i]); });
  }
  static Floats ToFloats(Ints a) {
    return Each<Floats>([&](int i) { return vcvtq_f32_s32(a.four[i]); });
  }
  static Floats PowerOfTwo(Ints n) {
    return Each<Floats>(
        [&](int i) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.four[i], vdupq_n_s32(127)), 23)); });
  }
  static float Sum(Floats v) {
    const float32x4_t four = vaddq_f32(vaddq_f32(v.four[0], v.four[2]), vaddq_f32(v.four[1], v.four[3]));
    return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
  }

  static Ints Zero() {
    return Each<Ints>([](int) { return vdupq_n_s32(0); });
  }
  static Ints MagnitudeBits(Floats a) {
    return Each<Ints>([&](int i) { return vreinterpretq_s32_f32(vabsq_f32(a.four[i])); });
  }
  static Ints MaxInts(Ints a, Ints b) {
    return Each<Ints>([&](int i) { return vmaxq_s32(a.four[i], b.four[i]); });
  }
  static Ints AddInts(Ints a, Ints b) {
    return Each<Ints>([&](int i) { return vaddq_s32(a.four[i], b.four[i]); });
  }
  static Ints SubInts(Ints a, Ints b) {
    return Each<Ints>([&](int i) { return vsubq_s32(a.four[i], b.four[i]); });
  }
  static Ints HighPart(Ints a) {
    return Each<Ints>([&](int i) { return vandq_s32(vaddq_s32(a.four[i], vdupq_n_s32(128)), vdupq_n_s32(~255)); });
  }
  static int32_t SumInts(Ints v) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(v.four[0], v.four[1]), vaddq_s32(v.four[2], v.four[3])));
  }
  static int32_t MaxOfInts(Ints v) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(v.four[0], v.four[1]), vmaxq_s32(v.four[2], v.four[3])));
  }
  template <int kShift>
  static void StoreBytes(int8_t* p, Ints v) {
    static_assert(kShift == 0 || kShift == 8, "the even or the odd bytes of the low words");
    const auto low_words = [](int32x4_t a, int32x4_t b) {
      return vreinterpretq_s8_s16(vuzp1q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
    };
    const int8x16_t first = low_words(v.four[0], v.four[1]), second = low_words(v.four[2], v.four[3]);
    vst1q_s8(p, kShift == 0 ? vuzp1q_s8(first, second) : vuzp2q_s8(first, second));
  }
  static Ints Column(const uint8_t* p, int column, int shift, uint32_t mask) {
    const int32x4_t count = vdupq_n_s32(-(8 * column + shift));  // to the right
    return Each<Ints>([&](int i) {
      const uint32x4_t bits = vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(p + 16 * i)), count);
      return vreinterpretq_s32_u32(vandq_u32(bits, vdupq_n_u32(mask)));
    });
  }

 private:
  template <class Vector, class Function>
  static Vector Each(Function function) {
    return {function(0), function(1), function(2), function(3)};
  }
};

}  // namespace
