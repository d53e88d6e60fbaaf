// qwen::QuantLinear with the precision float32: tiles of [columns][rows] floats. I is an instruction set's, as in
// quant_linear_kernels.h.
#pragma once
#include "linear/quant_linear.h"

namespace quant_linear {
namespace {

constexpr int kMaxFloatRows = 4;

// A tile of kRows rows times a panel: the sums without bias and residual.
template <class I, int kBits, int kRows>
void MultiplyFloatTile(const Problem& p, const uint8_t* panel, const char* tile, float (*out)[kPanel]) {
  using L = typename I::Lanes;
  const float* x = reinterpret_cast<const float*>(tile);
  typename L::Floats sums[kRows][2];
  for (auto& row : sums) row[0] = row[1] = L::Set(0.f);
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t of_block = g % p.block_groups;
    const uint8_t* const block = BlockOf(p, panel, g / p.block_groups);
    float minus_zero_points[kPanel], units[kPanel];
    for (int i = 0; i < kPanel; ++i) {
      minus_zero_points[i] = float(-ZeroPointOf(p, panel, g, i));
      units[i] = kScaleUnit * (p.block_groups == 1 ? 1.f : float(NumbersOf(p, block, of_block, i).multiple));
    }
    const uint8_t* const steps = StepsOf(p, block, of_block);
    uint8_t unpacked[2][2 * kPanel];  // with 5 and 6 bits
    for (int64_t k = 0; k < p.group_size; ++k, x += kRows) {
      const int column = int(k % 4);
      if ((kBits == 5 || kBits == 6) && column == 0) UnpackAll<kBits>(steps, k / 4, unpacked);
      for (int h = 0; h < 2; ++h) {
        const auto q = kBits == 4   ? L::Column(steps + k / 4 * 64, column, 4 * h, 15)
                       : kBits == 8 ? L::Column(steps + k / 4 * 128 + 64 * h, column, 0, 255)
                                    : L::Column(unpacked[h], column, 0, 255);
        const auto centred = L::Add(L::ToFloats(q), L::Load(minus_zero_points + 16 * h));
        const auto scale = L::Mul(L::LoadHalves(block + 32 * h), L::Load(units + 16 * h));  // exact
        const auto weight = L::Mul(centred, scale);
        for (int r = 0; r < kRows; ++r) sums[r][h] = L::Fma(weight, L::Set(x[r]), sums[r][h]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int h = 0; h < 2; ++h) L::Store(out[r] + 16 * h, sums[r][h]);
}

// The kernel for `rows` of at most kRows.
template <class I, int kBits, int kRows = kMaxFloatRows>
void MultiplySomeFloatRows(const Problem& p, const uint8_t* panel, const char* tile, int64_t rows,
                           float (*out)[kPanel]) {
  if (rows == kRows) return MultiplyFloatTile<I, kBits, kRows>(p, panel, tile, out);
  if constexpr (kRows > 1) MultiplySomeFloatRows<I, kBits, kRows - 1>(p, panel, tile, rows, out);
}

}  // namespace
}  // namespace quant_linear
