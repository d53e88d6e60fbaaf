// qwen::MoE with AVX2.
#include "experts/experts_kernels.h"
#include "vectors/lanes_avx2.h"

namespace experts {
namespace {

struct Avx2 {
  using Lanes = Avx2Lanes;
  static constexpr int kRows = 2, kOutputs = 2;
};

constexpr quant_linear::Kernels kFloatRows = MakeFloatKernels<Avx2>();

}  // namespace

const Kernels kAvx2Kernels = MakeKernels<Avx2>(kFloatRows);

}  // namespace experts
