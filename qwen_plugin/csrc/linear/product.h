// What operators share that multiply as qwen::QuantLinear does: its settings, the choice of kernels, sizes of tasks.
// Not for kernels to include.
#pragma once
#include "linear/quant_linear.h"
#include "operator/operator.h"

namespace quant_linear {

// A thread multiplies this many bytes of weights at a time, with at least one panel: at most, as one that has to wait
// for the processor must not hold up the others; at least, as the first bytes of each time are waited for.
constexpr int64_t kTaskBytes = 256 << 10, kLeastTaskBytes = 32 << 10;

// Below this many multiply-adds (of a task: at least) a parallel region costs more than it brings.
constexpr int64_t kSerialWork = 100'000;

// From the attributes bits, group_size, symmetric, precision and activation_scales, with `prefix` before each name: a
// product with a weight (out_features, in_features). Throws Error.
Problem ReadProduct(const operators::Attributes& attributes, const char* prefix, int64_t out_features,
                    int64_t in_features);

// The kernels of a product, by its rows.
struct KernelChoice {
  const Kernels *few, *many;
  const Kernels& Of(const Problem& p) const;
};

// Those of this process for a product with these settings. Throws Error.
KernelChoice ChooseKernels(const Problem& settings);

}  // namespace quant_linear
