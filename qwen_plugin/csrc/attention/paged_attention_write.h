// Step 1 of qwen::PagedAttention: norm, rotation, write to the pool.
#pragma once
#include "attention/paged_attention_softmax.h"

namespace paged_attention {
namespace {

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

// Where the key and value of one token and kv head lie. T: element type of the pools.
template <class T>
struct Slot {
  T *key, *value;
  float *key_scale, *value_scale;  // of an int8 pool

  Slot(const Problem& p, int64_t block, int64_t head, int64_t slot)
      : key(static_cast<T*>(p.key_cache)), value(static_cast<T*>(p.value_cache)) {
    const int64_t start = (block * p.kv_heads + head) * p.block_size, in_tile = slot % kTile, in_four = slot % 4;
    constexpr bool kFours = sizeof(T) == 1;
    key += (start + slot - in_tile) * p.head_dim + (kFours ? 4 : 1) * in_tile;
    value += kFours ? (start + slot - in_four) * p.head_dim + in_four : (start + slot) * p.head_dim;
    if (kFours) key_scale = p.key_scale + start + slot, value_scale = p.value_scale + start + slot;
  }
};

template <class I, class T>
void StoreToken(const float* key, const float* value, int D, const Slot<T>& slot) {
  using N = typename I::Narrow;
  T stored[kMaxHeadDim];
  for (int d = 0; d < D; d += N::kLanes) N::Store(stored + d, N::Load(key + d));
  for (int d = 0; d < D; ++d) slot.key[d * kTile] = stored[d];
  for (int d = 0; d < D; d += N::kLanes) N::Store(slot.value + d, N::Load(value + d));
}

template <class I>
void StoreToken(const float* key, const float* value, int D, const Slot<int8_t>& slot) {
  int16_t stored[kMaxHeadDim];
  *slot.key_scale = Quantize<typename I::Narrow>(key, D, 127.f, stored);
  for (int d = 0; d < D; ++d) slot.key[d / 4 * 4 * kTile + d % 4] = int8_t(stored[d]);
  *slot.value_scale = Quantize<typename I::Narrow>(value, D, 127.f, stored);
  for (int d = 0; d < D; ++d) slot.value[4 * d] = int8_t(stored[d]);
}

template <class I, class T>
void WriteTokens(const Problem& p, const TokenRange& range) {
  const int D = int(p.head_dim);
  const int32_t* table = p.block_table + range.sequence * p.max_blocks;
  for (int64_t offset = range.first; offset < range.last; ++offset) {
    const int64_t token = p.cumulative[range.sequence] + offset, position = p.past[range.sequence] + offset;
    const int64_t block = table[position / p.block_size];
    const float* x = p.query + token * (p.heads + 2 * p.kv_heads) * D;
    for (int64_t head = 0; head < p.heads; ++head, x += D)
      PrepareHead<I>(p, x, p.q_norm, position, p.scale, p.output + (token * p.heads + head) * D);
    for (int64_t head = 0; head < p.kv_heads; ++head, x += D) {
      float key[kMaxHeadDim];
      PrepareHead<I>(p, x, p.k_norm, position, 1.f, key);
      StoreToken<I>(key, x + p.kv_heads * D, D, Slot<T>(p, block, head, position % p.block_size));
    }
  }
}

}  // namespace
}  // namespace paged_attention
