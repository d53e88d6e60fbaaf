// qwen::QuantLinear with AVX2 alone.
//
// Products of unsigned and signed bytes are added in pairs to 16 bits with saturation, so only nibbles are multiplied:
// 15 * 128 * 2 of a pair, and eight steps of them, stay below 2^15.
#include "lanes_avx2_eight.h"
#include "quant_linear_kernels.h"

namespace quant_linear {
namespace {

struct Avx2 : Avx2Eight {
  static constexpr int kMaxRows[] = {4, 2}, kMostRows[] = {4, 2};
  static constexpr uint32_t kHighFactor = 1, kByteOffset = 0;

  static Ints AddWords(Ints c, Ints a, Ints b) { return AddInts(c, _mm256_madd_epi16(a, b)); }
  static void SplitNibbles(Ints v, Ints* q) {
    const Ints mask = _mm256_set1_epi8(15);
    q[0] = _mm256_and_si256(v, mask);
    q[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
  }
  template <int kBits>
  static void LoadZeroPoints(const uint8_t* p, Ints* q) {
    if constexpr (kBits == 4) {
      SplitNibbles(LoadBytes(p), q);
    } else {
      q[0] = LoadBytes(p), q[1] = LoadBytes(p + 16);
    }
  }

  // Adds eight steps' products with the low and the high nibbles of a line, in words.
  template <int kStepBytes, int kAll>
  static inline __attribute__((always_inline)) void EightSteps(const uint8_t* line, const int32_t* values,
                                                               Ints (&words)[kAll][2]) {
    UNROLL_FOR(r, kAll) words[r][0] = words[r][1] = _mm256_setzero_si256();
    for (int j = 0; j < 8; ++j, line += kStepBytes, values += kAll) {
      Ints q[2];
      SplitNibbles(LoadInts(line), q);
      UNROLL_FOR(r, kAll)
      UNROLL_FOR(i, 2) words[r][i] = _mm256_add_epi16(words[r][i], _mm256_maddubs_epi16(q[i], SetInts(values[r])));
    }
  }

  template <int kBits, int kAll>
  static inline __attribute__((always_inline)) void Dot(const uint8_t* block, int64_t steps, int pass,
                                                        const int32_t* values, Ints (&sums)[kAll][2], Stream& stream) {
    constexpr int kStepBytes = 16 * kBits;
    const Ints one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
    block += pass * 32;
    for (int64_t j = 0; j < steps; j += 8, block += 8 * kStepBytes, values += 8 * kAll) {
      for (int i = 0; pass == 0 && i < 8; ++i) stream.Fetch<kStepBytes / 64>();
      Ints words[kAll][2];
      if constexpr (kBits == 4) {
        EightSteps<kStepBytes>(block, values, words);
        UNROLL_FOR(r, kAll) UNROLL_FOR(h, 2) sums[r][h] = AddInts(sums[r][h], _mm256_madd_epi16(words[r][h], one));
      } else {
        UNROLL_FOR(h, 2) {
          EightSteps<kStepBytes>(block + 64 * h, values, words);
          UNROLL_FOR(r, kAll)
          sums[r][h] = AddInts(sums[r][h],
                               AddInts(_mm256_madd_epi16(words[r][0], one), _mm256_madd_epi16(words[r][1], sixteen)));
        }
      }
    }
  }
};

}  // namespace

const Kernels kAvx2Kernels = MakeKernels<Avx2>();

}  // namespace quant_linear
