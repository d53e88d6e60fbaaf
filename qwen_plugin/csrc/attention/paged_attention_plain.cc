#include "attention/paged_attention_kernels.h"
#include "vectors/vector_plain.h"

namespace paged_attention {
const Kernels kPlainKernels = MakeKernels<Plain>();
}
