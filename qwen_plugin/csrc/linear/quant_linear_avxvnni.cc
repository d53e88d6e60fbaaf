// qwen::QuantLinear with AVX2 and AVX-VNNI.
#include "linear/quant_linear_kernels.h"
#include "vectors/lanes_avx2_eight.h"

namespace quant_linear {
namespace {

struct AvxVnni : Avx2Eight {
  static constexpr int kMaxRows[] = {6, 3}, kMostRows[] = {6, 3};
  static constexpr uint32_t kHighFactor = 16, kByteOffset = 0;  // high nibbles are used in place
  static constexpr bool kWeighsGroups = false;
  using BlockSum = Floats;

  static Ints AddWords(Ints c, Ints a, Ints b) { return _mm256_dpwssd_avx_epi32(c, a, b); }
  // As with AVX-512, the intrinsic costs moves.
  static Ints DotBytes(Ints c, Ints q, Ints a) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(q), "x"(a));
    return c;
  }

  static void SplitNibbles(Ints v, Ints* q) {
    q[0] = _mm256_and_si256(v, _mm256_set1_epi8(15));
    q[1] = _mm256_xor_si256(v, q[0]);
  }
  template <int kBits>
  static void LoadStep(const uint8_t* p, Ints* q) {
    if constexpr (kBits == 4) {
      SplitNibbles(LoadInts(p), q);
    } else {
      q[0] = LoadInts(p), q[1] = LoadInts(p + 64);
    }
  }
  template <int kBits>
  static void LoadZeroPoints(const uint8_t* p, Ints* q) {
    if constexpr (kBits == 4) {
      SplitNibbles(LoadBytes(p), q);
    } else {
      q[0] = LoadBytes(p), q[1] = LoadBytes(p + 16);
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
