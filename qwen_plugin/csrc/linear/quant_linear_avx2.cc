// qwen::QuantLinear with AVX2 alone.
//
// Products of unsigned and signed bytes are added in pairs to 16 bits with saturation, so bytes are multiplied nibble
// by nibble: 15 * 128 * 2 of a pair, and eight steps of them, stay below 2^15. So do those less their zero points:
// where scales are of blocks, words start from these, and what takes them to 32 bits multiplies with the group's
// multiples. Of 5 and 6 bits, so do the steps of a unit, four or two, that have no zero points yet.
#include "linear/quant_linear_kernels.h"
#include "vectors/lanes_avx2_eight.h"

namespace quant_linear {
namespace {

struct Avx2 : Avx2Eight {
  static constexpr int kMaxRows[] = {4, 2}, kMostRows[] = {4, 2};
  static constexpr bool kInPlace = false;
  static constexpr uint32_t kByteOffset = 0;
  static constexpr bool kWeighsGroups = true;
  using BlockSum = Ints;

  static Ints AddWords(Ints c, Ints a, Ints b) { return AddInts(c, _mm256_madd_epi16(a, b)); }
  static void SplitNibbles(Ints v, Ints* q) {
    const Ints mask = _mm256_set1_epi8(15);
    q[0] = _mm256_and_si256(v, mask);
    q[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
  }

  // Were the sum an intrinsic too, GCC 12 would add products up in another order and keep all of them in memory.
  static inline __attribute__((always_inline)) void AddBytes(Ints& words, Ints q, Ints a) {
    const Ints products = _mm256_maddubs_epi16(q, a);
    asm("vpaddw %1, %0, %0" : "+x"(words) : "x"(products));
  }
  template <int kAll>
  static inline __attribute__((always_inline)) void Clear(Ints (&words)[kAll][2]) {
    UNROLL_FOR(r, kAll) words[r][0] = words[r][1] = _mm256_setzero_si256();
  }
  // Adds eight steps' products with the low and the high nibbles of a line, in words.
  template <int kStepBytes, int kAll>
  static inline __attribute__((always_inline)) void EightSteps(const uint8_t* line, const int32_t* values,
                                                               Ints (&words)[kAll][2]) {
    UNROLL_FOR(j, 8) {
      Ints q[2];
      SplitNibbles(LoadInts(line + j * kStepBytes), q);
      UNROLL_FOR(r, kAll) {
        const Ints a = SetInts(values[j * kAll + r]);
        UNROLL_FOR(i, 2) AddBytes(words[r][i], q[i], a);
      }
    }
  }
  // Adds a unit's products, of 5 or 6 bits.
  template <int kBits, int kAll>
  static inline __attribute__((always_inline)) void AddUnit(const uint8_t* unit, const int32_t* values,
                                                            Ints (&words)[kAll][2]) {
    Ints lines[UnitLines(kBits)];
    UNROLL_FOR(i, UnitLines(kBits)) lines[i] = LoadInts(unit + i * 64);
    UNROLL_FOR(j, UnitSteps(kBits)) {
      Ints q[2];
      UnpackStep<kBits, Avx2Bytes>(lines, j, q);
      q[1] = _mm256_srli_epi16(q[1], 8 - kBits);  // the bits that leave a byte are 0
      UNROLL_FOR(r, kAll) {
        const Ints a = SetInts(values[j * kAll + r]);
        UNROLL_FOR(i, 2) AddBytes(words[r][i], q[i], a);
      }
    }
  }
  // What eight steps read.
  template <int kBits>
  static inline __attribute__((always_inline)) void FetchEight(int pass, Stream& stream) {
    constexpr int kTimes = kBits == 5 ? 5 : 4, kFetches = kBits == 8 ? 8 : 2 * kBits;
    if (pass > 0 || stream.IsDone()) return;
    for (int i = 0; i < kFetches; i += kTimes) stream.Fetch<FetchLines(kBits), kTimes>();
  }

  template <int kBits, int kAll>
  static inline __attribute__((always_inline)) void Dot(const uint8_t* block, int64_t steps, int pass,
                                                        const int32_t* values, Ints (&sums)[kAll][2], Stream& stream) {
    constexpr int kStepBytes = 16 * kBits, kUnit = UnitSteps(kBits);
    const Ints one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
    block += pass * 32;
    for (int64_t j = 0; j < steps; j += 8, block += 8 * kStepBytes, values += 8 * kAll) {
      FetchEight<kBits>(pass, stream);
      Ints words[kAll][2];
      if constexpr (kBits == 4) {
        Clear(words);
        EightSteps<kStepBytes>(block, values, words);
        UNROLL_FOR(r, kAll) UNROLL_FOR(h, 2) sums[r][h] = AddInts(sums[r][h], _mm256_madd_epi16(words[r][h], one));
      } else if constexpr (kUnit > 1) {
        UNROLL_FOR(u, 8 / kUnit) {
          Clear(words);
          AddUnit<kBits>(block + u * kUnit * kStepBytes, values + u * kUnit * kAll, words);
          UNROLL_FOR(r, kAll) UNROLL_FOR(h, 2) sums[r][h] = AddInts(sums[r][h], _mm256_madd_epi16(words[r][h], one));
        }
      } else {
        UNROLL_FOR(h, 2) {
          Clear(words);
          EightSteps<kStepBytes>(block + 64 * h, values, words);
          UNROLL_FOR(r, kAll)
          sums[r][h] = AddInts(sums[r][h],
                               AddInts(_mm256_madd_epi16(words[r][0], one), _mm256_madd_epi16(words[r][1], sixteen)));
        }
      }
    }
  }

  // Less the sums of 32 columns: of all first and second ones of their fours, and of all third and fourth ones.
  static uint32_t Start(const int8_t* a) {
    const Ints pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), LoadInts(reinterpret_cast<const uint8_t*>(a)));
    __m128i sums = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0x4e));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0xb1));
    return uint32_t(_mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), sums)));
  }
  // The low and the high nibbles of eight bytes, each twice, in words.
  static void LoadNibbleWords(const uint8_t* p, Ints* out) {
    int64_t bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    const Ints twice = _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,  //
                                        4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1);
    const Ints words = _mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), twice);
    out[0] = _mm256_and_si256(words, _mm256_set1_epi16(15));
    out[1] = _mm256_srli_epi16(words, 4);
  }

  // Adds a group's dots, times its multiples, to sums.
  template <int kBits, bool kSymmetric, int kAll>
  static inline __attribute__((always_inline)) void DotWeighed(const uint8_t* block, int64_t steps, int pass,
                                                               const int32_t* values, const uint8_t* zero_bytes,
                                                               const uint8_t* numbers, Ints (&sums)[kAll][2],
                                                               Stream& stream) {
    constexpr int kStepBytes = 16 * kBits, kUnit = UnitSteps(kBits), kLess1 = (256 >> kBits) - 1;
    const int32_t* starts = values + steps * kAll;
    Ints zero_points[2], multiples[2];
    zero_points[0] = zero_points[1] = _mm256_set1_epi16(1 << (kBits - 1));
    if constexpr (!kSymmetric) LoadNibbleWords(zero_bytes + pass * kLanes, zero_points);
    LoadNibbleWords(numbers + pass * kLanes, multiples);
    UNROLL_FOR(h, 2) {
      if constexpr (kUnit > 1) {
        if constexpr (!kSymmetric) {
          const Ints upper = _mm256_slli_epi16(_mm256_srli_epi16(multiples[h], 8 - kBits), 4);
          zero_points[h] = _mm256_or_si256(zero_points[h], upper);
        }
        multiples[h] = _mm256_and_si256(multiples[h], _mm256_set1_epi16(kLess1));
      }
      multiples[h] = _mm256_add_epi16(multiples[h], _mm256_set1_epi16(1));
      if constexpr (kUnit > 1) zero_points[h] = _mm256_mullo_epi16(zero_points[h], multiples[h]);
    }
    block += pass * 32;
    for (int64_t j = 0; j < steps; j += 8, block += 8 * kStepBytes, values += 8 * kAll, starts += kAll) {
      FetchEight<kBits>(pass, stream);
      Ints words[kAll][2];
      if constexpr (kUnit > 1) {
        UNROLL_FOR(r, kAll) {
          const Ints start = SetInts(starts[r]);
          UNROLL_FOR(h, 2) sums[r][h] = AddInts(sums[r][h], _mm256_madd_epi16(zero_points[h], start));
        }
        UNROLL_FOR(u, 8 / kUnit) {
          Clear(words);
          AddUnit<kBits>(block + u * kUnit * kStepBytes, values + u * kUnit * kAll, words);
          UNROLL_FOR(r, kAll)
          UNROLL_FOR(h, 2) sums[r][h] = AddInts(sums[r][h], _mm256_madd_epi16(words[r][h], multiples[h]));
        }
        continue;
      }
      UNROLL_FOR(r, kAll) {
        const Ints start = SetInts(starts[r]);
        UNROLL_FOR(h, 2) words[r][h] = _mm256_mullo_epi16(zero_points[h], start);
      }
      EightSteps<64>(block, values, words);
      UNROLL_FOR(r, kAll)
      UNROLL_FOR(h, 2) sums[r][h] = AddInts(sums[r][h], _mm256_madd_epi16(words[r][h], multiples[h]));
    }
  }
};

}  // namespace

const Kernels kAvx2Kernels = MakeKernels<Avx2>();

}  // namespace quant_linear
