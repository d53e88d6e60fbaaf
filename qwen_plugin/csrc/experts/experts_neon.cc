// qwen::MoE with NEON.
#include "experts/experts_kernels.h"
#include "vectors/lanes_neon.h"

namespace experts {
namespace {

struct Neon {
  using Lanes = NeonLanes;
  static constexpr int kRows = 2, kOutputs = 2;
};

constexpr quant_linear::Kernels kFloatRows = MakeFloatKernels<Neon>();

}  // namespace

const Kernels kNeonKernels = MakeKernels<Neon>(kFloatRows);

}  // namespace experts
