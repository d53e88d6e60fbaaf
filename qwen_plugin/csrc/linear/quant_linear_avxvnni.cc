// qwen::QuantLinear with AVX2 and AVX-VNNI.
#include "linear/quant_linear_kernels.h"
#include "vectors/lanes_avx2_eight.h"

namespace quant_linear {
namespace {

struct AvxVnni : Avx2Eight {
  static constexpr int kMaxRows[] = {6, 3}, kMostRows[] = {6, 3};
  static constexpr bool kInPlace = true;
  static constexpr uint32_t kByteOffset = 0;
  static constexpr bool kWeighsGroups = false;
  using BlockSum = Floats;

  static Ints AddWords(Ints c, Ints a, Ints b) { return _mm256_dpwssd_avx_epi32(c, a, b); }
  // As with AVX-512, the intrinsic costs moves.
  static Ints DotBytes(Ints c, Ints q, Ints a) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(q), "x"(a));
    return c;
  }

  template <int kBits>
  static void UnpackLines(const Ints* lines, int step, Ints* q) {
    if constexpr (kBits == 4) {
      q[0] = _mm256_and_si256(lines[0], _mm256_set1_epi8(15));
      q[1] = _mm256_xor_si256(lines[0], q[0]);
    } else if constexpr (kBits == 8) {
      q[0] = lines[0], q[1] = lines[1];
    } else {
      UnpackStep<kBits, Avx2Bytes>(lines, step, q);
    }
  }
  template <int kBits, int kAll>
  static inline __attribute__((always_inline)) void Dot(const uint8_t* block, int64_t steps, int pass,
                                                        const int32_t* values, Ints (&sums)[kAll][2], Stream& stream) {
    DotInOne<AvxVnni, kBits, kAll>(block, steps, pass, values, sums, stream);
  }
};

}  // namespace

const Kernels kAvxVnniKernels = MakeKernels<AvxVnni>();

}  // namespace quant_linear
