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

template <int kBits>
void Dequantize(const QuantWeight& w, int64_t output, float* row) {
  const int64_t lane = output % kPanel;
  const uint8_t* const panel = PanelOf(w, output / kPanel);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t of_block = g % w.block_groups;
    const uint8_t* const block = BlockOf(w, panel, g / w.block_groups);
    const uint8_t* const steps = StepsOf(w, block, of_block);
    uint16_t stored;
    std::memcpy(&stored, block + 2 * lane, sizeof stored);
    float scale = HalfToFloat(stored) * kScaleUnit;
    if (w.block_groups > 1) scale *= float(NumbersOf(w, block, of_block, int(lane)).multiple);
    const int zero_point = ZeroPointOf(w, panel, g, int(lane));
    const int64_t first = g * w.group_size, last = std::min(first + w.group_size, w.in_features);
    for (int64_t k = first; k < last; k += 4) {
      const int64_t count = std::min<int64_t>(4, last - k);
      uint8_t q[4];
      UnpackColumns<kBits>(steps, (k - first) / 4, int(lane), q);
      for (int64_t c = 0; c < count; ++c) row[k + c] = float(q[c] - zero_point) * scale;
    }
  }
}

struct Kernel {
  OrtApi api;
  QuantWeight settings;

  const std::shared_ptr<Threads> threads;

  Kernel(const OrtApi& ort, const operators::Attributes& attributes, std::shared_ptr<Threads> of_session)
      : api(ort),
        settings(ReadWeight(attributes, "", attributes.Int("N", 0, 1, kMostFeatures),
                            attributes.Int("K", 0, 1, kMostFeatures), attributes.Int("blocks", 0, 0, 1) == 1)),
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
    const auto dequantize = w.bits == 4   ? Dequantize<4>
                            : w.bits == 5 ? Dequantize<5>
                            : w.bits == 6 ? Dequantize<6>
                                          : Dequantize<8>;
    operators::ForEach(*threads, tokens, [&](int64_t t) { dequantize(w, id[t], rows + t * w.in_features); });
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
