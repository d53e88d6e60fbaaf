// qwen::MoE in portable C++.
#include "experts/experts_kernels.h"
#include "vectors/lanes_plain.h"

namespace experts {
namespace {

struct Plain {
  using Lanes = PlainLanes;
  static constexpr int kRows = 1, kOutputs = 2;
};

constexpr quant_linear::Kernels kFloatRows = MakeFloatKernels<Plain>();

}  // namespace

const Kernels kPlainKernels = MakeKernels<Plain>(kFloatRows);

}  // namespace experts
