// qwen::QuantLinear with NEON and its dot product, SDOT. Its bytes all have signs: nibbles are multiplied as they are,
// bytes less 128.
#pragma GCC target("arch=armv8.2-a+dotprod")  // GCC before 14 wants more than the flag -mcpu=generic+dotprod
#include "linear/quant_linear_kernels.h"
#include "vectors/lanes_neon.h"

namespace quant_linear {
namespace {

// As quant_weight.h's UnpackStep wants them.
struct NeonBytes {
  using Bytes = uint8x16_t;
  static Bytes And(Bytes a, int mask) { return vandq_u8(a, vdupq_n_u8(uint8_t(mask))); }
  static Bytes Choose(int mask, Bytes a, Bytes b) { return vbslq_u8(vdupq_n_u8(uint8_t(mask)), a, b); }
  template <int kCount>
  static Bytes Left(Bytes a) {
    return vshlq_n_u8(a, kCount);
  }
  template <int kCount>
  static Bytes Right(Bytes a) {
    return vshrq_n_u8(a, kCount);
  }
};

struct NeonDot {
  using Lanes = NeonLanes;
  using Floats = float32x4_t;
  using Ints = int32x4_t;
  static constexpr int kLanes = 4, kMaxRows[] = {8, 4}, kMostRows[] = {8, 4};
  static constexpr bool kInPlace = false;
  static constexpr uint32_t kByteOffset = 128;
  static constexpr bool kWeighsGroups = false;
  using BlockSum = Floats;

  static void Store(float* p, Floats v) { vst1q_f32(p, v); }
  static Floats LoadHalves(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
  static Floats Set(float x) { return vdupq_n_f32(x); }
  static Floats Add(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats Mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats Fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats ToFloats(Ints a) { return vcvtq_f32_s32(a); }
  static Floats BitsToFloats(Ints a) { return vreinterpretq_f32_s32(a); }

  static Ints SetInts(int32_t x) { return vdupq_n_s32(x); }
  static Ints AddInts(Ints a, Ints b) { return vaddq_s32(a, b); }
  template <int kBits>
  static Ints ShiftLeft(Ints v) {
    return vshlq_n_s32(v, kBits);
  }
  static Ints AddWords(Ints c, Ints a, Ints b) { return vmlal_s16(c, vmovn_s32(a), vmovn_s32(b)); }

  static Ints LoadBytes(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, sizeof four);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
  }
  static Ints And(Ints v, int32_t mask) { return vandq_s32(v, vdupq_n_s32(mask)); }
  template <int kBits>
  static Ints ShiftRight(Ints v) {
    if constexpr (kBits == 0) return v;
    return vshrq_n_s32(v, kBits == 0 ? 1 : kBits);  // none is negative
  }

  template <int kBits>
  static void UnpackLines(const uint8x16_t* lines, int step, int8x16_t* q) {
    if constexpr (kBits == 4) {
      q[0] = vreinterpretq_s8_u8(vandq_u8(lines[0], vdupq_n_u8(15)));
      q[1] = vreinterpretq_s8_u8(vshrq_n_u8(lines[0], 4));
    } else if constexpr (kBits == 8) {
      UNROLL_FOR(h, 2) q[h] = vreinterpretq_s8_u8(veorq_u8(lines[h], vdupq_n_u8(kByteOffset)));
    } else {
      uint8x16_t bytes[2];
      UnpackStep<kBits, NeonBytes>(lines, step, bytes);
      q[0] = vreinterpretq_s8_u8(bytes[0]), q[1] = vreinterpretq_s8_u8(vshrq_n_u8(bytes[1], 8 - kBits));
    }
  }
  // With the four bytes in one lane of a, which is part of the instruction.
  static inline __attribute__((always_inline)) Ints DotLane(Ints c, int8x16_t q, int8x16_t a, int lane) {
    switch (lane) {
      case 0:
        return vdotq_laneq_s32(c, q, a, 0);
      case 1:
        return vdotq_laneq_s32(c, q, a, 1);
      case 2:
        return vdotq_laneq_s32(c, q, a, 2);
      default:
        return vdotq_laneq_s32(c, q, a, 3);
    }
  }
  template <int kBits, int kAll>
  static inline __attribute__((always_inline)) void Dot(const uint8_t* block, int64_t steps, int pass,
                                                        const int32_t* values, Ints (&sums)[kAll][2], Stream& stream) {
    constexpr int kFetch = FetchLines(kBits), kUnit = UnitSteps(kBits), kLines = UnitLines(kBits);
    block += pass * 4 * kLanes;
    uint8x16_t lines[kLines];
    for (int64_t j = 0; j < steps; j += 4, values += 4 * kAll) {
      int8x16_t a[kAll];  // of four steps
      UNROLL_FOR(r, kAll) a[r] = vreinterpretq_s8_s32(vld1q_s32(values + 4 * r));
      for (int i = 0; pass == 0 && i < 4 + (kUnit > 1 ? 4 / kUnit : 0); ++i) stream.Fetch<kFetch>();
      UNROLL_FOR(i, 4) {
        int8x16_t q[2];
        if (i % kUnit == 0) {
          UNROLL_FOR(l, kLines) lines[l] = vld1q_u8(block + l * kLineBytes);
          block += kLines * kLineBytes;
        }
        UnpackLines<kBits>(lines, i % kUnit, q);
        UNROLL_FOR(r, kAll)
        UNROLL_FOR(h, 2)
        sums[r][h] = DotLane(sums[r][h], q[h], a[(i * kAll + r) / 4], (i * kAll + r) % 4);
      }
    }
  }
};

}  // namespace

const Kernels kNeonDotKernels = MakeKernels<NeonDot>();

}  // namespace quant_linear
