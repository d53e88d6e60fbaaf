// qwen::QuantLinear with AVX-512 VNNI.
#include "linear/quant_linear_kernels.h"
#include "vectors/lanes_avx512.h"

namespace quant_linear {
namespace {

struct Avx512Vnni : Avx512Lanes {
  using Lanes = Avx512Lanes;
  static constexpr int kLanes = 16, kMaxRows[] = {6, 4}, kMostRows[] = {8, 4};
  static constexpr bool kInPlace = true;
  static constexpr uint32_t kByteOffset = 0;
  static constexpr bool kWeighsGroups = false;
  using BlockSum = Floats;

  static Ints SetInts(int32_t x) { return _mm512_set1_epi32(x); }
  static Floats BitsToFloats(Ints v) { return _mm512_castsi512_ps(v); }
  template <int kBits>
  static Ints ShiftLeft(Ints v) {
    return _mm512_slli_epi32(v, kBits);
  }
  // c + a * b of the low words, which have signs.
  static Ints AddWords(Ints c, Ints a, Ints b) { return _mm512_dpwssd_epi32(c, a, b); }
  // The intrinsic makes GCC 12 move sums between registers and memory, which costs up to half of the speed.
  static Ints DotBytes(Ints c, Ints q, Ints a) {
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(q), "v"(a));
    return c;
  }

  static Ints LoadInts(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Ints LoadBytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // Of bytes, as LoadBytes has them: the mask is that of UnpackLines, or the compiler broadcasts it at every step.
  static Ints And(Ints v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8(char(mask))); }
  template <int kCount>
  static Ints ShiftRight(Ints v) {
    return _mm512_srli_epi32(v, kCount);
  }
  template <int kBits>
  static void UnpackLines(const Ints* lines, int step, Ints* q) {
    if constexpr (kBits == 4) {
      q[0] = _mm512_and_si512(lines[0], _mm512_set1_epi8(15));
      q[1] = _mm512_xor_si512(lines[0], q[0]);
    } else if constexpr (kBits == 8) {
      q[0] = lines[0], q[1] = lines[1];
    } else {
      UnpackStep<kBits, Avx512Bytes>(lines, step, q);
    }
  }
  template <int kBits, int kAll>
  static inline __attribute__((always_inline)) void Dot(const uint8_t* block, int64_t steps, int pass,
                                                        const int32_t* values, Ints (&sums)[kAll][2], Stream& stream) {
    DotInOne<Avx512Vnni, kBits, kAll>(block, steps, pass, values, sums, stream);
  }
};

}  // namespace

const Kernels kAvx512VnniKernels = MakeKernels<Avx512Vnni>();

}  // namespace quant_linear
