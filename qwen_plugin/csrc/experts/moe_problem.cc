#include "experts/moe_problem.h"

#include <cmath>
#include <string>

namespace experts {
namespace {

using operators::Attributes;
using operators::Tensor;

constexpr int kFloatBits = 32;
constexpr int64_t kMostExperts = 1 << 16;

// A weight of float32 rows: its panels are 32 of them.
quant_linear::Problem FloatProduct(const Attributes& attributes, const std::string& prefix, int64_t out_features,
                                   int64_t in_features) {
  for (const char* name : {"group_size", "symmetric", "precision", "activation_scales"}) {
    const std::string whole = prefix + name;
    if (attributes.Has(whole.c_str()))
      throw Error("attribute " + whole + " is given, expected to be absent: " + prefix + "bits is 32");
  }
  quant_linear::Problem p = {};
  p.out_features = out_features, p.in_features = p.group_size = in_features;
  p.groups = p.blocks = p.block_groups = 1;
  p.bits = kFloatBits;
  p.precision = quant_linear::Precision::kFloat32;
  p.panels = CeilDiv(out_features, kPanel);
  p.panel_bytes = kPanel * in_features * int64_t(sizeof(float));
  return p;
}

quant_linear::Problem ReadProduct(const Attributes& attributes, const std::string& prefix, int64_t out_features,
                                  int64_t in_features) {
  const std::string bits = prefix + "bits";
  const int64_t count = attributes.Int(bits.c_str(), 0, 4, kFloatBits);
  if (count > 8 && count != kFloatBits) attributes.Refuse(bits.c_str(), std::to_string(count), "4, 5, 6, 8 or 32");
  quant_linear::Problem p = count == kFloatBits
                                ? FloatProduct(attributes, prefix, out_features, in_features)
                                : quant_linear::ReadProduct(attributes, prefix.c_str(), out_features, in_features);
  if (p.activation_scales == quant_linear::ActivationScales::kStatic)
    attributes.Refuse((prefix + "activation_scales").c_str(), "'static'", "group, block or token");
  p.width = out_features;
  return p;
}

// The panels of all experts, or their rows.
void SetWeight(quant_linear::Problem& p, int64_t num_experts, const Tensor& tensor) {
  tensor.Require();
  if (p.bits == kFloatBits) {
    tensor.Expect(operators::kFloat32, {num_experts * p.out_features, p.in_features},
                  "(num_experts * out_features, in_features)");
  } else {
    tensor.Expect(operators::kUint8, {num_experts * p.panels, p.panel_bytes},
                  "(num_experts * panels, panel_bytes) of the sizes, bits, group_size, symmetric and blocks");
  }
  p.weight = tensor.as<uint8_t>();
}

}  // namespace

Settings ReadSettings(const Attributes& attributes) {
  Settings s = {};
  const auto size = [&](const char* name, int64_t unit) {
    const int64_t value = attributes.Int(name, 0, 1, kMostFeatures);
    if (value % unit != 0) attributes.Refuse(name, std::to_string(value), "a multiple of " + std::to_string(unit));
    return value;
  };
  s.num_experts = attributes.Int("num_experts", 0, 1, kMostExperts);
  s.top_k = attributes.Int("top_k", 0, 1, s.num_experts);
  s.norm_topk_prob = attributes.Int("norm_topk_prob", 0, 0, 1) == 1;
  s.hidden_size = size("hidden_size", kPanel);
  s.intermediate_size = size("intermediate_size", kPanel / 2);  // a panel has 16 gates and the 16 that they gate
  s.epsilon = attributes.Float("epsilon", 1e-6f);
  if (!std::isfinite(s.epsilon) || s.epsilon < 0) attributes.Refuse("epsilon", std::to_string(s.epsilon), "0 or more");
  s.gate_up = ReadProduct(attributes, "gate_up_", 2 * s.intermediate_size, s.hidden_size);
  s.gate_up.swiglu = true;
  s.gate_up.width = s.intermediate_size;
  s.down = ReadProduct(attributes, "down_", s.hidden_size, s.intermediate_size);
  return s;
}

void SetInputs(const OrtApi& api, const OrtKernelContext* context, Problem& p) {
  constexpr const char* kNames[kInputCount] = {"x",           "router",   "gate_up", "down",
                                               "norm_weight", "residual", "shared",  "shared_gate"};
  const auto input = [&](Input i) { return Tensor(api, context, i, kNames[i]); };
  const Tensor x = input(kX), router = input(kRouter), gate_up = input(kGateUp), down = input(kDown),
               norm = input(kNormWeight), residual = input(kResidual), shared = input(kShared),
               shared_gate = input(kSharedGate);
  const int64_t H = p.hidden_size;
  x.Require();
  x.ExpectType(operators::kFloat32);
  if (x.rank != 2 || x.dims[1] != H) x.RefuseShape("(T, " + std::to_string(H) + ") = (T, hidden_size)");
  p.tokens = x.dims[0];
  if (p.tokens > INT32_MAX / p.top_k) x.RefuseShape("at most 2^31 - 1 rows over top_k");
  router.Require();
  router.Expect(operators::kFloat32, {p.num_experts, H}, "(num_experts, hidden_size)");
  SetWeight(p.gate_up, p.num_experts, gate_up);
  SetWeight(p.down, p.num_experts, down);
  norm.Expect(operators::kFloat32, {H}, "(hidden_size)");
  residual.Expect(operators::kFloat32, {p.tokens, H}, "(T, hidden_size)");
  shared.Expect(operators::kFloat32, {p.tokens, H}, "(T, hidden_size)");
  shared_gate.Expect(operators::kFloat32, {H}, "(hidden_size)");
  if (shared_gate.given && !shared.given) throw Error("shared_gate is given, expected to be absent: shared is missing");
  p.x = x.as<float>(), p.router = router.as<float>(), p.norm_weight = norm.as<float>();
  p.residual = residual.as<float>(), p.shared = shared.as<float>(), p.shared_gate = shared_gate.as<float>();
}

}  // namespace experts
