// The weight of qwen::QuantLinear and qwen::QuantEmbedding: where its bytes lie. A panel is 32 outputs; with G = groups
// and B = block_groups, 1 or, where a block of 128 columns shares a unit of scales, 4 or 2, it is
//   [prefix: G x 16 (4 bits) or 32 bytes (8 bits) of zero points, padded to 64; only if asymmetric and B is 1]
//   blocks of B groups (the last may have fewer):
//     [32 float16 scales or units, times 2^10]
//     [B x 16 bytes of multiples less 1, then of zero points if asymmetric; padded to 64; only if B is not 1]
//     [groups of group_size / 4 steps of 64 (4 bits) or 128 bytes (8 bits)]
// Step j holds columns 4j..4j+3 of its group. Byte 4i+c has, at 4 bits, in its low nibble column 4j+c of output i and
// in its high one that of output i+16; at 8 bits, line h has output 16h+i. Byte i of 16 zero points or multiples is of
// the same outputs. Columns beyond in_features hold the zero point, outputs beyond out_features have scale 0.
// (q - zero point) times its multiple is -128 to 127, whatever q is.
#pragma once
#include <cstddef>
#include <cstdint>

namespace operators {
class Attributes;
struct Tensor;
}  // namespace operators

constexpr int kPanel = 32;  // outputs that lie together
constexpr int kMaxGroup = 128;
constexpr float kScaleUnit = 1.f / 1024;  // of a stored scale
constexpr int64_t kBlockColumns = 128;

static inline int64_t CeilDiv(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

struct QuantWeight {
  int64_t out_features, in_features;
  int64_t group_size, groups;  // groups * group_size is in_features or, padded, more
  int64_t block_groups, blocks;
  int64_t panels, panel_bytes, prefix_bytes;
  int64_t block_bytes, header_bytes, group_bytes;  // of a whole block, of it before its groups, of a group
  int bits;                                        // 4 or 8
  bool symmetric;
  const uint8_t* weight;  // (panels, panel_bytes), at any address
};

// Static, like everything that kernels include: the linker must not pick code compiled for a larger instruction set.
static inline const uint8_t* PanelOf(const QuantWeight& w, int64_t panel) { return w.weight + panel * w.panel_bytes; }
static inline const uint8_t* BlockOf(const QuantWeight& w, const uint8_t* panel, int64_t block) {
  return panel + w.prefix_bytes + block * w.block_bytes;
}
static inline const uint8_t* StepsOf(const QuantWeight& w, const uint8_t* block, int64_t group_of_block) {
  return block + w.header_bytes + group_of_block * w.group_bytes;
}
// Of a group of a block, where those have them.
static inline const uint8_t* MultiplesOf(const uint8_t* block, int64_t group_of_block) {
  return block + 2 * kPanel + group_of_block * 16;
}
static inline const uint8_t* ZeroPointsOf(const QuantWeight& w, const uint8_t* panel, int64_t group) {
  if (w.block_groups == 1) return panel + group * 4 * w.bits;
  const uint8_t* const block = BlockOf(w, panel, group / w.block_groups);
  return MultiplesOf(block, w.block_groups + group % w.block_groups);
}
static inline int SymmetricZeroPoint(const QuantWeight& w) { return 1 << (w.bits - 1); }

// From the attributes N, K, bits, group_size and symmetric; has_blocks: blocks of 128 columns share a unit. Throws
// Error.
QuantWeight ReadWeight(const operators::Attributes& attributes, bool has_blocks);
// Checks the tensor's type and shape. Throws Error.
void SetWeight(QuantWeight& weight, const operators::Tensor& tensor);
