// What qwen::QuantLinear makes of the sums of a tile and a panel: bias, residual, SwiGLU. L are the lanes of an
// instruction set.
#pragma once
#include <cstring>

#include "linear/quant_linear.h"

namespace quant_linear {
namespace {

// exp(x) for x from -87 to 88, relative error below 3e-7.
template <class L>
typename L::Floats Exp(typename L::Floats x) {
  const auto n = L::Round(L::Mul(x, L::Set(1.44269504f)));
  const auto whole = L::ToFloats(n);
  auto r = L::Fma(whole, L::Set(-0.693145752f), x);  // ln 2 in two parts
  r = L::Fma(whole, L::Set(-1.42860677e-6f), r);
  auto series = L::Set(1.3981999e-3f);
  constexpr float kSeries[] = {8.3334519e-3f, 4.1665796e-2f, 1.6666666e-1f, .5f, 1.f, 1.f};
  for (const float coefficient : kSeries) series = L::Fma(series, r, L::Set(coefficient));
  return L::Mul(series, L::PowerOfTwo(n));
}

// gate / (1 + exp(-gate)) * up; a gate below -88 counts as -88, which gives 5e-37.
template <class L>
typename L::Floats Gate(typename L::Floats gate, typename L::Floats up) {
  gate = L::Max(L::Set(-88.f), gate);
  const auto power = L::Max(L::Set(-87.f), L::Negate(gate));
  return L::Mul(L::Div(gate, L::Add(L::Set(1.f), Exp<L>(power))), up);
}

// y, from the sums of rows [begin, begin + rows) and a panel.
template <class L>
void Finish(const Problem& p, int64_t panel, int64_t begin, int64_t rows, float (*out)[kPanel]) {
  const int64_t first = panel * kPanel, count = p.out_features - first < kPanel ? p.out_features - first : kPanel;
  for (int64_t r = 0; r < rows; ++r) {
    if (p.bias != nullptr)
      for (int64_t i = 0; i < count; ++i) out[r][i] += p.bias[first + i];
    if (p.swiglu) {
      L::Store(p.y + (begin + r) * p.width + first / 2, Gate<L>(L::Load(out[r]), L::Load(out[r] + kPanel / 2)));
      continue;
    }
    const int64_t at = (begin + r) * p.width + first;
    if (p.residual != nullptr)
      for (int64_t i = 0; i < count; ++i) out[r][i] += p.residual[at + i];
    std::memcpy(p.y + at, out[r], size_t(count) * sizeof(float));
  }
}

}  // namespace
}  // namespace quant_linear
