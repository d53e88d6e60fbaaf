#include "quant_weight.h"

#include <string>

#include "operator.h"

QuantWeight ReadWeight(const operators::Attributes& attributes) {
  constexpr int64_t kMost = int64_t(1) << 30;
  QuantWeight w = {};
  w.out_features = attributes.Int("N", 0, 1, kMost);
  w.in_features = attributes.Int("K", 0, 1, kMost);
  w.bits = int(attributes.Int("bits", 0, 4, 8));
  if (w.bits != 4 && w.bits != 8) attributes.Refuse("bits", std::to_string(w.bits), "4 or 8");
  w.group_size = attributes.Int("group_size", 0, 32, kMaxGroup);
  if (w.group_size != 32 && w.group_size != 64 && w.group_size != 128)
    attributes.Refuse("group_size", std::to_string(w.group_size), "32, 64 or 128");
  w.symmetric = attributes.Int("symmetric", -1, 0, 1) == 1;
  w.groups = (w.in_features + w.group_size - 1) / w.group_size;
  w.panels = (w.out_features + kPanel - 1) / kPanel;
  w.zero_point_bytes = w.symmetric ? 0 : (w.groups * 4 * w.bits + 63) / 64 * 64;
  w.block_bytes = 2 * kPanel + w.group_size * 4 * w.bits;
  w.panel_bytes = w.zero_point_bytes + w.groups * w.block_bytes;
  return w;
}

void SetWeight(QuantWeight& w, const operators::Tensor& tensor) {
  tensor.Require();
  tensor.Expect(operators::kUint8, {w.panels, w.panel_bytes},
                "(panels, panel_bytes) of N, K, bits, group_size and symmetric");
  w.weight = tensor.as<uint8_t>();
}
