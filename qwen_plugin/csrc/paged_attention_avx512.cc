#include "paged_attention_kernels.h"
#include "vector_avx512.h"

namespace paged_attention {
const Kernels kAvx512Kernels = MakeKernels<Avx512>();
}
