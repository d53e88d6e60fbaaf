// qwen::QuantEmbedding version 2: rows of the dequantised weight of a qwen::QuantLinear, bit for bit.
#include <algorithm>
#include <cstring>
#include <string>

#include "linear/quant_operators.h"
#include "linear/quant_weight.h"
#include "operator/operator.h"
#include "vectors/half.h"

namespace {

using operators::Tensor;

void Dequantize(const QuantWeight& w, int64_t output, float* row) {
  const int64_t lane = output % kPanel, low = lane % 16, half = lane / 16;
  const uint8_t* const panel = PanelOf(w, output / kPanel);
  const auto nibble = [&](uint8_t byte) { return half ? byte >> 4 : byte & 15; };
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t of_block = g % w.block_groups;
    const uint8_t* const block = BlockOf(w, panel, g / w.block_groups);
    const uint8_t* const steps = StepsOf(w, block, of_block);
    uint16_t stored;
    std::memcpy(&stored, block + 2 * lane, sizeof stored);
    float scale = HalfToFloat(stored) * kScaleUnit;
    if (w.block_groups > 1) scale *= float(nibble(MultiplesOf(block, of_block)[low]) + 1);
    int zero_point = SymmetricZeroPoint(w);
    if (!w.symmetric) {
      const uint8_t* const zero_points = ZeroPointsOf(w, panel, g);
      zero_point = w.bits == 4 ? nibble(zero_points[low]) : zero_points[lane];
    }
    const int64_t first = g * w.group_size, last = std::min(first + w.group_size, w.in_features);
    for (int64_t k = first; k < last; ++k) {
      const int64_t j = (k - first) / 4, c = 4 * low + k % 4;
      const int q = w.bits == 4 ? nibble(steps[j * 64 + c]) : steps[j * 128 + half * 64 + c];
      row[k] = float(q - zero_point) * scale;
    }
  }
}

struct Kernel {
  OrtApi api;
  QuantWeight settings;

  const std::shared_ptr<Threads> threads;

  Kernel(const OrtApi& ort, const operators::Attributes& attributes, std::shared_ptr<Threads> of_session)
      : api(ort),
        settings(ReadWeight(attributes, attributes.Int("blocks", 0, 0, 1) == 1)),
        threads(std::move(of_session)) {}

  void Compute(OrtKernelContext* context) const {
    QuantWeight w = settings;
    const Tensor ids(api, context, 0, "token_ids");
    ids.Require();
    ids.ExpectType(operators::kInt64);
    if (ids.rank != 1) ids.RefuseShape("(T)");
    SetWeight(w, Tensor(api, context, 1, "weight"));
    const int64_t tokens = ids.dims[0];
    const int64_t* const id = ids.as<int64_t>();
    for (int64_t t = 0; t < tokens; ++t)
      if (id[t] < 0 || id[t] >= w.out_features)
        throw Error("token_ids[" + std::to_string(t) + "] is " + std::to_string(id[t]) + ", expected 0 to " +
                    std::to_string(w.out_features - 1));
    float* const rows = operators::NewOutput<float>(api, context, 0, {tokens, w.in_features});
    operators::ForEach(*threads, tokens, [&](int64_t t) { Dequantize(w, id[t], rows + t * w.in_features); });
  }
};

struct QuantEmbedding {
  static constexpr const char* kName = "QuantEmbedding";
  static constexpr int kVersion = 2;
  static constexpr size_t kInputs = 2, kOutputs = 1;
  static void InferShape(const OrtApi& api, OrtShapeInferContext* context) { operators::InferRows(api, context, "K"); }
};

}  // namespace

const OrtCustomOp* NewQuantEmbedding(const OrtApi& api, SessionThreads& threads) {
  return new operators::Declaration<QuantEmbedding, Kernel>(api, threads);
}
