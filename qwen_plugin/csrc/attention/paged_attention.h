// qwen::PagedAttention: what the operator (paged_attention.cc) hands to its kernels (one set an instruction set).
#pragma once
#include <cstdint>

#include "operator/ort_abi.h"
#include "operator/threads.h"

namespace paged_attention {

constexpr int kTile = 32;  // keys that lie transposed together, (head_dim, 32)
constexpr int kPartition = 256;
constexpr int kTilesPerPartition = kPartition / kTile;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxItemRows = 256, kMaxItemFloats = 16384;  // an item's queries: at most 64 KiB

// What the pools hold.
enum class Element { kFloat32, kFloat16, kInt8 };

// One call of the operator; everything in it has been checked.
//
// A "row" is one query head of one new token. The rows of a sequence that share kv head k are numbered
// token * group + g, where g is the query head k * group + g.
struct Problem {
  int64_t heads, kv_heads, group, head_dim, block_size;
  int64_t rotary_half;  // cos and sin are (positions, rotary_half); 0: no rotation
  int64_t window;       // a query at position p sees keys p - window + 1 .. p
  float scale, epsilon;
  Element element;

  const float* query;  // (T, (heads + 2 * kv_heads) * head_dim)
  float* output;       // (T, heads * head_dim); between the two steps it holds the rotated queries
  void* key_cache;     // (num_blocks, kv_heads, block_size / 32, head_dim, 32)
  void* value_cache;   // (num_blocks, kv_heads, block_size, head_dim)
  // (num_blocks, kv_heads, block_size), with int8 pools only. What these hold is multiplied by the token's scale, and
  // lies in fours: keys (block_size / 32, head_dim / 4, 32, 4), values (block_size / 4, head_dim, 4).
  float *key_scale, *value_scale;
  const float *cos, *sin, *q_norm, *k_norm;
  const int32_t *cumulative, *past, *block_table;
  int64_t max_blocks;  // width of the block table
};

// First and last + 1 position that the query at `position` sees.
static inline int64_t FirstKey(const Problem& p, int64_t position) {
  return position >= p.window ? position - p.window + 1 : 0;
}

// New tokens [first, last) of one sequence, counted from its first new one.
struct TokenRange {
  int64_t sequence, first, last;
};

// Rows [first, last) of one sequence and kv head.
struct Item {
  int64_t sequence, kv_head, first, last;
};

// Partitions [first, last) that the rows of an item see.
struct PartitionRange {
  int64_t first, last;
};

static inline PartitionRange Partitions(const Problem& p, const Item& item) {
  const int64_t past = p.past[item.sequence];
  return {FirstKey(p, past + item.first / p.group) / kPartition, (past + (item.last - 1) / p.group) / kPartition + 1};
}

// Softmax of an item's rows over some of their keys, not yet normalised: for each row the maximum of its scores,
// the sum of exp(score - maximum) and the values weighted with it. A sum of 0: no key yet.
static inline int64_t StateFloats(const Problem& p, int64_t rows) { return rows * (p.head_dim + 2); }

struct Kernels {
  // Step 1: norm and rotation; queries go to the output, keys and values to the pool. One for each Element.
  void (*write_tokens[3])(const Problem&, const TokenRange&);
  // Step 2, once every token of the sequence is written: an item over some partitions, ascending, into `state`.
  void (*attend[3])(const Problem&, const Item&, PartitionRange, float* state);
  // Step 3: `state` becomes that of its own and the `other` keys, which all come later.
  void (*merge)(const Problem&, const Item&, float* state, const float* other);
  // Step 4: normalises a state into the output.
  void (*finish)(const Problem&, const Item&, const float* state);
};

// Memory of the calling thread, aligned to 64; what it held before is lost if it was smaller. It may throw
// std::bad_alloc.
void* ThreadScratch(int64_t bytes);

extern const Kernels kPlainKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
// `attend` for int8 pools, to the same bits.
void AmxAttendInt8(const Problem&, const Item&, PartitionRange, float* state);
// `attend` for float16 pools, to other bits than the vector kernels', so for any number of rows. Queries and softmax
// weights keep 16 of their 24 bits: a score is off by up to 2^-15 of the sum of its products' magnitudes, which makes
// errors of about 1e-5 of the values where scores are below 1.
void AmxAttendFloat16(const Problem&, const Item&, PartitionRange, float* state);
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

// A declaration, as those of quant_operators.h.
const OrtCustomOp* NewOperator(const OrtApi& api, SessionThreads& threads);

}  // namespace paged_attention
