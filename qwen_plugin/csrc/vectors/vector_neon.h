// Four float lanes with NEON.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace {

struct Neon {
  using Vector = float32x4_t;
  using Words = int16x8_t;  // two for each of lanes 0, 1, 2, 3 in the order 0, 2, 1, 3
  using Sums = int32x4_t;   // lanes 0 and 1 of the others hold one sum in two parts, and so do 2 and 3
  using Narrow = Neon;      // vectors of at most 8 lanes, for what is left of a row
  static constexpr int kLanes = 4, kMaxRows = 8;

  static Vector Zero() { return vdupq_n_f32(0.f); }
  static Vector Set1(float x) { return vdupq_n_f32(x); }
  static Vector Load(const float* p) { return vld1q_f32(p); }
  static Vector Load(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void Store(float* p, Vector v) { vst1q_f32(p, v); }
  static void Store(uint16_t* p, Vector v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  static void StoreWords(int16_t* p, Vector v) {  // rounded to whole numbers, that int16 can hold
    vst1_s16(p, vmovn_s32(vcvtnq_s32_f32(v)));
  }
  static Words LoadWords(const int8_t* p) {
    const int8x8_t order = vcreate_s8(0x0706030205040100);
    return vmovl_s8(vtbl1_s8(vld1_s8(p), order));
  }
  static Words Repeat4(const int16_t* p) {  // the same four in every two lanes
    const int32x2_t pairs = vreinterpret_s32_s16(vld1_s16(p));
    const int32x4_t low = vcombine_s32(pairs, vdup_n_s32(0));
    return vreinterpretq_s16_s32(vzip1q_s32(low, low));
  }
  static Sums ZeroSums() { return vdupq_n_s32(0); }
  // The products of two neighbouring lanes are added to their two parts of a sum.
  static Sums AddProducts(Sums sum, Words a, Words b) {
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
  }
  // Lanes 0 + 1, 2 + 3 of a, then of b.
  static Vector AddNeighbours(Sums a, Sums b) { return vcvtq_f32_s32(vpaddq_s32(a, b)); }
  static Vector Add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static Vector Mul(Vector a, Vector b) { return vmulq_f32(a, b); }
  // a where a > b, else b: also b where a is NaN.
  static Vector Max(Vector a, Vector b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  // 0 where a is 0, whatever b is.
  static Vector MulOrZero(Vector a, Vector b) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(vmulq_f32(a, b)), vceqzq_f32(a)));
  }
  // |a| or b, of which NaN counts as the largest; b is no less than 0.
  static Vector MaxMagnitude(Vector a, Vector b) {
    return vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(vabsq_f32(a)), vreinterpretq_s32_f32(b)));
  }
  static Vector Fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
  static Vector Round(Vector x) { return vrndnq_f32(x); }
  // p * 2^n for whole n, or 0 where x < limit.
  static Vector Scale(Vector p, Vector n, Vector x, float limit) {
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
    const Vector scaled = vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(scaled), vcltq_f32(x, vdupq_n_f32(limit))));
  }
  static float ReduceAdd(Vector v) { return vpadds_f32(vadd_f32(vget_low_f32(v), vget_high_f32(v))); }
  static float ReduceMax(Vector v) { return vmaxvq_f32(v); }
  // The largest of lanes that are no less than 0, NaN before all.
  static float ReduceMaxMagnitude(Vector v) {
    const int32x4_t bits = vreinterpretq_s32_f32(v);
    return vgetq_lane_f32(vreinterpretq_f32_s32(vdupq_n_s32(vmaxvq_s32(bits))), 0);
  }
};

}  // namespace
