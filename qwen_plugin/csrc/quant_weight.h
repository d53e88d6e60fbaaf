// The weight of qwen::QuantLinear and qwen::QuantEmbedding: sizes in its bytes. quant_linear.h says what they hold.
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

struct QuantWeight {
  int64_t out_features, in_features;
  int64_t group_size, groups;  // groups * group_size is in_features or, padded, more
  int64_t panels, zero_point_bytes, block_bytes, panel_bytes;
  int bits;  // 4 or 8
  bool symmetric;
  const uint8_t* weight;  // (panels, panel_bytes), at any address
};

// Static, like everything that kernels include: the linker must not pick code compiled for a larger instruction set.
static inline const uint8_t* PanelOf(const QuantWeight& w, int64_t panel) { return w.weight + panel * w.panel_bytes; }
static inline int SymmetricZeroPoint(const QuantWeight& w) { return 1 << (w.bits - 1); }

// From the attributes N, K, bits, group_size and symmetric. Throws Error.
QuantWeight ReadWeight(const operators::Attributes& attributes);
// Checks the tensor's type and shape. Throws Error.
void SetWeight(QuantWeight& weight, const operators::Tensor& tensor);
