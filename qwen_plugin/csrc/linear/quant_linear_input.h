// The input of qwen::QuantLinear's product, from its rows to quantised groups: the same for all kernels.
//
// L is one of the sets of sixteen lanes (lanes_*.h). Sums have one order: sixteen partial sums, lane by lane, then
// halves of them onto each other.
#pragma once
#include <cstring>

#include "linear/quant_linear.h"

namespace quant_linear {
namespace {

// Calls function(k, load, store) for every sixteen columns of `count`, where load reads a row's and store writes them.
template <class L, class Function>
void ForLanes(int64_t count, Function function) {
  int64_t k = 0;
  for (; k + 16 <= count; k += 16)
    function([&](const float* row) { return L::Load(row + k); },
             [&](float* row, typename L::Floats v) { L::Store(row + k, v); });
  if (k == count) return;
  const size_t bytes = size_t(count - k) * sizeof(float);
  float rest[16] = {};
  function(
      [&](const float* row) {
        std::memcpy(rest, row + k, bytes);
        return L::Load(rest);
      },
      [&](float* row, typename L::Floats v) {
        L::Store(rest, v);
        std::memcpy(row + k, rest, bytes);
      });
}

template <class L>
void Normalize(const Problem& p, const float* x, float* out) {
  auto squares = L::Set(0.f);
  ForLanes<L>(p.in_features, [&](auto load, auto) {
    const auto v = load(x);
    squares = L::Fma(v, v, squares);
  });
  const auto factor = L::Set(1.f / __builtin_sqrtf(L::Sum(squares) / float(p.in_features) + p.epsilon));
  ForLanes<L>(p.in_features, [&](auto load, auto store) {
    const auto v = L::Mul(load(x), factor);
    store(out, L::Mul(v, load(p.norm_weight)));
  });
}

// The row of x, or of what was quantised, that is row `row` of the product.
inline int64_t SourceOf(const Problem& p, int64_t row) { return p.sources == nullptr ? row : p.sources[row]; }

// Row `row` of what is multiplied, of p.groups * p.group_size columns, permuted and padded with zeros; and p.input.
// What it returns holds until the thread's next call.
template <class L>
const float* InputRow(const Problem& p, int64_t row) {
  const int64_t K = p.in_features, padded = p.groups * p.group_size;
  float* const scratch = RowScratch(2 * padded);
  const float* x = p.x + SourceOf(p, row) * K;
  float* const out = p.input == nullptr ? scratch : p.input + row * K;
  if (p.norm_weight != nullptr) {
    Normalize<L>(p, x, out);
  } else if (p.input != nullptr) {
    std::memcpy(out, x, size_t(K) * sizeof(float));
  }
  if (p.norm_weight != nullptr) x = out;
  if (p.permutation == nullptr && padded == K) return x;
  float* const last = scratch + padded;
  if (p.permutation == nullptr) {
    std::memcpy(last, x, size_t(K) * sizeof(float));
  } else {
    for (int64_t k = 0; k < K; ++k) last[k] = x[p.permutation[k]];
  }
  for (int64_t k = K; k < padded; ++k) last[k] = 0;
  return last;
}

// What a row quantiser fetches ahead, of this row and the next: their floats come from far away.
constexpr int64_t kFloatsAhead = 512;

// The largest magnitude of `size` columns; not finite if one of them isn't.
template <class L>
float Largest(const float* x, int64_t size) {
  auto most = L::Zero();
  for (int64_t k = 0; k < size; k += 16) most = L::MaxInts(most, L::MagnitudeBits(L::Load(x + k)));
  const int32_t bits = L::MaxOfInts(most);
  float largest;
  std::memcpy(&largest, &bits, 4);
  return largest;
}

// Quantises the groups of a row of p.groups * p.group_size columns, one after the other.
template <class L, int kPlanes>
class RowQuantizer {
 public:
  // Of row `row` of the product.
  RowQuantizer(const Problem& p, int64_t row)
      : x_(p.quantized == nullptr ? InputRow<L>(p, row) : nullptr),
        done_(p.quantized == nullptr ? nullptr : p.quantized + SourceOf(p, row) * QuantizedBytes(p)),
        size_(p.group_size),
        groups_(p.groups),
        block_groups_(p.block_groups),
        scales_(p.activation_scales),
        input_scale_(p.input_scale),
        largest_(x_ != nullptr && scales_ == ActivationScales::kToken ? Largest<L>(x_, p.groups * size_) : 0) {}

  // Into kPlanes rows of bytes: one (int8), or the high and the low parts (int8x2); place(plane, k) says where sixteen
  // columns from k of the group on go. Where a column that decides the scale is not finite, or with a static scale any
  // of the group, the scale is NaN and the bytes are 0.
  template <class Place>
  QuantizedGroup Quantize(int64_t group, const Place& place);

 private:
  template <class Place>
  QuantizedGroup Copy(int64_t group, const Place& place) const;

  const float* const x_;
  const char* const done_;  // or null
  int64_t size_, groups_, block_groups_;
  ActivationScales scales_;
  float input_scale_, largest_;  // largest: of the columns that share the present scale
};

template <class L, int kPlanes>
template <class Place>
QuantizedGroup RowQuantizer<L, kPlanes>::Copy(int64_t group, const Place& place) const {
  for (int plane = 0; plane < kPlanes; ++plane) {
    const char* const values = done_ + (plane * groups_ + group) * size_;
    for (int64_t k = 0; k < size_; k += 16) std::memcpy(place(plane, k), values + k, 16);
  }
  QuantizedGroup copied;
  std::memcpy(&copied, done_ + kPlanes * groups_ * size_ + group * int64_t(sizeof copied), sizeof copied);
  return copied;
}

template <class L, int kPlanes>
template <class Place>
QuantizedGroup RowQuantizer<L, kPlanes>::Quantize(int64_t group, const Place& place) {
  if (done_ != nullptr) return Copy(group, place);
  constexpr float kSteps = kPlanes == 1 ? 1.f : 256.f, kLimit = 127.f * kSteps;
  const float* const x = x_ + group * size_;
  if (scales_ != ActivationScales::kToken && group % block_groups_ == 0) {
    const int64_t columns = (group + block_groups_ < groups_ ? block_groups_ : groups_ - group) * size_;
    for (int64_t k = 0; k < columns; k += 16) __builtin_prefetch(x + k + kFloatsAhead);
    largest_ = Largest<L>(x, columns);
  }
  if (!(largest_ <= __FLT_MAX__)) {
    for (int plane = 0; plane < kPlanes; ++plane)
      for (int64_t k = 0; k < size_; k += 16) std::memset(place(plane, k), 0, 16);
    return {__builtin_nanf(""), {0, 0}};
  }
  const bool is_static = scales_ == ActivationScales::kStatic;
  float inverse = is_static ? kSteps / input_scale_ : kLimit / largest_;
  float scale = is_static ? input_scale_ / kSteps : largest_ / kLimit;
  if (!(inverse <= __FLT_MAX__)) inverse = scale = 0;

  auto high_sum = L::Zero(), low_sum = L::Zero();
  const auto factor = L::Set(inverse), least = L::Set(-kLimit);
  for (int64_t k = 0; k < size_; k += 16) {
    auto steps = L::Mul(L::Load(x + k), factor);
    if (is_static) steps = L::Negate(L::Max(L::Negate(L::Max(steps, least)), least));  // clipped at both ends
    const auto a = L::Round(steps);
    if constexpr (kPlanes == 1) {
      L::template StoreBytes<0>(place(0, k), a);
      high_sum = L::AddInts(high_sum, a);
    } else {
      const auto high = L::HighPart(a), low = L::SubInts(a, high);
      L::template StoreBytes<8>(place(0, k), high);
      L::template StoreBytes<0>(place(1, k), low);
      high_sum = L::AddInts(high_sum, high);
      low_sum = L::AddInts(low_sum, low);
    }
  }
  const int32_t high = L::SumInts(high_sum);
  return {scale, {kPlanes == 1 ? high : high / 256, L::SumInts(low_sum)}};
}

template <class L, int kPlanes>
void QuantizeRow(const Problem& p, int64_t row, char* out) {
  RowQuantizer<L, kPlanes> quantizer(p, row);
  char* const groups = out + kPlanes * p.groups * p.group_size;
  for (int64_t g = 0; g < p.groups; ++g) {
    const QuantizedGroup group = quantizer.Quantize(g, [&](int plane, int64_t k) {
      return reinterpret_cast<int8_t*>(out) + (plane * p.groups + g) * p.group_size + k;
    });
    std::memcpy(groups + g * int64_t(sizeof group), &group, sizeof group);
  }
}

template <class L>
void QuantizeRows(const Problem& p, Range rows, char* out) {
  for (int64_t row = rows.first; row < rows.last; ++row)
    (Planes(p) == 1 ? QuantizeRow<L, 1> : QuantizeRow<L, 2>)(p, row, out + row * QuantizedBytes(p));
}

}  // namespace
}  // namespace quant_linear
