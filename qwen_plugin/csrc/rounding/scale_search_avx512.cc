// The search as the compiler makes it for AVX-512.
#include "rounding/scale_search_kernel.h"

void scale_search::SearchAvx512(const Task& task) { SearchAll(task); }
