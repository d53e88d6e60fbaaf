// Rows over one partition of float32 or float16 pools.
#pragma once
#include "attention/paged_attention_softmax.h"

namespace paged_attention {
namespace {

// scores (R rows of 256) of tiles [first, last); queries (head_dim, R). Fetches the tiles' values on the way.
template <class I, class T, int R, bool Fetch>
__attribute__((noinline)) void Scores(const Tiles& tiles, int first, int last, const float* queries, int D,
                                      float* scores) {
  constexpr int L = I::kLanes;
  for (int b = first; b < last; ++b) {
    for (int lane = 0; lane < kTile; lane += 2 * L) {
      const T* keys = reinterpret_cast<const T*>(tiles.keys[b]) + lane;
      const float* q = queries;
      typename I::Vector sum[R][2];
      UNROLL
      for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = I::Zero();
      for (int d = 0; d < D; ++d, keys += kTile, q += R) {
        if (Fetch && lane == 0) Prefetch(tiles.values[b] + size_t(d) * kTile * sizeof(T), kTile * sizeof(T));
        const auto k0 = I::Load(keys), k1 = I::Load(keys + L);
        UNROLL
        for (int r = 0; r < R; ++r) {
          const auto x = I::Set1(q[r]);
          sum[r][0] = I::Fma(x, k0, sum[r][0]);
          sum[r][1] = I::Fma(x, k1, sum[r][1]);
        }
      }
      UNROLL
      for (int r = 0; r < R; ++r) {
        I::Store(scores + r * kPartition + b * kTile + lane, sum[r][0]);
        I::Store(scores + r * kPartition + b * kTile + lane + L, sum[r][1]);
      }
    }
  }
}

// out (R rows of head_dim), C vectors of channels from d: += weights * values of keys [begin, end).
template <class I, class T, int R, int C, bool Fetch>
__attribute__((noinline)) void AddChannels(const Tiles& tiles, int begin, int end, const float* weights, int D, int d,
                                           float* out) {
  constexpr int L = I::kLanes;
  typename I::Vector sum[R][C];
  UNROLL
  for (int r = 0; r < R; ++r) {
    UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = I::Load(out + r * D + d + c * L);
  }
  for (int t = begin; t < end;) {
    const int tile = t / kTile, stop = int(Min(end, (tile + 1) * kTile));
    const T* values = reinterpret_cast<const T*>(tiles.values[tile]) + t % kTile * D + d;
    const char* next = tiles.next_keys[tile];
    if (Fetch) next += (size_t(d) * kTile + size_t(t % kTile) * C * L) * sizeof(T);
    for (; t < stop; ++t, values += D) {
      if (Fetch) Prefetch(next, C * L * sizeof(T)), next += C * L * sizeof(T);
      typename I::Vector v[C];
      UNROLL
      for (int c = 0; c < C; ++c) v[c] = I::Load(values + c * L);
      UNROLL
      for (int r = 0; r < R; ++r) {
        const auto weight = I::Set1(weights[r * kPartition + t]);
        UNROLL
        for (int c = 0; c < C; ++c) sum[r][c] = I::Fma(weight, v[c], sum[r][c]);
      }
    }
  }
  UNROLL
  for (int r = 0; r < R; ++r) {
    UNROLL
    for (int c = 0; c < C; ++c) I::Store(out + r * D + d + c * L, sum[r][c]);
  }
}

template <class I, class T, int R, bool Fetch>
void AddValues(const Tiles& tiles, int begin, int end, const float* weights, int D, float* out) {
  if (begin >= end) return;
  constexpr int L = I::kLanes;
  int d = 0;
  for (; d + 2 * L <= D; d += 2 * L) AddChannels<I, T, R, 2, Fetch>(tiles, begin, end, weights, D, d, out);
  for (; d + L <= D; d += L) AddChannels<I, T, R, 1, false>(tiles, begin, end, weights, D, d, out);
  if constexpr (L > 8)
    if (d < D) AddChannels<typename I::Narrow, T, R, 1, false>(tiles, begin, end, weights, D, d, out);
}

// Softmax of some rows (of 256) in their place.
template <class I>
__attribute__((noinline)) void FloatSoftmax(const Group& g, int rows, float* scores) {
  for (int r = 0; r < rows; ++r)
    if (g.Sees(r)) g.max[r] = LargestScore<I>(scores + r * kPartition, g.begin[r], g.end[r]);
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kPartition;
    const auto store = [row](int t, typename I::Vector weights) { I::Store(row + t, weights); };
    g.sum[r] = g.Sees(r) ? Exponentials<I>(row, g.begin[r], g.end[r], g.max[r], store) : 0;
  }
}

template <class I, class T>
struct FloatRows {
  using Stored = T;
  static constexpr int kMaxRows = I::kMaxRows;

  static int64_t QueryFloats(int64_t rows, int64_t head_dim) { return rows * head_dim; }

  // (rows, head_dim) becomes (head_dim, rows).
  static void Load(const float* const* queries, int rows, int D, float* out) {
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < D; ++d) out[d * rows + r] = queries[r][d];
  }

  static void Attend(int rows, const Group& group) { AttendSomeRows<FloatRows>(rows, group); }

  template <int R>
  static void AttendRows(const Group& g) {
    alignas(64) float scores[R * kPartition];
    int all_begin = 0, all_end = kPartition;
    for (int r = 0; r < R; ++r) all_begin = int(Max(all_begin, g.begin[r])), all_end = int(Min(all_end, g.end[r]));
    const Seen seen(g, R);
    auto* score = g.tiles.fetch ? Scores<I, T, R, true> : Scores<I, T, R, false>;
    score(g.tiles, seen.first / kTile, (seen.last + kTile - 1) / kTile, g.queries, g.D, scores);
    FloatSoftmax<I>(g, R, scores);
    std::memset(g.out, 0, sizeof(float) * size_t(R * g.D));
    // Keys that every row sees are added to all rows at once, the few before and after row by row.
    if (all_begin >= all_end) all_begin = all_end = kPartition;
    const auto add_one = [&](int r, int begin, int end) {
      AddValues<I, T, 1, false>(g.tiles, begin, end, scores + r * kPartition, g.D, g.out + r * g.D);
    };
    for (int r = 0; r < R; ++r) add_one(r, g.begin[r], int(Min(g.end[r], all_begin)));
    auto* add = g.tiles.fetch ? AddValues<I, T, R, true> : AddValues<I, T, R, false>;
    add(g.tiles, all_begin, all_end, scores, g.D, g.out);
    for (int r = 0; r < R; ++r) add_one(r, int(Max(g.begin[r], all_end)), g.end[r]);
  }
};

}  // namespace
}  // namespace paged_attention
