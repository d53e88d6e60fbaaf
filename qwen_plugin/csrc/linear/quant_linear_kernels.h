// qwen::QuantLinear's kernels, for any instruction set I (quant_linear_<set>.cc) of kLanes integers a vector
// and tiles of kMaxRows rows, one alone of kMostRows: for int8 and for int8x2. Its Dot multiplies integers of the
// second half times HighFactor, and bytes less kByteOffset. One that kWeighsGroups has a DotWeighed, which adds up a
// block's groups times their multiples.
//
// A tile of activations is a stream of its groups, each
//   [group_size / 4 steps][rows][4 columns] bytes, [2 halves][rows] int32 starts, [rows] float32 scales
// where int8x2 has two rows of bytes and starts, high and low parts, for each row of x; and where groups are weighed,
// the two starts are I::Start of the first and of the second 32 columns. A tile with the precision
// float32 is that of quant_linear_float.h. Sums of a tile and a panel lie in the first-level cache, (rows, 32).
#pragma once
#include <cstring>

#include "linear/quant_linear.h"
#include "linear/quant_linear_finish.h"
#include "linear/quant_linear_float.h"
#include "linear/quant_linear_input.h"
#include "linear/quant_linear_stream.h"

namespace quant_linear {
namespace {

// Integers near this one, read as floats, are 1.5 * 2^23 plus their distance from it: a sum that starts here and stays
// within 2^22 turns into a float for nothing. 255 * 127 * 128 does.
constexpr int32_t kFloatStart = 0x4b400000;
constexpr float kFloatStartValue = 12582912.f;

constexpr int kMaxTileRows = 8;

// What the integers of a panel's second half are multiplied times, below 8 bits: where kInPlace, they stay in the upper
// bits of their bytes.
template <class I>
constexpr int HighFactor(int bits) {
  return I::kInPlace ? 1 << (8 - bits) : 1;
}

inline int64_t GroupBytes(const Problem& p, int64_t rows, int planes) {
  return 4 * (p.group_size / 4 * rows * planes + 2 * rows * planes + rows);
}

template <class I>
int64_t MaxTileRows(const Problem& p) {
  if (p.precision == Precision::kFloat32) return kMaxFloatRows;
  const int most = I::kMostRows[Planes(p) - 1];
  return p.rows <= most ? most : I::kMaxRows[Planes(p) - 1];
}

template <class I>
int64_t TileBytes(const Problem& p) {
  const int64_t rows = MaxTileRows<I>(p);
  const int64_t bytes = p.precision == Precision::kFloat32 ? p.groups * p.group_size * rows * 4
                                                           : p.groups * GroupBytes(p, rows, Planes(p));
  return (bytes + 63) / 64 * 64;
}

// ---- Preparing

template <class I, int kPlanes>
void PrepareRow(const Problem& p, int64_t of_product, int64_t row, int64_t rows, char* tile) {
  using L = typename I::Lanes;
  const int64_t steps = p.group_size / 4, all = rows * kPlanes, first = row * kPlanes;
  const bool as_float = kPlanes == 1 || p.activation_scales == ActivationScales::kBlock;
  const uint32_t sum_start = as_float ? uint32_t(kFloatStart) : 0;
  RowQuantizer<L, kPlanes> quantizer(p, of_product);
  for (int64_t g = 0; g < p.groups; ++g, tile += GroupBytes(p, rows, kPlanes)) {
    alignas(64) int8_t planes[kPlanes][kMaxGroup];
    const QuantizedGroup group = quantizer.Quantize(g, [&](int plane, int64_t k) { return planes[plane] + k; });
    char* const starts = tile + 4 * steps * all;
    for (int plane = 0; plane < kPlanes; ++plane) {
      char* const bytes = tile + 4 * (first + plane);
      for (int64_t j = 0; j < steps; ++j) std::memcpy(bytes + 4 * all * j, planes[plane] + 4 * j, 4);
      if constexpr (I::kWeighsGroups) {
        if (p.activation_scales == ActivationScales::kBlock) {
          for (int64_t part = 0; part < p.group_size / 32; ++part) {
            const uint32_t start = I::Start(planes[plane] + 32 * part);
            std::memcpy(starts + 4 * (part * all + first + plane), &start, 4);
          }
          continue;
        }
      }
      const uint32_t sum = uint32_t(group.sums[plane]);
      const uint32_t zero_point = uint32_t(SymmetricZeroPoint(p)) - (p.bits == 8 ? I::kByteOffset : 0);
      for (int half = 0; half < 2; ++half) {
        const uint32_t factor = half == 1 ? uint32_t(HighFactor<I>(p.bits)) : 1;
        const uint32_t start =
            p.symmetric ? sum_start - zero_point * factor * sum : (0 - sum) & 0xffffu;  // a factor of the zero points
        std::memcpy(starts + 4 * (half * all + first + plane), &start, 4);
      }
    }
    std::memcpy(starts + 4 * (2 * all + row), &group.scale, 4);
  }
}

template <class I>
void Prepare(const Problem& p, int64_t tiles, Range range, char* activations) {
  for (int64_t t = range.first; t < range.last; ++t) {
    const int64_t begin = RowBegin(p, tiles, t), rows = RowBegin(p, tiles, t + 1) - begin;
    char* const tile = activations + t * TileBytes<I>(p);
    for (int64_t r = 0; r < rows; ++r) {
      if (p.precision == Precision::kInt8) {
        PrepareRow<I, 1>(p, begin + r, r, rows, tile);
      } else if (p.precision == Precision::kInt8x2) {
        PrepareRow<I, 2>(p, begin + r, r, rows, tile);
      } else {
        const float* const x = InputRow<typename I::Lanes>(p, begin + r);
        for (int64_t k = 0; k < p.groups * p.group_size; ++k) reinterpret_cast<float*>(tile)[k * rows + r] = x[k];
      }
    }
  }
}

// ---- Multiplying

// Zero points of the outputs of one pass, outside of blocks: those of the second half times HighFactor.
template <class I, int kBits>
inline __attribute__((always_inline)) void LoadZeroPoints(const uint8_t* stored, int pass, typename I::Ints* out) {
  stored += pass * I::kLanes;
  if constexpr (kBits == 4) {
    const auto both = I::LoadBytes(stored);
    out[0] = I::And(both, 15);
    out[1] = I::And(both, 240);
    if constexpr (!I::kInPlace) out[1] = I::template ShiftRight<4>(out[1]);
  } else {
    out[0] = I::LoadBytes(stored);
    out[1] = I::template ShiftLeft<I::kInPlace ? 8 - kBits : 0>(I::LoadBytes(stored + kPanel / 2));
    if constexpr (kBits == 8 && I::kByteOffset > 0)
      UNROLL_FOR(h, 2) out[h] = I::AddInts(out[h], I::SetInts(-int(I::kByteOffset)));
  }
}

// The same of a group of a block.
template <class I, int kBits>
inline __attribute__((always_inline)) void LoadBlockZeroPoints(const uint8_t* stored, const uint8_t* multiples,
                                                               int pass, typename I::Ints* out) {
  const auto low = I::LoadBytes(stored + pass * I::kLanes);
  out[0] = I::And(low, 15);
  out[1] = I::And(low, 240);  // times 16
  if constexpr (kBits > 4) {
    constexpr int kAbove = 16 - (256 >> kBits);  // the bits above a multiple
    const auto upper = I::LoadBytes(multiples + pass * I::kLanes);
    out[0] = I::AddInts(out[0], I::template ShiftLeft<kBits - 4>(I::And(upper, kAbove)));
    out[1] = I::AddInts(I::template ShiftRight<kBits - 4>(out[1]), I::And(upper, kAbove << 4));
  }
  if constexpr (!I::kInPlace) out[1] = I::template ShiftRight<8 - kBits>(out[1]);
}

// The multiples of a block's unit that a group's scales are, for the outputs of one pass; over HighFactor for those of
// the second half.
template <class I, int kBits>
inline __attribute__((always_inline)) void LoadMultiples(const uint8_t* stored, int pass, typename I::Floats* out) {
  constexpr int kLess1 = (256 >> kBits) - 1;
  const auto both = I::LoadBytes(stored + pass * I::kLanes);
  UNROLL_FOR(h, 2) {
    const float one = h == 0 ? 1.f : 1.f / HighFactor<I>(kBits);
    const auto less_1 = I::ToFloats(I::And(both, h == 0 ? kLess1 : kLess1 << 4));  // times 16 in the second half
    out[h] = I::Fma(less_1, I::Set(h == 0 ? 1.f : one / 16), I::Set(one));
  }
}

// A block's sum of its groups' dots times their multiples: integers, as floats unless I weighs groups itself.
template <class I>
inline typename I::BlockSum NoSum() {
  if constexpr (I::kWeighsGroups) {
    return I::SetInts(0);
  } else {
    return I::Set(0.f);
  }
}
template <class I>
inline typename I::Floats AsFloats(typename I::BlockSum sum) {
  if constexpr (I::kWeighsGroups) {
    return I::ToFloats(sum);
  } else {
    return sum;
  }
}

// A tile of kRows rows times a panel: the sums without bias and residual. kBlocks: activation_scales are of blocks.
template <class I, int kBits, bool kSymmetric, int kPlanes, bool kBlocks, int kRows>
__attribute__((noinline)) void MultiplyTile(const Problem& p, const uint8_t* panel, const char* tile, Stream& stream,
                                            float (*out)[kPanel]) {
  using Ints = typename I::Ints;
  using Floats = typename I::Floats;
  constexpr int kAll = kRows * kPlanes, kPasses = 16 / I::kLanes;
  constexpr bool kWeighs = kBlocks && I::kWeighsGroups;
  constexpr float kHighUnit = kScaleUnit / HighFactor<I>(kBits);
  constexpr int kFetch = FetchLines(kBits), kZeroPointBytes = ZeroPointBytes(kBits);
  const int64_t steps = p.group_size / 4, group_bytes = GroupBytes(p, kRows, kPlanes);
  Floats totals[kPasses][kRows][2];
  typename I::BlockSum blocks[kPasses][kAll][2];
  UNROLL_FOR(pass, kPasses) {
    UNROLL_FOR(r, kRows) UNROLL_FOR(h, 2) totals[pass][r][h] = I::Set(0.f);
    UNROLL_FOR(r, kAll) UNROLL_FOR(h, 2) blocks[pass][r][h] = NoSum<I>();
  }
  int64_t of_block = 0;
  const uint8_t *block = nullptr, *next = panel + p.prefix_bytes;
  for (int64_t g = 0; g < p.groups; ++g, next += p.group_bytes, tile += group_bytes) {
    const int32_t* const values = reinterpret_cast<const int32_t*>(tile);
    const int32_t* const starts = values + steps * kAll;
    const float* const scales = reinterpret_cast<const float*>(starts + 2 * kAll);
    stream.StartGroup();
    if (!kBlocks || of_block == 0) {
      block = next;
      next += p.header_bytes;
      for (int i = 0; i < (kBlocks ? (kSymmetric ? 2 : 3) : 1); ++i) stream.Fetch<kFetch>();
    }
    if (!kBlocks && !kSymmetric && g % (64 / kZeroPointBytes) == 0) stream.Fetch<kFetch>();
    const uint8_t* const zero_bytes =
        kBlocks ? MultiplesOf(block, p.block_groups + of_block) : panel + g * kZeroPointBytes;
    UNROLL_FOR(pass, kPasses) {
      Ints sums[kAll][2];
      if constexpr (kWeighs) {
        I::template DotWeighed<kBits, kSymmetric, kAll>(next, steps, pass, values, zero_bytes,
                                                        MultiplesOf(block, of_block), blocks[pass], stream);
      } else {
        if constexpr (kSymmetric) {
          UNROLL_FOR(r, kAll) UNROLL_FOR(h, 2) sums[r][h] = I::SetInts(starts[h * kAll + r]);
        } else {
          Ints zero_points[2];
          if constexpr (kBlocks) {
            LoadBlockZeroPoints<I, kBits>(zero_bytes, MultiplesOf(block, of_block), pass, zero_points);
          } else {
            LoadZeroPoints<I, kBits>(zero_bytes, pass, zero_points);
          }
          UNROLL_FOR(r, kAll)
          UNROLL_FOR(h, 2)
          sums[r][h] = I::AddWords(I::SetInts(kPlanes == 1 || kBlocks ? kFloatStart : 0), zero_points[h],
                                   I::SetInts(starts[h * kAll + r]));
        }
        I::template Dot<kBits, kAll>(next, steps, pass, values, sums, stream);
      }

      if constexpr (kBlocks && !kWeighs) {
        Floats multiples[2];
        LoadMultiples<I, kBits>(MultiplesOf(block, of_block), pass, multiples);
        UNROLL_FOR(r, kAll) UNROLL_FOR(h, 2) {
          const Floats dot = I::Add(I::BitsToFloats(sums[r][h]), I::Set(-kFloatStartValue));
          blocks[pass][r][h] = I::Fma(dot, multiples[h], blocks[pass][r][h]);
        }
      }
      if constexpr (kBlocks) {
        if (of_block + 1 < p.block_groups && g + 1 < p.groups) continue;
        UNROLL_FOR(r, kRows) UNROLL_FOR(h, 2) {
          const Floats unit = I::Mul(I::LoadHalves(block + 32 * h + 2 * pass * I::kLanes), I::Set(kScaleUnit));
          Floats product;
          if constexpr (kPlanes == 1) {
            product = I::Mul(AsFloats<I>(blocks[pass][r][h]), unit);  // rounded once
          } else {
            const Floats high = I::Mul(AsFloats<I>(blocks[pass][2 * r][h]), I::Mul(unit, I::Set(256.f)));
            product = I::Fma(AsFloats<I>(blocks[pass][2 * r + 1][h]), unit, high);
          }
          totals[pass][r][h] = I::Fma(product, I::Set(scales[r]), totals[pass][r][h]);
        }
        UNROLL_FOR(r, kAll) UNROLL_FOR(h, 2) blocks[pass][r][h] = NoSum<I>();
        continue;
      }
      Floats units[2], offsets[2];
      UNROLL_FOR(h, 2) {
        const Floats stored = I::LoadHalves(block + 32 * h + 2 * pass * I::kLanes);
        units[h] = I::Mul(stored, I::Set(h == 0 ? kScaleUnit : kHighUnit));
        offsets[h] = I::Mul(units[h], I::Set(-kFloatStartValue));  // exact
      }
      UNROLL_FOR(r, kRows) UNROLL_FOR(h, 2) {
        Floats product;  // of dot and the weight's scale, rounded once
        if constexpr (kPlanes == 1) {
          product = I::Fma(I::BitsToFloats(sums[r][h]), units[h], offsets[h]);
        } else {
          const Ints dot = I::AddInts(I::template ShiftLeft<8>(sums[2 * r][h]), sums[2 * r + 1][h]);
          product = I::Mul(I::ToFloats(dot), units[h]);
        }
        totals[pass][r][h] = I::Fma(product, I::Set(scales[r]), totals[pass][r][h]);
      }
    }
    if (kBlocks) of_block = of_block + 1 < p.block_groups ? of_block + 1 : 0;
  }
  UNROLL_FOR(pass, kPasses)
  UNROLL_FOR(r, kRows) UNROLL_FOR(h, 2) I::Store(out[r] + 16 * h + pass * I::kLanes, totals[pass][r][h]);
}

// The kernel for `rows` of at most kRows.
template <class I, int kBits, bool kSymmetric, int kPlanes, bool kBlocks, int kRows = I::kMostRows[kPlanes - 1]>
void MultiplySomeRows(const Problem& p, const uint8_t* panel, const char* tile, int64_t rows, Stream& stream,
                      float (*out)[kPanel]) {
  if (rows == kRows) return MultiplyTile<I, kBits, kSymmetric, kPlanes, kBlocks, kRows>(p, panel, tile, stream, out);
  if constexpr (kRows > 1)
    MultiplySomeRows<I, kBits, kSymmetric, kPlanes, kBlocks, kRows - 1>(p, panel, tile, rows, stream, out);
}

template <class I, int kBits>
void MultiplyAnyTile(const Problem& p, const uint8_t* panel, const char* tile, int64_t rows, Stream& stream,
                     float (*out)[kPanel]) {
  if constexpr (kBits < 8) {
    if (p.activation_scales == ActivationScales::kBlock && p.precision == Precision::kInt8)
      return (p.symmetric ? MultiplySomeRows<I, kBits, true, 1, true>
                          : MultiplySomeRows<I, kBits, false, 1, true>)(p, panel, tile, rows, stream, out);
    if (p.activation_scales == ActivationScales::kBlock && p.precision == Precision::kInt8x2)
      return (p.symmetric ? MultiplySomeRows<I, kBits, true, 2, true>
                          : MultiplySomeRows<I, kBits, false, 2, true>)(p, panel, tile, rows, stream, out);
  }
  switch (p.precision) {
    case Precision::kInt8:
      return (p.symmetric ? MultiplySomeRows<I, kBits, true, 1, false>
                          : MultiplySomeRows<I, kBits, false, 1, false>)(p, panel, tile, rows, stream, out);
    case Precision::kInt8x2:
      return (p.symmetric ? MultiplySomeRows<I, kBits, true, 2, false>
                          : MultiplySomeRows<I, kBits, false, 2, false>)(p, panel, tile, rows, stream, out);
    case Precision::kFloat32:
      return MultiplySomeFloatRows<I, kBits>(p, panel, tile, rows, out);
  }
}

template <class I>
Share ShareOf(const Problem& p) {
  return {kCachedBytes > TileBytes<I>(p) ? kCachedBytes / TileBytes<I>(p) : 1, 0};
}

template <class I>
void Multiply(const Problem& p, int64_t tiles, Range of_tiles, Range of_panels, const char* activations) {
  const int64_t count = of_tiles.last - of_tiles.first, fetch_bytes = kLineBytes * FetchLines(p.bits);
  const int64_t fetches = CeilDiv(p.panel_bytes, count * fetch_bytes);  // a tile's share of the next panel
  Stream stream;
  if (count == 1) {
    stream = StartWindows(PanelOf(p, of_panels.first), (of_panels.last - of_panels.first) * p.panel_bytes, fetch_bytes);
  } else {
    stream.step = fetch_bytes, stream.a_group = CeilDiv(fetches, p.groups);
  }
  const auto multiply = p.bits == 4   ? MultiplyAnyTile<I, 4>
                        : p.bits == 5 ? MultiplyAnyTile<I, 5>
                        : p.bits == 6 ? MultiplyAnyTile<I, 6>
                                      : MultiplyAnyTile<I, 8>;
  for (int64_t n = of_panels.first; n < of_panels.last; ++n) {
    const uint8_t* const panel = PanelOf(p, n);
    for (int64_t t = of_tiles.first; t < of_tiles.last; ++t) {
      const int64_t begin = RowBegin(p, tiles, t), rows = RowBegin(p, tiles, t + 1) - begin;
      // Several tiles fetch their shares of the next panel, evenly, as what they wait for themselves comes from there
      // too.
      if (count > 1) {
        stream.next = panel + p.panel_bytes + (t - of_tiles.first) * fetches * fetch_bytes;
        stream.left = 0, stream.of_share = fetches;
      }
      alignas(64) float out[kMaxTileRows][kPanel];
      multiply(p, panel, activations + t * TileBytes<I>(p), rows, stream, out);
      Finish<typename I::Lanes>(p, n, begin, rows, out);
    }
  }
}

template <class I>
constexpr Kernels MakeKernels() {
  return {MaxTileRows<I>, TileBytes<I>, Prepare<I>, ShareOf<I>, QuantizeRows<typename I::Lanes>, Multiply<I>};
}

// Dot for sets that multiply four bytes with four bytes and add them up in one instruction, I::DotBytes.
template <class I, int kBits, int kAll>
inline __attribute__((always_inline)) void DotInOne(const uint8_t* block, int64_t steps, int pass,
                                                    const int32_t* values, typename I::Ints (&sums)[kAll][2],
                                                    Stream& stream) {
  // One or two rows wait for the instruction's latency, unless they have several sums.
  constexpr int kChains = kAll == 1 ? 4 : kAll == 2 ? 2 : 1;
  constexpr int kFetch = FetchLines(kBits), kUnit = UnitSteps(kBits), kLines = UnitLines(kBits);
  typename I::Ints chains[kChains][kAll][2];
  UNROLL_FOR(c, kChains) UNROLL_FOR(r, kAll) UNROLL_FOR(h, 2) chains[c][r][h] = c == 0 ? sums[r][h] : I::SetInts(0);
  block += pass * 4 * I::kLanes;
  typename I::Ints lines[kLines];
  for (int64_t j = 0; j < steps; j += 8) {
    UNROLL_FOR(i, 8) {
      typename I::Ints q[2];
      if (i % kUnit == 0) {
        UNROLL_FOR(l, kLines) lines[l] = I::LoadInts(block + l * kLineBytes);
        block += kLines * kLineBytes;
        if (kUnit > 1 && pass == 0) stream.Fetch<kFetch>();
      }
      I::template UnpackLines<kBits>(lines, i % kUnit, q);
      if (pass == 0) stream.Fetch<kFetch>();
      UNROLL_FOR(r, kAll) {
        const auto four = I::SetInts(*values++);
        auto& sum = chains[i % kChains][r];
        sum[0] = I::DotBytes(sum[0], q[0], four);
        sum[1] = I::DotBytes(sum[1], q[1], four);
      }
    }
  }
  UNROLL_FOR(r, kAll) UNROLL_FOR(h, 2) {
    sums[r][h] = chains[0][r][h];
    for (int c = 1; c < kChains; ++c) sums[r][h] = I::AddInts(sums[r][h], chains[c][r][h]);
  }
}

}  // namespace
}  // namespace quant_linear
