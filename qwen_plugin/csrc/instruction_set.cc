#include "instruction_set.h"

#include <cstdint>
#include <cstdlib>
#include <string>

#include "error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)
bool HasBits(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

InstructionSet Best() {
  constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kF16c = 1u << 29;      // leaf 1, ecx
  constexpr uint32_t kAvx2 = 1u << 5;                                             // leaf 7, ebx
  constexpr uint32_t kAvx512FDqBwVl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // leaf 7, ebx
  constexpr uint32_t kYmmState = 0x06, kZmmState = 0xe6;  // registers the operating system saves (xcr0)
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !HasBits(ecx, kFma | kOsxsave | kF16c)) return InstructionSet::kPlain;
  uint32_t saved, high;
  asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !HasBits(ebx, kAvx2) || !HasBits(saved, kYmmState))
    return InstructionSet::kPlain;
  return HasBits(ebx, kAvx512FDqBwVl) && HasBits(saved, kZmmState) ? InstructionSet::kAvx512 : InstructionSet::kAvx2;
}
#else
InstructionSet Best() { return InstructionSet::kPlain; }
#endif

}  // namespace

InstructionSet ChooseInstructionSet() {
  const InstructionSet best = Best();
  const char* wanted = std::getenv("QWEN_PLUGIN_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  const char* names[] = {"plain", "avx2", "avx512"};
  for (int i = 0; i < 3; ++i) {
    if (std::string(wanted) != names[i]) continue;
    if (InstructionSet(i) > best)
      throw Error("QWEN_PLUGIN_ISA is " + std::string(wanted) + ", this machine supports at most " + names[int(best)]);
    return InstructionSet(i);
  }
  throw Error("QWEN_PLUGIN_ISA is '" + std::string(wanted) + "', expected avx512, avx2 or plain");
}
