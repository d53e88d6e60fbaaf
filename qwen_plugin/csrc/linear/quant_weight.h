// The weight of qwen::QuantLinear and qwen::QuantEmbedding: where its bytes lie. A panel is 32 outputs; with G = groups
// and B = block_groups, 1 or, where a block of 128 columns shares a unit of scales, 4 or 2, it is
//   [prefix: G x 16 (4 bits) or 32 bytes (more) of zero points, padded to 64; only if asymmetric and B is 1]
//   blocks of B groups (the last may have fewer):
//     [32 float16 scales or units, times 2^10]
//     [B x 16 bytes of multiples less 1, then of zero points if asymmetric; padded to 64; only if B is not 1]
//     [groups of group_size / 4 steps, each of 16 bytes a bit]
// Step j holds columns 4j..4j+3 of its group. Byte 4i+c has, at 4 bits, in its low nibble column 4j+c of output i and
// in its high one that of output i+16; at 8 bits, line h has output 16h+i. Byte i of 16 zero points or multiples is of
// the same outputs. Columns beyond in_features hold the zero point, outputs beyond out_features have scale 0.
// (q - zero point) times its multiple is -128 to 127, whatever q is.
//
// At 5 and 6 bits, units of 4 and 2 steps have a line for each and one more: UnpackStep says how they lie. In blocks
// the upper bits of a zero point lie above the multiple, in its nibble.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

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
  int bits;                                        // 4, 5, 6 or 8
  bool symmetric;
  const uint8_t* weight;  // (panels, panel_bytes), at any address
};

// A group's zero points, where they do not lie in blocks.
static inline constexpr int ZeroPointBytes(int bits) { return bits == 4 ? kPanel / 2 : kPanel; }

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
  if (w.block_groups == 1) return panel + group * ZeroPointBytes(w.bits);
  const uint8_t* const block = BlockOf(w, panel, group / w.block_groups);
  return MultiplesOf(block, w.block_groups + group % w.block_groups);
}
static inline int SymmetricZeroPoint(const QuantWeight& w) { return 1 << (w.bits - 1); }

// Steps that share lines, and the lines of so many.
constexpr int UnitSteps(int bits) { return bits == 5 ? 4 : bits == 6 ? 2 : 1; }
constexpr int UnitLines(int bits) { return bits == 8 ? 2 : bits == 4 ? 1 : UnitSteps(bits) + 1; }

// The integers of step s of a unit of 5 or 6 bits: of the first half in q[0], of the second, times 2^(8 - bits), in
// q[1]. V is a vector of bytes: its shifts may take bits from byte to byte, and Choose takes bits of a where the mask
// has them.
template <int kBits, class V>
static inline __attribute__((always_inline)) void UnpackStep(const typename V::Bytes* lines, int s,
                                                             typename V::Bytes* q) {
  if constexpr (kBits == 5) {
    constexpr int kAll = 0xf8;
    q[0] = V::And(lines[s], 31);
    if (s == 0) q[1] = V::And(lines[4], kAll);
    if (s == 1) q[1] = V::And(V::Choose(0xe0, lines[0], V::template Right<3>(lines[1])), kAll);
    if (s == 2) q[1] = V::And(V::Choose(0xe0, lines[2], V::template Right<3>(lines[3])), kAll);
    if (s == 3) {
      const auto rest = V::Choose(0xf0, V::template Right<1>(lines[1]), V::template Right<2>(lines[3]));
      q[1] = V::And(V::Choose(0xe0, V::template Left<5>(lines[4]), rest), kAll);
    }
  } else {
    constexpr int kAll = 0xfc;
    q[0] = V::And(lines[s], 63);
    if (s == 0) q[1] = V::And(lines[2], kAll);
    if (s == 1) {
      const auto rest = V::Choose(0xf0, V::template Left<4>(lines[2]), V::template Right<4>(lines[1]));
      q[1] = V::And(V::Choose(0xc0, lines[0], rest), kAll);
    }
  }
}

// Four bytes, those of an output's four columns.
struct FourBytes {
  using Bytes = uint32_t;
  static constexpr uint32_t Each(int mask) { return uint32_t(mask) * 0x01010101u; }
  static Bytes And(Bytes a, int mask) { return a & Each(mask); }
  static Bytes Choose(int mask, Bytes a, Bytes b) { return (a & Each(mask)) | (b & ~Each(mask)); }
  template <int kCount>
  static Bytes Left(Bytes a) {
    return a << kCount;
  }
  template <int kCount>
  static Bytes Right(Bytes a) {
    return a >> kCount;
  }
};

// The integers of an output (of 32) in step j of a group, four columns; `steps` are those of the group.
template <int kBits>
static inline void UnpackColumns(const uint8_t* steps, int64_t j, int output, uint8_t* q) {
  constexpr int kUnit = UnitSteps(kBits), kLines = UnitLines(kBits), kLine = 2 * kPanel;
  const int half = output / 16, s = int(j % kUnit);
  uint32_t lines[kLines], both[2];
  for (int i = 0; i < kLines; ++i)
    std::memcpy(&lines[i], steps + (j / kUnit * kLines + i) * kLine + output % 16 * 4, sizeof lines[i]);
  if constexpr (kBits == 8) {
    both[0] = lines[0], both[1] = lines[1];
  } else if constexpr (kBits == 4) {
    both[0] = FourBytes::And(lines[0], 15), both[1] = FourBytes::And(lines[0] >> 4, 15);
  } else {
    UnpackStep<kBits, FourBytes>(lines, s, both);
    both[1] >>= 8 - kBits;
  }
  std::memcpy(q, &both[half], sizeof both[half]);
}
// The same of all outputs: byte 4i+c of q[h] is column c of output 16h+i.
template <int kBits>
static inline void UnpackAll(const uint8_t* steps, int64_t j, uint8_t (*q)[2 * kPanel]) {
  for (int output = 0; output < kPanel; ++output)
    UnpackColumns<kBits>(steps, j, output, q[output / 16] + output % 16 * 4);
}

// Of a group of a block, an output's multiple and, unless symmetric, its zero point.
struct BlockNumbers {
  int multiple, zero_point;
};
static inline BlockNumbers NumbersOf(const QuantWeight& w, const uint8_t* block, int64_t group_of_block, int output) {
  const int shift = output < 16 ? 0 : 4, most = 256 >> w.bits;
  const int nibble = MultiplesOf(block, group_of_block)[output % 16] >> shift & 15;
  int zero_point = SymmetricZeroPoint(w);
  if (!w.symmetric) {
    const int low = MultiplesOf(block, w.block_groups + group_of_block)[output % 16] >> shift & 15;
    zero_point = low | nibble >> (8 - w.bits) << 4;
  }
  return {(nibble & (most - 1)) + 1, zero_point};
}
// The zero point of an output in a group of a panel.
static inline int ZeroPointOf(const QuantWeight& w, const uint8_t* panel, int64_t group, int output) {
  if (w.block_groups > 1)
    return NumbersOf(w, BlockOf(w, panel, group / w.block_groups), group % w.block_groups, output).zero_point;
  if (w.symmetric) return SymmetricZeroPoint(w);
  const uint8_t* const bytes = panel + group * ZeroPointBytes(w.bits);
  return w.bits == 4 ? bytes[output % 16] >> (output < 16 ? 0 : 4) & 15 : bytes[output];
}

constexpr int64_t kMostFeatures = int64_t(1) << 30;

// From the attributes bits, group_size and symmetric, with `prefix` before each name; has_blocks: blocks of 128 columns
// share a unit. Throws Error.
QuantWeight ReadWeight(const operators::Attributes& attributes, const char* prefix, int64_t out_features,
                       int64_t in_features, bool has_blocks);
// Checks the tensor's type and shape. Throws Error.
void SetWeight(QuantWeight& weight, const operators::Tensor& tensor);
