#include "operator/instruction_set.h"

#include <cstdint>
#include <cstdlib>
#include <string>

#include "operator/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

struct Machine {
  InstructionSet best = InstructionSet::kPlain;
  bool neon_dot = false, avx_vnni = false, amx = false;
};

#if defined(__x86_64__)
bool HasBits(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

// Linux gives the tile registers' 8 KiB to processes that ask for them.
bool MayUseTiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Machine Look() {
  constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kF16c = 1u << 29;      // leaf 1, ecx
  constexpr uint32_t kAvx2 = 1u << 5;                                             // leaf 7, ebx
  constexpr uint32_t kAvx512FDqBwVl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // leaf 7, ebx
  constexpr uint32_t kAvx512Vnni = 1u << 11, kGfni = 1u << 8;                     // leaf 7, ecx
  constexpr uint32_t kAmxBf16TileInt8 = 1u << 22 | 1u << 24 | 1u << 25;           // leaf 7, edx
  constexpr uint32_t kAvxVnni = 1u << 4;                                          // leaf 7, subleaf 1, eax
  constexpr uint32_t kYmmState = 0x06, kZmmState = 0xe6;  // registers the operating system saves (xcr0)
  constexpr uint32_t kTileState = 0x60000;
  Machine machine;
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !HasBits(ecx, kFma | kOsxsave | kF16c)) return machine;
  uint32_t saved, high;
  asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !HasBits(ebx, kAvx2) || !HasBits(saved, kYmmState))
    return machine;
  const uint32_t subleaves = eax;
  machine.best = InstructionSet::kAvx2;
  if (HasBits(ebx, kAvx512FDqBwVl) && HasBits(ecx, kAvx512Vnni) && HasBits(saved, kZmmState)) {
    machine.best = InstructionSet::kAvx512;
    machine.amx = HasBits(edx, kAmxBf16TileInt8) && HasBits(ecx, kGfni) && HasBits(saved, kTileState) && MayUseTiles();
  }
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) machine.avx_vnni = HasBits(eax, kAvxVnni);
  return machine;
}
#elif defined(__aarch64__)
bool HasDotProduct() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value == 1;
#else
  return false;
#endif
}

Machine Look() {
  Machine machine;
  machine.best = InstructionSet::kNeon;  // every one of these processors has it
  machine.neon_dot = HasDotProduct();
  return machine;
}
#else
Machine Look() { return {}; }
#endif

// What the machine has and QWEN_PLUGIN_ISA allows.
Machine Allowed() {
  static const Machine machine = Look();
  const char* variable = std::getenv("QWEN_PLUGIN_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  if (wanted.empty()) return machine;
  Machine allowed = machine;
  bool supported = true;
  if (wanted != "amx") allowed.amx = false;
  if (wanted == "amx") {
    supported = machine.amx;
  } else if (wanted == "avx512") {
    supported = machine.best == InstructionSet::kAvx512;
  } else if (wanted == "avxvnni" || wanted == "avx2") {
    allowed.best = InstructionSet::kAvx2;
    if (wanted == "avx2") allowed.avx_vnni = false;
    supported = machine.best >= InstructionSet::kAvx2 && (wanted == "avx2" || machine.avx_vnni);
  } else if (wanted == "neon") {
    supported = machine.best == InstructionSet::kNeon;
  } else if (wanted == "plain") {
    allowed = {};
  } else {
    throw Error("QWEN_PLUGIN_ISA is '" + wanted + "', expected amx, avx512, avxvnni, avx2, neon or plain");
  }
  if (!supported) throw Error("QWEN_PLUGIN_ISA is " + wanted + ", this machine does not support it");
  return allowed;
}

}  // namespace

InstructionSet ChooseInstructionSet() { return Allowed().best; }

bool UsesExtension(Extension extension) {
  const Machine allowed = Allowed();
  switch (extension) {
    case Extension::kNeonDot:
      return allowed.neon_dot;
    case Extension::kAvxVnni:
      return allowed.avx_vnni;
    case Extension::kAmx:
      return allowed.amx;
  }
  return false;
}

// What qwen_plugin/instruction_set.py asks: 1 where AMX tiles are used, 0 where not, -1 where QWEN_PLUGIN_ISA names an
// instruction set that there is not.
extern "C" __attribute__((visibility("default"))) int QwenUsesAmx() {
  try {
    return UsesExtension(Extension::kAmx) ? 1 : 0;
  } catch (const Error&) {
    return -1;
  }
}
