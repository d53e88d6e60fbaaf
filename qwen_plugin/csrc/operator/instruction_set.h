// Which of the compiled instruction sets this process uses: decided at run time, never by the machine that compiled.
#pragma once

enum class InstructionSet { kPlain, kNeon, kAvx2, kAvx512 };  // AVX-512 with its VNNI

// The best set this machine supports, or the one that QWEN_PLUGIN_ISA (amx, avx512, avxvnni, avx2, neon, plain) asks
// for. Throws Error if that variable names an unknown set or one the machine lacks.
InstructionSet ChooseInstructionSet();

// Instructions beyond those sets, of which a machine may have any. QWEN_PLUGIN_ISA=neon includes NEON's dot product.
enum class Extension { kNeonDot, kAvxVnni, kAmx };

// Whether this process uses it: the machine has it, and QWEN_PLUGIN_ISA does not ask for less. Throws as above.
bool UsesExtension(Extension extension);
