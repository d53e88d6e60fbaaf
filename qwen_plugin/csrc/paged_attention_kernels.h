// The kernels of qwen::PagedAttention, for any instruction set `I` (a struct of vector_*.h).
//
// Why a row's bits depend on nothing but its own query and the keys it sees: keys are cut into partitions of 256
// absolute positions. Each (row, partition) is reduced on its own, in an order fixed by the keys' positions, and
// partitions are merged in ascending order. Rows that are computed side by side never meet in a sum, and a key
// that a row does not see never enters it, not even multiplied by zero.
//
// Everything here has internal linkage (see vector_plain.h), for the same reason nothing of the standard library's
// templates is used.
#pragma once
#include <cstring>

#include "paged_attention.h"

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

// ---- Step 1: norm, rotation, write to the pool

// One head of a token: RMS norm with `weight` (if given), rotation of the first 2 * half channels, scale.
template <class I>
inline void PrepareHead(const Problem& p, const float* x, const float* weight, int64_t position, float scale,
                        float* out) {
  using N = typename I::Narrow;
  float head[kMaxHeadDim];
  const int D = int(p.head_dim), half = int(p.rotary_half);
  if (weight != nullptr) {
    float lanes[8] = {};
    for (int d = 0; d < D; d += 8)
      for (int i = 0; i < 8; ++i) lanes[i] += x[d + i] * x[d + i];
    float squares = 0;
    for (const float lane : lanes) squares += lane;
    const float factor = 1.f / __builtin_sqrtf(squares / float(D) + p.epsilon);
    for (int d = 0; d < D; ++d) head[d] = x[d] * factor * weight[d];
    x = head;
  }
  const float *cos = p.cos + position * half, *sin = p.sin + position * half;
  const auto scales = N::Set1(scale), negative_scales = N::Set1(-scale);
  int i = 0;
  for (; i + N::kLanes <= half; i += N::kLanes) {
    const auto a = N::Load(x + i), b = N::Load(x + half + i), c = N::Load(cos + i), s = N::Load(sin + i);
    const auto first = N::Add(N::Mul(N::Mul(a, c), scales), N::Mul(N::Mul(b, s), negative_scales));
    N::Store(out + half + i, N::Mul(N::Add(N::Mul(b, c), N::Mul(a, s)), scales));
    N::Store(out + i, first);
  }
  for (; i < half; ++i) {
    out[i] = x[i] * cos[i] * scale + x[half + i] * sin[i] * -scale;
    out[half + i] = (x[half + i] * cos[i] + x[i] * sin[i]) * scale;
  }
  for (int d = 2 * half; d < D; ++d) out[d] = x[d] * scale;
}

template <class I, class T>
void StoreRow(const float* x, int D, T* out) {
  for (int d = 0; d < D; d += I::Narrow::kLanes) I::Narrow::Store(out + d, I::Narrow::Load(x + d));
}

template <class I, class T>
void WriteTokens(const Problem& p, const TokenRange& range) {
  const int D = int(p.head_dim);
  const int32_t* table = p.block_table + range.sequence * p.max_blocks;
  for (int64_t offset = range.first; offset < range.last; ++offset) {
    const int64_t token = p.cumulative[range.sequence] + offset, position = p.past[range.sequence] + offset;
    const int64_t block = table[position / p.block_size], slot = position % p.block_size;
    const float* x = p.query + token * (p.heads + 2 * p.kv_heads) * D;
    for (int64_t head = 0; head < p.heads; ++head, x += D)
      PrepareHead<I>(p, x, p.q_norm, position, p.scale, p.output + (token * p.heads + head) * D);
    for (int64_t head = 0; head < p.kv_heads; ++head, x += D) {
      float key[kMaxHeadDim];
      T stored[kMaxHeadDim];
      PrepareHead<I>(p, x, p.k_norm, position, 1.f, key);
      StoreRow<I, T>(key, D, stored);
      T* tile = static_cast<T*>(p.key_cache) + (block * p.kv_heads + head) * p.block_size * D +
                slot / kTile * kTile * D + slot % kTile;
      for (int d = 0; d < D; ++d) tile[d * kTile] = stored[d];
      StoreRow<I, T>(x + p.kv_heads * D, D,
                     static_cast<T*>(p.value_cache) + ((block * p.kv_heads + head) * p.block_size + slot) * D);
    }
  }
}

// ---- Step 2: a few rows over one partition

// Where the 32-key tiles of one partition lie. Only those that some row sees are set.
struct Tiles {
  const char* keys[kTilesPerPartition];
  const char* values[kTilesPerPartition];
  const char* next_keys[kTilesPerPartition];  // keys of the partition that comes next, to be fetched on the way
  bool fetch;
};

inline void Prefetch(const char* address, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(address + i, 0, 3);
}

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

// One row's scores become exp(score - max), 0 for keys outside [begin, end).
template <class I>
void Softmax(float* scores, int begin, int end, float* max, float* sum) {
  constexpr int L = I::kLanes, kSums = kTile / L;
  const int first = begin / kTile * kTile, last = (end + kTile - 1) / kTile * kTile;
  for (int t = first; t < begin; ++t) scores[t] = kNegativeInfinity;
  for (int t = end; t < last; ++t) scores[t] = kNegativeInfinity;
  auto most = I::Set1(kNegativeInfinity);
  for (int t = first; t < last; t += L) most = I::Max(I::Load(scores + t), most);
  *max = I::ReduceMax(most);
  const auto negative_max = I::Set1(-*max);
  typename I::Vector sums[kSums];
  UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = I::Zero();
  for (int t = first; t < last; t += kTile) {
    UNROLL
    for (int i = 0; i < kSums; ++i) {
      float* s = scores + t + i * L;
      const auto weight = Exp<I>(I::Add(I::Load(s), negative_max));
      I::Store(s, weight);
      sums[i] = I::Add(sums[i], weight);
    }
  }
  UNROLL
  for (int n = kSums / 2; n > 0; n /= 2) {  // a tree over 32 lanes: the same for every vector width
    for (int i = 0; i < n; ++i) sums[i] = I::Add(sums[i], sums[i + n]);
  }
  *sum = I::ReduceAdd(sums[0]);
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

// R rows over one partition, of which row r sees keys [begin[r], end[r]); queries (head_dim, R).
// Sets max and sum (R) and out (R, head_dim).
template <class I, class T, int R>
void AttendRows(const Tiles& tiles, const int* begin, const int* end, const float* queries, int D, float* max,
                float* sum, float* out) {
  alignas(64) float scores[R * kPartition];
  int first = kPartition, last = 0, all_begin = 0, all_end = kPartition;
  for (int r = 0; r < R; ++r) {
    all_begin = int(Max(all_begin, begin[r])), all_end = int(Min(all_end, end[r]));
    if (begin[r] < end[r]) first = int(Min(first, begin[r])), last = int(Max(last, end[r]));
  }
  auto* score = tiles.fetch ? Scores<I, T, R, true> : Scores<I, T, R, false>;
  score(tiles, first / kTile, (last + kTile - 1) / kTile, queries, D, scores);
  for (int r = 0; r < R; ++r) {
    sum[r] = 0;
    if (begin[r] < end[r]) Softmax<I>(scores + r * kPartition, begin[r], end[r], max + r, sum + r);
  }
  std::memset(out, 0, sizeof(float) * size_t(R * D));
  // Keys that every row sees are added to all rows at once, the few before and after row by row.
  if (all_begin >= all_end) all_begin = all_end = kPartition;
  for (int r = 0; r < R; ++r)
    AddValues<I, T, 1, false>(tiles, begin[r], int(Min(end[r], all_begin)), scores + r * kPartition, D, out + r * D);
  auto* add = tiles.fetch ? AddValues<I, T, R, true> : AddValues<I, T, R, false>;
  add(tiles, all_begin, all_end, scores, D, out);
  for (int r = 0; r < R; ++r)
    AddValues<I, T, 1, false>(tiles, int(Max(begin[r], all_end)), end[r], scores + r * kPartition, D, out + r * D);
}

// AttendRows for `rows` of at most R.
template <class I, class T, int R = I::kMaxRows>
void AttendSomeRows(int rows, const Tiles& tiles, const int* begin, const int* end, const float* queries, int D,
                    float* max, float* sum, float* out) {
  if (rows == R) return AttendRows<I, T, R>(tiles, begin, end, queries, D, max, sum, out);
  if constexpr (R > 1) AttendSomeRows<I, T, R - 1>(rows, tiles, begin, end, queries, D, max, sum, out);
}

// ---- Step 2 and 3: an item over several partitions

struct State {
  float *max, *sum, *out;  // (rows), (rows), (rows, head_dim)
  State(const Problem& p, float* floats, int64_t rows)
      : max(floats + rows * p.head_dim), sum(max + rows), out(floats) {}
};

// Row r of `into` becomes that of its own and of row o of `from`.
template <class I>
void MergeRow(const State& into, int64_t r, const State& from, int64_t o, int D) {
  using N = typename I::Narrow;
  if (from.sum[o] == 0) return;
  if (into.sum[r] == 0) {
    into.max[r] = from.max[o], into.sum[r] = from.sum[o];
    std::memcpy(into.out + r * D, from.out + o * D, sizeof(float) * size_t(D));
    return;
  }
  const float max = from.max[o] > into.max[r] ? from.max[o] : into.max[r];
  const auto old_weight = Exp<N>(N::Set1(into.max[r] - max)), new_weight = Exp<N>(N::Set1(from.max[o] - max));
  float weights[2][N::kLanes];
  N::Store(weights[0], old_weight), N::Store(weights[1], new_weight);
  into.max[r] = max;
  into.sum[r] = into.sum[r] * weights[0][0] + from.sum[o] * weights[1][0];
  for (int d = 0; d < D; d += N::kLanes)
    N::Store(into.out + r * D + d,
             N::Fma(N::Load(from.out + o * D + d), new_weight, N::Mul(N::Load(into.out + r * D + d), old_weight)));
}

template <class I>
void Merge(const Problem& p, const Item& item, float* state, const float* other) {
  const int64_t rows = item.last - item.first;
  const State into(p, state, rows), from(p, const_cast<float*>(other), rows);
  for (int64_t r = 0; r < rows; ++r) MergeRow<I>(into, r, from, r, int(p.head_dim));
}

// Tiles of the positions [begin, end) of one partition.
template <class T>
void FindTiles(const Problem& p, const Item& item, int64_t begin, int64_t end, const char** keys, const char** values) {
  const int32_t* table = p.block_table + item.sequence * p.max_blocks;
  for (int64_t t = begin / kTile * kTile; t < end; t += kTile) {
    const int64_t start = (table[t / p.block_size] * p.kv_heads + item.kv_head) * p.block_size + t % p.block_size;
    const int i = int(t % kPartition / kTile);
    keys[i] = reinterpret_cast<const char*>(static_cast<const T*>(p.key_cache) + start * p.head_dim);
    values[i] = reinterpret_cast<const char*>(static_cast<const T*>(p.value_cache) + start * p.head_dim);
  }
}

template <class I, class T>
void Attend(const Problem& p, const Item& item, PartitionRange partitions, float* floats) {
  const int D = int(p.head_dim), rows = int(item.last - item.first);
  const int groups = (rows + I::kMaxRows - 1) / I::kMaxRows;
  const auto group_start = [&](int group) { return rows * group / groups; };
  const int64_t past = p.past[item.sequence];
  const auto position = [&](int64_t row) { return past + (item.first + row) / p.group; };

  alignas(64) float queries[kMaxItemFloats];  // for each group of rows (head_dim, rows)
  for (int group = 0; group < groups; ++group) {
    const int start = group_start(group), count = group_start(group + 1) - start;
    for (int r = 0; r < count; ++r) {
      const int64_t row = item.first + start + r, token = p.cumulative[item.sequence] + row / p.group;
      const float* query = p.output + (token * p.heads + item.kv_head * p.group + row % p.group) * D;
      for (int d = 0; d < D; ++d) queries[start * D + d * count + r] = query[d];
    }
  }

  const State state(p, floats, rows);
  for (int r = 0; r < rows; ++r) state.sum[r] = 0;
  const int64_t first_key = FirstKey(p, position(0)), last_key = position(rows - 1) + 1;
  for (int64_t partition = partitions.first; partition < partitions.last; ++partition) {
    const int64_t base = partition * kPartition;
    Tiles tiles = {};
    const int64_t first = Max(base, first_key), last = Min(base + kPartition, last_key);
    FindTiles<T>(p, item, first, last, tiles.keys, tiles.values);
    std::memcpy(tiles.next_keys, tiles.keys, sizeof tiles.keys);
    if (last < last_key) {
      const char* ignored[kTilesPerPartition];
      FindTiles<T>(p, item, last, Min(last + kPartition, last_key), tiles.next_keys, ignored);
    }
    for (int group = 0; group < groups; ++group) {
      const int start = group_start(group), count = group_start(group + 1) - start;
      int begin[I::kMaxRows], end[I::kMaxRows];
      bool any = false;
      for (int r = 0; r < count; ++r) {
        const int64_t at = position(start + r);
        begin[r] = int(Min(Max(FirstKey(p, at) - base, 0), kPartition));
        end[r] = int(Min(Max(at + 1 - base, 0), kPartition));
        any |= begin[r] < end[r];
      }
      if (!any) continue;
      tiles.fetch = group == 0;
      alignas(64) float floats_of_part[I::kMaxRows * (kMaxHeadDim + 2)];
      const State part(p, floats_of_part, count);
      AttendSomeRows<I, T>(count, tiles, begin, end, queries + start * D, D, part.max, part.sum, part.out);
      for (int r = 0; r < count; ++r) MergeRow<I>(state, start + r, part, r, D);
    }
  }
}

// ---- Step 4

inline void Finish(const Problem& p, const Item& item, const float* floats) {
  const int64_t rows = item.last - item.first, D = p.head_dim;
  const State state(p, const_cast<float*>(floats), rows);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = item.first + r, token = p.cumulative[item.sequence] + row / p.group;
    float* out = p.output + (token * p.heads + item.kv_head * p.group + row % p.group) * D;
    const float factor = 1.f / state.sum[r];
    for (int64_t d = 0; d < D; ++d) out[d] = state.out[r * D + d] * factor;
  }
}

template <class I>
constexpr Kernels MakeKernels() {
  return {[](const Problem& p, const TokenRange& range) {
            (p.half_cache ? WriteTokens<I, uint16_t> : WriteTokens<I, float>)(p, range);
          },
          [](const Problem& p, const Item& item, PartitionRange partitions, float* state) {
            (p.half_cache ? Attend<I, uint16_t> : Attend<I, float>)(p, item, partitions, state);
          },
          Merge<I>, Finish};
}

}  // namespace
}  // namespace paged_attention
