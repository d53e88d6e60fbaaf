// Rows over one partition of int8 pools: queries and softmax weights are rounded to 16 bits, so that every product and
// sum with keys and values is exact in int32, on every instruction set, in any order.
#pragma once
#include "attention/paged_attention_softmax.h"

namespace paged_attention {
namespace {

// Largest magnitude of a rounded query or weight: 256 * 127 + 127, two bytes with a sign. A sum of 256 products with
// int8 stays below 2^30.
constexpr float kLevels = 32639;

constexpr int kMostRows = 16;  // of a group, whatever the instruction set

// scores (R rows of 256) of tiles [first, last); queries (head_dim / 4, R, 4). Fetches the tiles' values on the way.
template <class I, int R, bool Fetch>
__attribute__((noinline)) void Int8Scores(const Tiles& tiles, int first, int last, const int16_t* queries,
                                          const float* query_steps, int D, float* scores) {
  constexpr int L = I::kLanes;
  for (int b = first; b < last; ++b) {
    for (int lane = 0; lane < kTile; lane += L) {
      const int8_t* keys = reinterpret_cast<const int8_t*>(tiles.keys[b]) + 4 * lane;
      const int16_t* q = queries;
      typename I::Sums sum[R][2];
      UNROLL
      for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = I::ZeroSums();
      for (int d = 0; d < D; d += 4, keys += 4 * kTile, q += 4 * R) {
        if (Fetch && lane == 0) Prefetch(tiles.values[b] + d * kTile, 4 * kTile);
        const auto k0 = I::LoadWords(keys), k1 = I::LoadWords(keys + 2 * L);
        UNROLL
        for (int r = 0; r < R; ++r) {
          const auto x = I::Repeat4(q + 4 * r);
          sum[r][0] = I::AddProducts(sum[r][0], k0, x);
          sum[r][1] = I::AddProducts(sum[r][1], k1, x);
        }
      }
      const auto key_steps = I::Load(tiles.key_scales[b] + lane);
      UNROLL
      for (int r = 0; r < R; ++r) {
        const auto dot = I::AddNeighbours(sum[r][0], sum[r][1]);
        I::Store(scores + r * kPartition + b * kTile + lane, I::Mul(I::Mul(dot, I::Set1(query_steps[r])), key_steps));
      }
    }
  }
}

// Softmax of some rows (of 256): their weights times the values' scales, as multiples of a step for each row. Calls
// between() three times a row.
template <class I, class Between>
__attribute__((noinline)) void RoundedSoftmax(const Group& g, int rows, float* scores, int16_t* weights, float* steps,
                                              const Between& between) {
  float inverses[kMostRows];
  for (int r = 0; r < rows; ++r) {
    between();
    if (g.Sees(r)) g.max[r] = LargestScore<I>(scores + r * kPartition, g.begin[r], g.end[r]);
  }
  for (int r = 0; r < rows; ++r) {
    between();
    g.sum[r] = steps[r] = 0;
    if (!g.Sees(r)) continue;
    float* row = scores + r * kPartition;
    auto largest = I::Zero();
    g.sum[r] = Exponentials<I>(row, g.begin[r], g.end[r], g.max[r], [&](int t, typename I::Vector weight) {
      // A hidden key has weight 0, whatever its scale is.
      const auto scaled =
          I::MulOrZero(weight, I::Load(g.tiles.value_scales[unsigned(t) / kTile] + unsigned(t) % kTile));
      I::Store(row + t, scaled);
      largest = I::MaxMagnitude(scaled, largest);
    });
    const Step step(I::ReduceMaxMagnitude(largest), kLevels);
    steps[r] = step.size, inverses[r] = step.inverse;
  }
  std::memset(weights, 0, sizeof(int16_t) * kPartition * size_t(rows));
  for (int r = 0; r < rows; ++r) {
    between();
    if (!g.Sees(r)) continue;
    const int first = g.begin[r] / kTile * kTile, last = (g.end[r] + kTile - 1) / kTile * kTile;
    for (int t = r * kPartition + first; t < r * kPartition + last; t += I::kLanes)
      I::StoreWords(weights + t, I::Mul(I::Load(scores + t), I::Set1(inverses[r])));
  }
}

// out (R rows of head_dim), I::kLanes channels from d: weights * values of keys [first, last), multiples of 4.
template <class I, int R, bool Fetch>
__attribute__((noinline)) void AddInt8Channels(const Tiles& tiles, int first, int last, const int16_t* weights,
                                               const float* weight_steps, int D, int d, float* out) {
  constexpr int L = I::kLanes;
  typename I::Sums sum[R][2];
  UNROLL
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = I::ZeroSums();
  for (int t = first; t < last;) {
    const int tile = t / kTile, stop = int(Min(last, (tile + 1) * kTile));
    const int8_t* values = reinterpret_cast<const int8_t*>(tiles.values[tile]) + t % kTile * D + 4 * d;
    const char* next = tiles.next_keys[tile];
    if (Fetch) next += d * kTile + t % kTile * L;
    for (; t < stop; t += 4, values += 4 * D) {
      if (Fetch) Prefetch(next, 4 * L), next += 4 * L;
      const auto v0 = I::LoadWords(values), v1 = I::LoadWords(values + 2 * L);
      UNROLL
      for (int r = 0; r < R; ++r) {
        const auto x = I::Repeat4(weights + r * kPartition + t);
        sum[r][0] = I::AddProducts(sum[r][0], v0, x);
        sum[r][1] = I::AddProducts(sum[r][1], v1, x);
      }
    }
  }
  UNROLL
  for (int r = 0; r < R; ++r)
    I::Store(out + r * D + d, I::Mul(I::AddNeighbours(sum[r][0], sum[r][1]), I::Set1(weight_steps[r])));
}

template <class I>
struct Int8Rows {
  using Stored = int8_t;
  static constexpr int kMaxRows = I::kMaxRows;

  static int64_t QueryFloats(int64_t rows, int64_t head_dim) { return rows * (head_dim / 2 + 1); }

  // (rows, head_dim) becomes int16 (head_dim / 4, rows, 4), after the (rows) steps that these are multiples of.
  static void Load(const float* const* queries, int rows, int D, float* out) {
    int16_t *numbers = reinterpret_cast<int16_t*>(out + rows), row[kMaxHeadDim];
    for (int r = 0; r < rows; ++r) {
      out[r] = Quantize<typename I::Narrow>(queries[r], D, kLevels, row);
      for (int d = 0; d < D; d += 4) std::memcpy(numbers + d * rows + 4 * r, row + d, 4 * sizeof(int16_t));
    }
  }

  static void Attend(int rows, const Group& group) { AttendSomeRows<Int8Rows>(rows, group); }

  template <int R>
  static void AttendRows(const Group& g) {
    alignas(64) float scores[R * kPartition];
    alignas(64) int16_t weights[R * kPartition];
    float steps[R];
    const Seen seen(g, R);
    auto* score = g.tiles.fetch ? Int8Scores<I, R, true> : Int8Scores<I, R, false>;
    score(g.tiles, seen.first / kTile, (seen.last + kTile - 1) / kTile, reinterpret_cast<const int16_t*>(g.queries + R),
          g.queries, g.D, scores);
    RoundedSoftmax<I>(g, R, scores, weights, steps, [] {});
    const int first = seen.first / 4 * 4, last = (seen.last + 3) / 4 * 4;
    auto* add = g.tiles.fetch ? AddInt8Channels<I, R, true> : AddInt8Channels<I, R, false>;
    int d = 0;
    for (; d + I::kLanes <= g.D; d += I::kLanes) add(g.tiles, first, last, weights, steps, g.D, d, g.out);
    if constexpr (I::kLanes > 8)
      if (d < g.D) AddInt8Channels<typename I::Narrow, R, false>(g.tiles, first, last, weights, steps, g.D, d, g.out);
  }
};

}  // namespace
}  // namespace paged_attention
