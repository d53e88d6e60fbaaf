// qwen::QuantLinear in portable C++.
#include "linear/quant_linear_kernels.h"
#include "vectors/lanes_plain.h"

namespace quant_linear {
namespace {

struct Plain : PlainLanes {
  using Lanes = PlainLanes;
  static constexpr int kLanes = 16, kMaxRows[] = {4, 2}, kMostRows[] = {4, 2};
  static constexpr bool kInPlace = false;
  static constexpr uint32_t kByteOffset = 0;
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
  static Ints LoadBytes(const uint8_t* p) {
    Ints v;
    for (int i = 0; i < 16; ++i) v.lane[i] = p[i];
    return v;
  }
  static Ints And(Ints v, int32_t mask) {
    for (uint32_t& lane : v.lane) lane &= uint32_t(mask);
    return v;
  }
  template <int kBits>
  static Ints ShiftRight(Ints v) {
    for (uint32_t& lane : v.lane) lane >>= kBits;
    return v;
  }

  template <int kBits, int kAll>
  static void Dot(const uint8_t* group, int64_t steps, int, const int32_t* values, Ints (&sums)[kAll][2], Stream&) {
    for (int64_t j = 0; j < steps; ++j, values += kAll) {
      uint8_t q[2][2 * kPanel];
      UnpackAll<kBits>(group, j, q);
      for (int h = 0; h < 2; ++h)
        for (int r = 0; r < kAll; ++r) {
          int8_t a[4];
          std::memcpy(a, values + r, 4);
          for (int i = 0; i < 16; ++i)
            sums[r][h].lane[i] +=
                uint32_t(q[h][4 * i] * a[0] + q[h][4 * i + 1] * a[1] + q[h][4 * i + 2] * a[2] + q[h][4 * i + 3] * a[3]);
        }
    }
  }
};

}  // namespace

const Kernels kPlainKernels = MakeKernels<Plain>();

}  // namespace quant_linear
