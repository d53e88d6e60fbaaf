#include "paged_attention_kernels.h"
#include "vector_neon.h"

namespace paged_attention {
const Kernels kNeonKernels = MakeKernels<Neon>();
}
