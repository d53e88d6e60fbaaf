// qwen::MoE's kernels, for any instruction set I (experts_<set>.cc): its Lanes, and blocks of kRows times kOutputs dot
// products whose sums stay in registers.
#pragma once
#include <cstring>

#include "experts/experts.h"
#include "linear/quant_linear_finish.h"
#include "linear/quant_linear_input.h"
#include "linear/quant_linear_stream.h"

namespace experts {
namespace {

using quant_linear::Problem;

template <class I>
void NormalizeRow(const float* x, const float* weight, float epsilon, int64_t columns, float* out) {
  Problem p = {};
  p.in_features = columns, p.norm_weight = weight, p.epsilon = epsilon;
  quant_linear::Normalize<typename I::Lanes>(p, x, out);
}

// Sixteen columns from p on, of which there are `count`, with zeros behind.
template <class L>
typename L::Floats LoadSome(const float* p, int64_t count) {
  float rest[16] = {};
  std::memcpy(rest, p, size_t(count) * sizeof(float));
  return L::Load(rest);
}

// The dot products of kRows rows with kOutputs outputs, `columns` each.
template <class I, int kRows, int kOutputs>
__attribute__((noinline)) void MultiplyBlock(const float* x, const float* w, int64_t columns, float* out,
                                             int64_t stride) {
  using L = typename I::Lanes;
  typename L::Floats sums[kRows][kOutputs];
  UNROLL_FOR(r, kRows) UNROLL_FOR(o, kOutputs) sums[r][o] = L::Set(0.f);
  const int64_t whole = columns / 16 * 16;
  for (int64_t k = 0; k < whole; k += 16) {
    typename L::Floats rows[kRows];
    UNROLL_FOR(r, kRows) rows[r] = L::Load(x + r * columns + k);
    UNROLL_FOR(o, kOutputs) {
      const auto output = L::Load(w + o * columns + k);
      UNROLL_FOR(r, kRows) sums[r][o] = L::Fma(rows[r], output, sums[r][o]);
    }
  }
  if (whole < columns) {
    UNROLL_FOR(r, kRows) UNROLL_FOR(o, kOutputs) {
      const auto row = LoadSome<L>(x + r * columns + whole, columns - whole);
      sums[r][o] = L::Fma(row, LoadSome<L>(w + o * columns + whole, columns - whole), sums[r][o]);
    }
  }
  UNROLL_FOR(r, kRows) UNROLL_FOR(o, kOutputs) out[r * stride + o] = L::Sum(sums[r][o]);
}

template <class I, int kRows>
void MultiplyRows(const float* x, const float* w, int64_t outputs, int64_t columns, float* out, int64_t stride) {
  int64_t o = 0;
  for (; o + I::kOutputs <= outputs; o += I::kOutputs)
    MultiplyBlock<I, kRows, I::kOutputs>(x, w + o * columns, columns, out + o, stride);
  for (; o < outputs; ++o) MultiplyBlock<I, kRows, 1>(x, w + o * columns, columns, out + o, stride);
}

template <class I>
void Multiply(const float* x, int64_t rows, const float* w, int64_t outputs, int64_t columns, float* out,
              int64_t stride) {
  int64_t r = 0;
  for (; r + I::kRows <= rows; r += I::kRows)
    MultiplyRows<I, I::kRows>(x + r * columns, w, outputs, columns, out + r * stride, stride);
  for (; r < rows; ++r) MultiplyRows<I, 1>(x + r * columns, w, outputs, columns, out + r * stride, stride);
}

template <class I>
void Softmax(float* scores, int64_t count) {
  using L = typename I::Lanes;
  const auto load = [&](int64_t i, float filling) {
    if (i + 16 <= count) return L::Load(scores + i);
    float rest[16];
    for (float& lane : rest) lane = filling;
    std::memcpy(rest, scores + i, size_t(count - i) * sizeof(float));
    return L::Load(rest);
  };
  const auto store = [&](int64_t i, typename L::Floats v) {
    float all[16];
    L::Store(all, v);
    std::memcpy(scores + i, all, size_t(i + 16 <= count ? 16 : count - i) * sizeof(float));
  };
  constexpr float kNone = -__builtin_inff();
  auto most = L::Set(kNone);
  for (int64_t i = 0; i < count; i += 16) most = L::Max(load(i, kNone), most);
  float lanes[16], largest = kNone;
  L::Store(lanes, most);
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  auto sums = L::Set(0.f);
  for (int64_t i = 0; i < count; i += 16) {
    // No less than -87, where exp is that of the least normal number; NaN stays, and makes the sum one.
    const auto power = quant_linear::Exp<L>(L::Max(L::Set(-87.f), L::Add(load(i, largest), L::Set(-largest))));
    float kept[16];
    L::Store(kept, power);
    for (int64_t lane = count - i; lane < 16; ++lane) kept[lane] = 0;
    sums = L::Add(sums, L::Load(kept));
    store(i, power);
  }
  const auto sum = L::Set(L::Sum(sums));
  for (int64_t i = 0; i < count; i += 16) store(i, L::Div(load(i, 0), sum));
}

template <class I>
float Sigmoid(float x) {
  using L = typename I::Lanes;
  const auto power = L::Max(L::Set(-87.f), L::Negate(L::Max(L::Set(-88.f), L::Set(x))));
  float lanes[16];
  L::Store(lanes, L::Div(L::Set(1.f), L::Add(L::Set(1.f), quant_linear::Exp<L>(power))));
  return lanes[0];
}

template <class I>
void Combine(const Combination& c) {
  using L = typename I::Lanes;
  for (int64_t k = 0; k < c.columns; k += 16) {
    auto y = L::Set(0.f);
    for (int64_t s = 0; s < c.top_k; ++s)
      y = L::Fma(L::Set(c.weights[s]), L::Load(c.products + c.places[s] * c.stride + k), y);
    if (c.shared != nullptr) y = L::Fma(L::Set(c.shared_weight), L::Load(c.shared + k), y);
    if (c.residual != nullptr) y = L::Add(L::Load(c.residual + k), y);
    L::Store(c.y + k, y);
  }
}

// ---- Float rows as panels, of kernels of qwen::QuantLinear

constexpr int kFloatTileRows = 8;

template <class I>
int64_t FloatTileRows(const Problem&) {
  return kFloatTileRows;
}

template <class I>
int64_t FloatTileBytes(const Problem& p) {
  return kFloatTileRows * CeilDiv(p.in_features, 16) * 16 * int64_t(sizeof(float));
}

template <class I>
void PrepareFloats(const Problem& p, int64_t tiles, quant_linear::Range range, char* activations) {
  for (int64_t t = range.first; t < range.last; ++t) {
    float* out = reinterpret_cast<float*>(activations + t * FloatTileBytes<I>(p));
    for (int64_t r = RowBegin(p, tiles, t); r < RowBegin(p, tiles, t + 1); ++r, out += p.in_features)
      std::memcpy(out, quant_linear::InputRow<typename I::Lanes>(p, r), size_t(p.in_features) * sizeof(float));
  }
}

template <class I>
quant_linear::Share FloatShare(const Problem& p) {
  const int64_t cached = quant_linear::kCachedBytes / FloatTileBytes<I>(p);
  return {cached > 1 ? cached : 1, 0};
}

template <class I>
void MultiplyFloats(const Problem& p, int64_t tiles, quant_linear::Range of_tiles, quant_linear::Range of_panels,
                    const char* activations) {
  const float* const weight = reinterpret_cast<const float*>(p.weight);
  const int64_t part = p.swiglu ? kPanel / 2 : kPanel;  // outputs that lie together
  for (int64_t n = of_panels.first; n < of_panels.last; ++n)
    for (int64_t t = of_tiles.first; t < of_tiles.last; ++t) {
      const int64_t begin = RowBegin(p, tiles, t), rows = RowBegin(p, tiles, t + 1) - begin;
      const float* const x = reinterpret_cast<const float*>(activations + t * FloatTileBytes<I>(p));
      alignas(64) float out[kFloatTileRows][kPanel];
      for (int64_t half = 0; half < kPanel / part; ++half)
        Multiply<I>(x, rows, weight + (n * part + half * p.width) * p.in_features, part, p.in_features,
                    out[0] + half * part, kPanel);
      quant_linear::Finish<typename I::Lanes>(p, n, begin, rows, out);
    }
}

template <class I>
constexpr quant_linear::Kernels MakeFloatKernels() {
  return {FloatTileRows<I>, FloatTileBytes<I>, PrepareFloats<I>, FloatShare<I>, nullptr, MultiplyFloats<I>};
}

template <class I>
constexpr Kernels MakeKernels(const quant_linear::Kernels& float_rows) {
  return {NormalizeRow<I>, Multiply<I>, Softmax<I>, Sigmoid<I>, Combine<I>, float_rows};
}

}  // namespace
}  // namespace experts
