#include "paged_attention_kernels.h"
#include "vector_avx2.h"

namespace paged_attention {
const Kernels kAvx2Kernels = MakeKernels<Avx2>();
}
