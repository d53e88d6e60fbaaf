// qwen::MoE with AVX-512.
#include "experts/experts_kernels.h"
#include "vectors/lanes_avx512.h"

namespace experts {
namespace {

struct Avx512 {
  using Lanes = Avx512Lanes;
  static constexpr int kRows = 4, kOutputs = 4;
};

constexpr quant_linear::Kernels kFloatRows = MakeFloatKernels<Avx512>();

}  // namespace

const Kernels kAvx512Kernels = MakeKernels<Avx512>(kFloatRows);

}  // namespace experts
