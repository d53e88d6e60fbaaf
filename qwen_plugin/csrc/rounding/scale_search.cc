// What qwen_build/quantization/scale_search.py calls.
#include "rounding/scale_search.h"

#include "operator/error.h"
#include "operator/instruction_set.h"

// 0, or 1 where QWEN_PLUGIN_ISA names an instruction set that there is not.
extern "C" __attribute__((visibility("default"))) int QwenSearchScales(const scale_search::Task* task) {
  try {
    scale_search::Search search = scale_search::SearchPlain;
#if defined(__x86_64__)
    const InstructionSet set = ChooseInstructionSet();
    if (set == InstructionSet::kAvx2) search = scale_search::SearchAvx2;
    if (set == InstructionSet::kAvx512) search = scale_search::SearchAvx512;
#endif
    search(*task);
    return 0;
  } catch (const Error&) {
    return 1;
  }
}
