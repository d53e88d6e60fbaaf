#include "attention/paged_attention_kernels.h"
#include "vectors/vector_avx2.h"

namespace paged_attention {
const Kernels kAvx2Kernels = MakeKernels<Avx2>();
}
