// Which of the compiled instruction sets this process uses: decided at run time, never by the machine that compiled.
#pragma once

enum class InstructionSet { kPlain, kAvx2, kAvx512 };

// The best set this machine supports, or the one that QWEN_PLUGIN_ISA (avx512, avx2, plain) asks for.
// Throws Error if that variable names an unknown set or one the machine lacks.
InstructionSet ChooseInstructionSet();
