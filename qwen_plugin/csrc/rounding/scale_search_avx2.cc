// The search as the compiler makes it for AVX2.
#include "rounding/scale_search_kernel.h"

void scale_search::SearchAvx2(const Task& task) { SearchAll(task); }
