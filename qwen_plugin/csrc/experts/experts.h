// qwen::MoE: what the operator (moe.cc) hands to its kernels (one set an instruction set).
//
// Arithmetic, the same bits whatever the kernels, the tokens beside and the threads; per token:
//   x is normalised as qwen::QuantLinear does it, if there is a norm
//   a dot product of floats is sixteen partial sums, fma(x, w, sum) lane by lane with columns ascending, and at last
//   halves of them onto each other
//   p = exp(score - largest) / sum, over all experts; the sum goes over sixteen lanes as above
//   the top_k largest p, of equal ones the first, in falling order; normalised: each over their sum, slots ascending
//   gated = silu(gate x) * up x, and down, as qwen::QuantLinear computes them
//   y = fma(weight, down, y), slots ascending; y = fma(sigmoid(shared_gate x), shared, y), or y + shared; residual + y
#pragma once
#include <cstdint>

#include "linear/quant_linear.h"

namespace experts {

// The last steps of a token, for columns of it; `shared` and `residual` may be null, and shared_weight is 1 without a
// gate.
struct Combination {
  const float* products;           // (slots of all tokens, stride)
  const int32_t* places;           // (top_k): a slot's row of products
  const float* weights;            // (top_k)
  int64_t top_k, stride, columns;  // columns: a multiple of 16
  const float *shared, *residual;
  float shared_weight;
  float* y;
};

struct Kernels {
  // x (columns) times a norm's weight, see quant_linear_input.h.
  void (*normalize)(const float* x, const float* weight, float epsilon, int64_t columns, float* out);
  // out[r * stride + o] is the dot product of rows r of x and o of w, both of `columns`.
  void (*multiply)(const float* x, int64_t rows, const float* w, int64_t outputs, int64_t columns, float* out,
                   int64_t stride);
  // Scores become probabilities, in place.
  void (*softmax)(float* scores, int64_t count);
  float (*sigmoid)(float x);
  void (*combine)(const Combination& combination);
  // Products with float32 rows in place of panels: bits 32, one group, and panel_bytes those of 32 rows. With swiglu
  // the weight's first half gates its second.
  const quant_linear::Kernels& float_rows;
};

extern const Kernels kPlainKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

}  // namespace experts
