#include "paged_attention_kernels.h"
#include "vector_plain.h"

namespace paged_attention {
const Kernels kPlainKernels = MakeKernels<Plain>();
}
