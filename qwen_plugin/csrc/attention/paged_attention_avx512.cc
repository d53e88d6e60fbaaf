#include "attention/paged_attention_kernels.h"
#include "vectors/vector_avx512.h"

namespace paged_attention {
const Kernels kAvx512Kernels = MakeKernels<Avx512>();
}
