"""What the processor can multiply at most: int8 products added in int32, on registers, in its best instructions.

    python -m benchmarks.int8_peak

A few lines of C++, compiled for this very processor: AMX tiles where it has them, else AVX-512 VNNI, AVX-VNNI, or
AVX2's products of bytes, each added up in 16 bits.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from qwen_plugin.compile import find_compiler

SOURCE = r"""
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__AMX_INT8__)
constexpr double kOperations = 4 * 2.0 * 16 * 16 * 64;  // of one Step: four tiles of 16 x 16, 64 deep
struct alignas(64) Config { uint8_t palette = 1, row = 0, zero[14] = {}; uint16_t bytes[16]; uint8_t rows[16];
  Config() { for (int i = 0; i < 16; ++i) bytes[i] = i < 8 ? 64 : 0, rows[i] = i < 8 ? 16 : 0; } };
static Config config;  // not on the stack: GCC drops stores to all but its first bytes there
static const char* Prepare() {
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return "";  // ask the system for tiles
  return "AMX";
}
static void Work(int64_t steps) {
  asm volatile("ldtilecfg %0\n tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3\n"
               "tilezero %%tmm4\n tilezero %%tmm5\n tilezero %%tmm6\n tilezero %%tmm7" : : "m"(config));
  for (int64_t i = 0; i < steps; ++i)
    asm volatile("tdpbssd %tmm6, %tmm4, %tmm0\n tdpbssd %tmm7, %tmm4, %tmm1\n"
                 "tdpbssd %tmm6, %tmm5, %tmm2\n tdpbssd %tmm7, %tmm5, %tmm3");
  asm volatile("tilerelease");
}
#elif defined(__AVX2__)
// For ten sums, in registers: GCC keeps an array of them in memory.
#define TEN(a, b) a "0" b "0\n" a "1" b "1\n" a "2" b "2\n" a "3" b "3\n" a "4" b "4\n" \
                  a "5" b "5\n" a "6" b "6\n" a "7" b "7\n" a "8" b "8\n" a "9" b "9\n"
#if defined(__AVX512VNNI__)
constexpr double kOperations = 10 * 2.0 * 64;
static const char* Prepare() { return "AVX-512 VNNI"; }
#define STEP TEN("vpdpbusd %%zmm15, %%zmm14, %%zmm", "\n#")
#elif defined(__AVXVNNI__)
constexpr double kOperations = 10 * 2.0 * 32;
static const char* Prepare() { return "AVX-VNNI"; }
#define STEP TEN("%{vex%} vpdpbusd %%ymm15, %%ymm14, %%ymm", "\n#")
#else
constexpr double kOperations = 10 * 2.0 * 32;
static const char* Prepare() { return "AVX2"; }
#define STEP TEN("vpmaddubsw %%ymm15, %%ymm14, %%ymm13\n vpaddw %%ymm13, %%ymm", ", %%ymm")
#endif
static void Work(int64_t steps) {
  for (int64_t i = 0; i < steps; ++i) asm volatile(STEP : :);
}
#else
constexpr double kOperations = 0;
static const char* Prepare() { return ""; }
static void Work(int64_t) {}
#endif

extern "C" const char* Name() { return Prepare(); }
extern "C" double OperationsPerSecond(int64_t steps, int count) {
  std::vector<std::thread> threads;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < count; ++i) threads.emplace_back(Work, steps);
  for (auto& thread : threads) thread.join();
  return steps * kOperations * count /
         std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
"""
STEPS = 500_000


@cache
def _library(tiles: bool) -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "peak.cc"), Path(directory, "peak.so")
        source.write_text(SOURCE)
        command = [*compiler, "-std=c++17", "-O2", "-march=native", "-shared", "-fPIC", "-pthread"]
        if not tiles:
            command.append("-mno-amx-int8")
        if subprocess.run([*command, str(source), "-o", str(library)], capture_output=True).returncode:
            return None  # another processor family
        loaded = ctypes.CDLL(str(library))
    loaded.Name.restype = ctypes.c_char_p
    loaded.OperationsPerSecond.restype = ctypes.c_double
    return loaded if loaded.Name() else None


def int8_peak(threads: int, tiles: bool = True) -> tuple[str, float] | None:
    """The instructions' name and operations a second (a product and its sum are two); None where none are known.

    Args:
        tiles: AMX counts, where there is any.
    """
    library = _library(tiles)
    if library is None:
        return None
    return library.Name().decode(), float(library.OperationsPerSecond(ctypes.c_int64(STEPS), threads))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for threads in (1, 2):
        print(threads, "threads:", int8_peak(threads))
