// qwen::MoE: its attributes and the inputs of a call, checked.
#pragma once
#include "experts/experts.h"
#include "linear/product.h"

namespace experts {

struct Settings {
  int64_t num_experts, top_k, hidden_size, intermediate_size;
  bool norm_topk_prob;
  float epsilon;
  quant_linear::Problem gate_up, down;  // of one expert
};

// Throws Error.
Settings ReadSettings(const operators::Attributes& attributes);

enum Input { kX, kRouter, kGateUp, kDown, kNormWeight, kResidual, kShared, kSharedGate, kInputCount };
enum Output { kY, kProductInput, kExperts, kWeights, kGated, kOutputCount };

// One call.
struct Problem : Settings {
  int64_t tokens;
  const float *x, *router;  // (tokens, hidden_size), (num_experts, hidden_size)
  // The following may be null.
  const float *norm_weight, *residual, *shared, *shared_gate;  // (H), (tokens, H), (tokens, H), (H)
  float* y;                                                    // (tokens, H)
  float *input, *weights, *gated;  // (tokens, H), (tokens, top_k), (tokens, top_k, intermediate_size)
  int32_t* experts;                // (tokens, top_k)
};

// Fills in the inputs, but no outputs. Throws Error.
void SetInputs(const OrtApi& api, const OrtKernelContext* context, Problem& p);

}  // namespace experts
