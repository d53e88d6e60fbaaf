// qwen::QuantLinear version 4: checks every input, divides the work, calls the kernels.
#include "linear/quant_linear.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "linear/product.h"
#include "linear/quant_operators.h"
#include "operator/instruction_set.h"
#include "operator/scratch.h"

namespace quant_linear {
namespace {

using operators::Attributes;
using operators::Check;
using operators::Tensor;

enum Input { kX, kWeight, kBias, kNormWeight, kResidual, kPermutation, kInputScale, kInputCount };
constexpr const char* kInputNames[kInputCount] = {"x",        "weight",      "bias",       "norm_weight",
                                                  "residual", "permutation", "input_scale"};

Problem ReadSettings(const Attributes& attributes) {
  const int64_t out_features = attributes.Int("N", 0, 1, kMostFeatures);
  Problem p = ReadProduct(attributes, "", out_features, attributes.Int("K", 0, 1, kMostFeatures));
  p.swiglu = attributes.Int("swiglu", 0, 0, 1) == 1;
  if (p.swiglu && p.out_features % kPanel != 0)
    attributes.Refuse("N", std::to_string(p.out_features), "a multiple of 32, as swiglu is 1");
  p.width = p.out_features / (p.swiglu ? 2 : 1);
  p.epsilon = attributes.Float("epsilon", 1e-6f);
  if (!std::isfinite(p.epsilon) || p.epsilon < 0) attributes.Refuse("epsilon", std::to_string(p.epsilon), "0 or more");
  return p;
}

// Fills in the inputs, checked, but for the outputs.
void SetInputs(const OrtApi& api, const OrtKernelContext* context, Problem& p) {
  const auto input = [&](Input i) { return Tensor(api, context, i, kInputNames[i]); };
  const Tensor x = input(kX), weight = input(kWeight), bias = input(kBias), norm = input(kNormWeight),
               residual = input(kResidual), permutation = input(kPermutation), input_scale = input(kInputScale);
  x.Require();
  x.ExpectType(operators::kFloat32);
  if (x.rank != 2 || x.dims[1] != p.in_features) x.RefuseShape("(T, " + std::to_string(p.in_features) + ") = (T, K)");
  p.rows = x.dims[0];
  SetWeight(p, weight);
  bias.Expect(operators::kFloat32, {p.out_features}, "(N)");
  norm.Expect(operators::kFloat32, {p.in_features}, "(K)");
  residual.Expect(operators::kFloat32, {p.rows, p.out_features}, "(T, N)");
  permutation.Expect(operators::kInt32, {p.in_features}, "(K)");
  input_scale.Expect(operators::kFloat32, {1}, "(1)");
  if (residual.given && p.swiglu) throw Error("residual is given, expected to be absent: swiglu is 1");
  const bool is_static = p.activation_scales == ActivationScales::kStatic;
  if (input_scale.given != is_static)
    throw Error(is_static ? "input_scale is missing, activation_scales static needs it"
                          : "input_scale is given, expected to be absent: activation_scales is not static");
  if (is_static) p.input_scale = *input_scale.as<float>();
  if (is_static && !(p.input_scale > 0 && p.input_scale <= __FLT_MAX__))
    throw Error("input_scale is " + std::to_string(p.input_scale) + ", expected a positive number");
  p.x = x.as<float>(), p.bias = bias.as<float>(), p.norm_weight = norm.as<float>();
  p.residual = residual.as<float>(), p.permutation = permutation.as<int32_t>();
  if (!permutation.given) return;
  for (int64_t k = 0; k < p.in_features; ++k)
    if (p.permutation[k] < 0 || p.permutation[k] >= p.in_features)
      throw Error("permutation[" + std::to_string(k) + "] is " + std::to_string(p.permutation[k]) + ", expected 0 to " +
                  std::to_string(p.in_features - 1));
}

// How the work is divided changes which thread does it and never a bit of the result.
void Run(Threads& threads, const std::shared_ptr<Order>& order, const Kernels& kernels, const Problem& p) {
  const int64_t tiles = CeilDiv(p.rows, kernels.max_tile_rows(p)), tile_bytes = kernels.tile_bytes(p);
  thread_local Scratch scratch;
  char* const activations = static_cast<char*>(scratch.Get(tiles * tile_bytes));
  if (p.rows * p.in_features < kSerialWork) {
    kernels.prepare(p, tiles, {0, tiles}, activations);
  } else {
    operators::ForEach(threads, tiles, [&](int64_t t) { kernels.prepare(p, tiles, {t, t + 1}, activations); });
  }

  const Share share = kernels.share(p);
  const int64_t blocks = CeilDiv(tiles, share.tiles);
  const int64_t most = share.panels > 0 ? share.panels : std::max<int64_t>(1, kTaskBytes / p.panel_bytes);
  if (blocks == 1 && share.panels == 0) {
    const int64_t panel_work = p.rows * p.groups * p.group_size * kPanel;
    const int64_t least = std::max(CeilDiv(kLeastTaskBytes, p.panel_bytes), CeilDiv(kSerialWork, panel_work));
    operators::ForRanges(
        threads, p.panels, std::min(least, most), most,
        [&](int64_t first, int64_t last) { kernels.multiply(p, tiles, {0, tiles}, {first, last}, activations); }, order,
        {p.weight, p.panels, p.panel_bytes});
    return;
  }
  const int64_t chunks = CeilDiv(p.panels, most);
  operators::ForEach(threads, blocks * chunks, [&](int64_t i) {
    const int64_t block = i / chunks, chunk = i % chunks;
    kernels.multiply(p, tiles, {tiles * block / blocks, tiles * (block + 1) / blocks},
                     {p.panels * chunk / chunks, p.panels * (chunk + 1) / chunks}, activations);
  });
}

struct Kernel {
  OrtApi api;
  Problem settings;
  const KernelChoice kernels;
  const std::shared_ptr<Threads> threads;
  const std::shared_ptr<Order> order = std::make_shared<Order>();

  Kernel(const OrtApi& ort, const Attributes& attributes, std::shared_ptr<Threads> of_session)
      : api(ort),
        settings(ReadSettings(attributes)),
        kernels(ChooseKernels(settings)),
        threads(std::move(of_session)) {}

  void Compute(OrtKernelContext* context) const {
    Problem p = settings;
    SetInputs(api, context, p);
    p.y = operators::NewOutput<float>(api, context, 0, {p.rows, p.width});
    p.input = operators::NewOutput<float>(api, context, 1, {p.rows, p.in_features});
    if (p.rows > 0) Run(*threads, order, kernels.Of(p), p);
  }
};

struct QuantLinear {
  static constexpr const char* kName = "QuantLinear";
  static constexpr int kVersion = 4;
  static constexpr size_t kInputs = kInputCount, kOutputs = 2;
  static void InferShape(const OrtApi& api, OrtShapeInferContext* context) {
    operators::InferRows(api, context, "N", "swiglu");
  }
};

}  // namespace

float* RowScratch(int64_t floats) {
  thread_local Scratch scratch;
  return static_cast<float*>(scratch.Get(floats * int64_t(sizeof(float))));
}

float* TotalScratch(int64_t floats) {
  thread_local Scratch scratch;
  return static_cast<float*>(scratch.Get(floats * int64_t(sizeof(float))));
}

}  // namespace quant_linear

const OrtCustomOp* NewQuantLinear(const OrtApi& api, SessionThreads& threads) {
  return new operators::Declaration<quant_linear::QuantLinear, quant_linear::Kernel>(api, threads);
}
