// The search as the compiler makes it for any processor.
#include "rounding/scale_search_kernel.h"

void scale_search::SearchPlain(const Task& task) { SearchAll(task); }
