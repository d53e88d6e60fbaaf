// qwen::QuantLinear in portable C++.
#include "linear/quant_linear_kernels.h"
#include "vectors/lanes_plain.h"

namespace quant_linear {
namespace {

struct Plain : PlainLanes {
  using Lanes = PlainLanes;
  static constexpr int kLanes = 16, kMaxRows[] = {4, 2}, kMostRows[] = {4, 2};
  static constexpr uint32_t kHighFactor = 1, kByteOffset = 0;
  static constexpr bool kWeighsGroups = false;
  using BlockSum = Floats;

  static Ints SetInts(int32_t x) {
    Ints v;
    for (uint32_t& lane : v.lane) lane = uint32_t(x);
    return v;
  }
  static Floats BitsToFloats(Ints v) {
    Floats floats;
    std::memcpy(&floats, &v, sizeof v);
    return floats;
  }
  template <int kBits>
  static Ints ShiftLeft(Ints v) {
    for (uint32_t& lane : v.lane) lane <<= kBits;
    return v;
  }
  static Ints AddWords(Ints c, Ints a, Ints b) {
    for (int i = 0; i < 16; ++i) c.lane[i] += uint32_t(int16_t(a.lane[i]) * int16_t(b.lane[i]));
    return c;
  }
  template <int kBits>
  static void LoadZeroPoints(const uint8_t* p, Ints* q) {
    for (int i = 0; i < 16; ++i) {
      q[0].lane[i] = kBits == 4 ? p[i] & 15u : p[i];
      q[1].lane[i] = kBits == 4 ? p[i] >> 4 : p[i + 16];
    }
  }

  template <int kBits, int kAll>
  static void Dot(const uint8_t* block, int64_t steps, int, const int32_t* values, Ints (&sums)[kAll][2], Stream&) {
    for (int64_t j = 0; j < steps; ++j, block += 16 * kBits, values += kAll)
      for (int h = 0; h < 2; ++h) {
        int16_t q[64];
        for (int i = 0; i < 64; ++i) q[i] = kBits == 8 ? block[64 * h + i] : h == 0 ? block[i] & 15 : block[i] >> 4;
        for (int r = 0; r < kAll; ++r) {
          int8_t a[4];
          std::memcpy(a, values + r, 4);
          for (int i = 0; i < 16; ++i)
            sums[r][h].lane[i] +=
                uint32_t(q[4 * i] * a[0] + q[4 * i + 1] * a[1] + q[4 * i + 2] * a[2] + q[4 * i + 3] * a[3]);
        }
      }
  }
};

}  // namespace

const Kernels kPlainKernels = MakeKernels<Plain>();

}  // namespace quant_linear
