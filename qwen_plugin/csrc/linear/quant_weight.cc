#include "linear/quant_weight.h"

#include <string>

#include "operator/operator.h"

QuantWeight ReadWeight(const operators::Attributes& attributes, const char* prefix, int64_t out_features,
                       int64_t in_features, bool has_blocks) {
  const std::string before = prefix;
  const std::string bits = before + "bits", group_size = before + "group_size", symmetric = before + "symmetric";
  QuantWeight w = {};
  w.out_features = out_features;
  w.in_features = in_features;
  w.bits = int(attributes.Int(bits.c_str(), 0, 4, 8));
  if (w.bits == 7) attributes.Refuse(bits.c_str(), std::to_string(w.bits), "4, 5, 6 or 8");
  w.group_size = attributes.Int(group_size.c_str(), 0, 32, kMaxGroup);
  if (w.group_size != 32 && w.group_size != 64 && w.group_size != 128)
    attributes.Refuse(group_size.c_str(), std::to_string(w.group_size), "32, 64 or 128");
  w.symmetric = attributes.Int(symmetric.c_str(), -1, 0, 1) == 1;
  if (has_blocks && w.bits == 8)
    attributes.Refuse(bits.c_str(), std::to_string(w.bits), "4, 5 or 6, as scales are of blocks");
  if (has_blocks && w.group_size >= kBlockColumns)
    attributes.Refuse(group_size.c_str(), std::to_string(w.group_size), "32 or 64, as scales are of blocks");
  const auto lines = [&](int64_t bytes) { return CeilDiv(bytes, 64) * 64; };
  w.groups = CeilDiv(w.in_features, w.group_size);
  w.block_groups = has_blocks ? kBlockColumns / w.group_size : 1;
  w.blocks = CeilDiv(w.groups, w.block_groups);
  w.panels = CeilDiv(w.out_features, kPanel);
  w.group_bytes = w.group_size * 4 * w.bits;
  w.header_bytes = 2 * kPanel + (has_blocks ? lines(w.block_groups * (w.symmetric ? 16 : 32)) : 0);
  w.block_bytes = w.header_bytes + w.block_groups * w.group_bytes;
  w.prefix_bytes = w.symmetric || has_blocks ? 0 : lines(w.groups * ZeroPointBytes(w.bits));
  w.panel_bytes = w.prefix_bytes + w.blocks * w.header_bytes + w.groups * w.group_bytes;
  return w;
}

void SetWeight(QuantWeight& w, const operators::Tensor& tensor) {
  tensor.Require();
  tensor.Expect(operators::kUint8, {w.panels, w.panel_bytes},
                "(panels, panel_bytes) of N, K, bits, group_size, symmetric and blocks");
  w.weight = tensor.as<uint8_t>();
}
