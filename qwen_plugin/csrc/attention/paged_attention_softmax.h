// What the kernels of qwen::PagedAttention are made from, for any instruction set `I` (a struct of vector_*.h): exp,
// softmax, rounding to whole numbers, and where the keys of a partition lie.
//
// Everything here has internal linkage (see vector_plain.h), for the same reason nothing of the standard library's
// templates is used.
#pragma once
#include <cstring>

#include "attention/paged_attention.h"

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

namespace paged_attention {
namespace {

constexpr float kNegativeInfinity = -__builtin_inff();

int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }

// exp(x) for x <= 0, 0 below -87, so that no result is denormal; error at most 3 units in the last place.
template <class I>
inline typename I::Vector Exp(typename I::Vector x) {
  const auto n = I::Round(I::Mul(x, I::Set1(1.44269504f)));
  auto r = I::Fma(n, I::Set1(-0.693145752f), x);  // x - n ln 2, in two parts
  r = I::Fma(n, I::Set1(-1.42860677e-6f), r);
  constexpr float kCoefficients[] = {8.3334519e-3f, 4.1665796e-2f, 1.6666666e-1f, .5f, 1.f, 1.f};
  auto p = I::Set1(1.3981999e-3f);
  for (const float c : kCoefficients) p = I::Fma(p, r, I::Set1(c));
  return I::Scale(p, n, x, -87.f);
}

// The step between whole numbers of at most `levels` either side of 0 that stand for numbers up to `largest`; NaN or
// infinite as that is, so that it is not lost.
struct Step {
  float size, inverse;
  Step(float largest, float levels) : size(largest / levels), inverse(levels / largest) {
    if (!(inverse <= __FLT_MAX__)) inverse = 0;
  }
};

// Rounds x (`count` of them, a multiple of 8) to multiples of the step that is returned.
template <class I>
float Quantize(const float* x, int count, float levels, int16_t* out) {
  auto largest = I::Zero();
  for (int i = 0; i < count; i += I::kLanes) largest = I::MaxMagnitude(I::Load(x + i), largest);
  const Step step(I::ReduceMaxMagnitude(largest), levels);
  for (int i = 0; i < count; i += I::kLanes) I::StoreWords(out + i, I::Mul(I::Load(x + i), I::Set1(step.inverse)));
  return step.size;
}

// Where the 32-key tiles of one partition lie. Only those that some row sees are set.
struct Tiles {
  const char* keys[kTilesPerPartition];
  const char* values[kTilesPerPartition];
  const char* next_keys[kTilesPerPartition];  // keys of the partition that comes next, to be fetched on the way
  const float *key_scales[kTilesPerPartition], *value_scales[kTilesPerPartition];  // of an int8 cache
  bool fetch;

  // For kernels that bring tiles into another form, once for all rows of the item.
  int first, last;                    // keys that some row sees
  int all_first, all_last;            // keys that every row sees
  bool keep;                          // more rows than one group's come
  unsigned keys_ready, values_ready;  // bit i: tile i has that form
  unsigned broken;                    // bit i: values of tile i are not all finite
};

// The scales of a tile.
inline void Prefetch(const float* scales) {
  if (scales != nullptr) __builtin_prefetch(scales, 0, 3), __builtin_prefetch(scales + 16, 0, 3);
}

inline void Prefetch(const char* address, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(address + i, 0, 2);  // as quant_linear_stream.h's Stream
}

// A few rows over one partition, of which row r sees keys [begin[r], end[r]).
struct Group {
  Tiles& tiles;
  const int *begin, *end;
  const float* queries;    // as Load of its kind of rows lays them out
  int D;                   // head_dim
  int64_t block_size;      // tokens
  float *max, *sum, *out;  // the result: (rows), (rows), (rows, head_dim)

  bool Sees(int row) const { return begin[row] < end[row]; }
};

// Rows::AttendRows for `rows` of at most R.
template <class Rows, int R = Rows::kMaxRows>
void AttendSomeRows(int rows, const Group& group) {
  if (rows == R) return Rows::template AttendRows<R>(group);
  if constexpr (R > 1) AttendSomeRows<Rows, R - 1>(rows, group);
}

// The keys that some of R rows see, [first, last).
struct Seen {
  int first = kPartition, last = 0;
  Seen(const Group& group, int rows) {
    for (int r = 0; r < rows; ++r)
      if (group.begin[r] < group.end[r]) first = int(Min(first, group.begin[r])), last = int(Max(last, group.end[r]));
  }
};

// Softmax goes over the rows twice, as the first step of a row has to wait for its end: the next rows fill that time.

// The largest of a row's scores of keys [begin, end). Those of their tiles' other keys become -infinity.
template <class I>
inline float LargestScore(float* scores, int begin, int end) {
  constexpr int L = I::kLanes, kMaxima = kTile / L;
  const int first = begin / kTile * kTile, last = (end + kTile - 1) / kTile * kTile;
  for (int t = first; t < begin; ++t) scores[t] = kNegativeInfinity;
  for (int t = end; t < last; ++t) scores[t] = kNegativeInfinity;
  typename I::Vector most[kMaxima];
  UNROLL
  for (int i = 0; i < kMaxima; ++i) most[i] = I::Set1(kNegativeInfinity);
  for (int t = first; t < last; t += kTile) {
    UNROLL
    for (int i = 0; i < kMaxima; ++i) most[i] = I::Max(I::Load(scores + t + i * L), most[i]);
  }
  UNROLL
  for (int i = 1; i < kMaxima; ++i) most[0] = I::Max(most[i], most[0]);
  return I::ReduceMax(most[0]);
}

// The sum of a row's exp(score - max); store(t, weights) gets those of the keys from t on, 0 for hidden ones.
template <class I, class Store>
inline float Exponentials(const float* scores, int begin, int end, float max, const Store& store) {
  constexpr int L = I::kLanes, kSums = kTile / L;
  const int last = (end + kTile - 1) / kTile * kTile;
  const auto negative_max = I::Set1(-max);
  typename I::Vector sums[kSums];
  UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = I::Zero();
  for (int t = begin / kTile * kTile; t < last; t += kTile) {
    UNROLL
    for (int i = 0; i < kSums; ++i) {
      const auto weight = Exp<I>(I::Add(I::Load(scores + t + i * L), negative_max));
      store(t + i * L, weight);
      sums[i] = I::Add(sums[i], weight);
    }
  }
  UNROLL
  for (int n = kSums / 2; n > 0; n /= 2) {  // a tree over 32 lanes: the same for every vector width
    for (int i = 0; i < n; ++i) sums[i] = I::Add(sums[i], sums[i + n]);
  }
  return I::ReduceAdd(sums[0]);
}

}  // namespace
}  // namespace paged_attention
