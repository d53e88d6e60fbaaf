// The kernels of qwen::PagedAttention, for any instruction set `I` (a struct of vector_*.h).
//
// Why a row's bits depend on nothing but its own query and the keys it sees: keys are cut into partitions of 256
// absolute positions. Each (row, partition) is reduced on its own, in an order fixed by the keys' positions, and
// partitions are merged in ascending order. Rows that are computed side by side never meet in a sum, and a key
// that a row does not see never enters it, not even multiplied by zero.

#pragma once
#include "attention/paged_attention_float.h"
#include "attention/paged_attention_int8.h"
#include "attention/paged_attention_write.h"

namespace paged_attention {
namespace {

// ---- Step 2 and 3: an item over several partitions

// Row r of an item in the output, where its query lies until the attention takes its place.
inline float* Row(const Problem& p, const Item& item, int64_t r) {
  const int64_t row = item.first + r, token = p.cumulative[item.sequence] + row / p.group;
  return p.output + (token * p.heads + item.kv_head * p.group + row % p.group) * p.head_dim;
}

struct State {
  float *max, *sum, *out;  // (rows), (rows), (rows, head_dim)
  State(const Problem& p, float* floats, int64_t rows)
      : max(floats + rows * p.head_dim), sum(max + rows), out(floats) {}
};

// Rows [first, first + rows) of `into` become those of their own and of the first rows of `from`.
template <class I>
void MergeRows(const State& into, int64_t first, const State& from, int64_t rows, int D) {
  using N = typename I::Narrow;
  constexpr int L = N::kLanes;
  for (int64_t begin = 0; begin < rows; begin += L) {
    const int64_t count = Min(L, rows - begin);
    float old_weights[L] = {}, new_weights[L] = {}, largest[L];
    for (int64_t i = 0; i < count; ++i) {
      if (from.sum[begin + i] == 0 || into.sum[first + begin + i] == 0) continue;  // which then have no maximum
      const float max = into.max[first + begin + i], other = from.max[begin + i];
      largest[i] = other > max ? other : max;
      old_weights[i] = max - largest[i], new_weights[i] = other - largest[i];
    }
    N::Store(old_weights, Exp<N>(N::Load(old_weights))), N::Store(new_weights, Exp<N>(N::Load(new_weights)));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = first + begin + i, o = begin + i;
      float *const out = into.out + r * D, *const other = from.out + o * D;
      if (from.sum[o] == 0) continue;
      if (into.sum[r] == 0) {
        into.max[r] = from.max[o], into.sum[r] = from.sum[o];
        std::memcpy(out, other, sizeof(float) * size_t(D));
        continue;
      }
      into.max[r] = largest[i];
      into.sum[r] = into.sum[r] * old_weights[i] + from.sum[o] * new_weights[i];
      int d = 0;
      for (; d + I::kLanes <= D; d += I::kLanes)
        I::Store(out + d, I::Fma(I::Load(other + d), I::Set1(new_weights[i]),
                                 I::Mul(I::Load(out + d), I::Set1(old_weights[i]))));
      for (; d < D; d += L)
        N::Store(out + d, N::Fma(N::Load(other + d), N::Set1(new_weights[i]),
                                 N::Mul(N::Load(out + d), N::Set1(old_weights[i]))));
    }
  }
}

template <class I>
void Merge(const Problem& p, const Item& item, float* state, const float* other) {
  const int64_t rows = item.last - item.first;
  MergeRows<I>(State(p, state, rows), 0, State(p, const_cast<float*>(other), rows), rows, int(p.head_dim));
}

// Tiles of the positions [begin, end) of one partition.
template <class T>
void FindTiles(const Problem& p, const Item& item, int64_t begin, int64_t end, Tiles* tiles) {
  const int32_t* table = p.block_table + item.sequence * p.max_blocks;
  for (int64_t t = begin / kTile * kTile; t < end; t += kTile) {
    const int64_t start = (table[t / p.block_size] * p.kv_heads + item.kv_head) * p.block_size + t % p.block_size;
    const int i = int(t % kPartition / kTile);
    tiles->keys[i] = reinterpret_cast<const char*>(static_cast<const T*>(p.key_cache) + start * p.head_dim);
    tiles->values[i] = reinterpret_cast<const char*>(static_cast<const T*>(p.value_cache) + start * p.head_dim);
    if (sizeof(T) == 1) tiles->key_scales[i] = p.key_scale + start, tiles->value_scales[i] = p.value_scale + start;
  }
}

template <class I, class Rows>
void Attend(const Problem& p, const Item& item, PartitionRange partitions, float* floats) {
  using T = typename Rows::Stored;
  const int D = int(p.head_dim), rows = int(item.last - item.first);
  const int groups = (rows + Rows::kMaxRows - 1) / Rows::kMaxRows;
  const auto group_start = [&](int group) { return rows * group / groups; };
  const int64_t past = p.past[item.sequence];
  const auto position = [&](int64_t row) { return past + (item.first + row) / p.group; };

  alignas(64) float queries[kMaxItemFloats / 2 * 3];  // with what QueryFloats adds
  float* next_queries = queries;
  for (int group = 0; group < groups; ++group) {
    const int start = group_start(group), count = group_start(group + 1) - start;
    const float* from[Rows::kMaxRows];
    for (int r = 0; r < count; ++r) from[r] = Row(p, item, start + r);
    Rows::Load(from, count, D, next_queries);
    next_queries += Rows::QueryFloats(count, D);
  }

  const State state(p, floats, rows);
  for (int r = 0; r < rows; ++r) state.sum[r] = 0;
  const int64_t first_key = FirstKey(p, position(0)), last_key = position(rows - 1) + 1;
  for (int64_t partition = partitions.first; partition < partitions.last; ++partition) {
    const int64_t base = partition * kPartition;
    const int64_t first = Max(base, first_key), last = Min(base + kPartition, last_key);
    Tiles tiles = {}, next = {};
    FindTiles<T>(p, item, first, last, &tiles);
    if (last < last_key) FindTiles<T>(p, item, last, Min(last + kPartition, last_key), &next);
    for (int i = 0; i < kTilesPerPartition; ++i) {
      tiles.next_keys[i] = next.keys[i] ? next.keys[i] : tiles.keys[i];
      if (sizeof(T) == 1) Prefetch(tiles.value_scales[i]), Prefetch(next.key_scales[i]);
    }
    tiles.first = int(first - base), tiles.last = int(last - base), tiles.keep = groups > 1;
    tiles.all_first = int(Max(FirstKey(p, position(rows - 1)) - base, 0));
    tiles.all_last = int(Min(position(0) + 1 - base, kPartition));
    const float* group_queries = queries;
    for (int group = 0; group < groups; ++group) {
      const int start = group_start(group), count = group_start(group + 1) - start;
      int begin[Rows::kMaxRows], end[Rows::kMaxRows];
      bool any = false;
      for (int r = 0; r < count; ++r) {
        const int64_t at = position(start + r);
        begin[r] = int(Min(Max(FirstKey(p, at) - base, 0), kPartition));
        end[r] = int(Min(Max(at + 1 - base, 0), kPartition));
        any |= begin[r] < end[r];
      }
      if (any) {
        tiles.fetch = group == 0;
        alignas(64) float floats_of_part[Rows::kMaxRows * (kMaxHeadDim + 2)];
        const State part(p, floats_of_part, count);
        Rows::Attend(count, {tiles, begin, end, group_queries, D, p.block_size, part.max, part.sum, part.out});
        MergeRows<I>(state, start, part, count, D);
      }
      group_queries += Rows::QueryFloats(count, D);
    }
  }
}

// ---- Step 4

inline void Finish(const Problem& p, const Item& item, const float* floats) {
  const int64_t rows = item.last - item.first, D = p.head_dim;
  const State state(p, const_cast<float*>(floats), rows);
  for (int64_t r = 0; r < rows; ++r) {
    float* out = Row(p, item, r);
    const float factor = 1.f / state.sum[r];
    for (int64_t d = 0; d < D; ++d) out[d] = state.out[r * D + d] * factor;
  }
}

template <class I>
constexpr Kernels MakeKernels() {
  using Float32 = FloatRows<I, float>;
  using Float16 = FloatRows<I, uint16_t>;
  using Int8 = Int8Rows<I>;
  return {{WriteTokens<I, float>, WriteTokens<I, uint16_t>, WriteTokens<I, int8_t>},
          {Attend<I, Float32>, Attend<I, Float16>, Attend<I, Int8>},
          Merge<I>,
          Finish};
}

}  // namespace
}  // namespace paged_attention
