#include "attention/paged_attention_kernels.h"
#include "vectors/vector_neon.h"

namespace paged_attention {
const Kernels kNeonKernels = MakeKernels<Neon>();
}
