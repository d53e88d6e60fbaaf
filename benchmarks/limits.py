"""What the machine can do at most, to hold a kernel's figures against: reading, and float32 multiply-adds.

    python -m benchmarks.limits          gigabytes and operations a second, by threads

Reading is the plugin's (``qwen_run.bench.bandwidth``). Multiplying is a few lines of C++, compiled when first asked for
with the compiler that builds the plugin, for this very processor.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.command import run
from qwen_engine.errors import EngineError
from qwen_plugin.compile import find_compiler
from qwen_run.bench.bandwidth import Reader
from qwen_run.runtime.machine import physical_cores

SOURCE = """
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

template <class Work>
static double Seconds(int threads, Work work) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (auto& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// As wide as a register: of wider ones, twelve sums would lie in memory.
#if defined(__AVX512F__)
typedef float Floats __attribute__((vector_size(64)));
#elif defined(__AVX__)
typedef float Floats __attribute__((vector_size(32)));
#else
typedef float Floats __attribute__((vector_size(16)));
#endif

extern "C" double MultiplyAddsPerSecond(int64_t count, int threads) {
  const double seconds = Seconds(threads, [=](int) {
    const Floats a = Floats{} + 0.5f;
    Floats s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a, s10 = a, s11 = a;
    for (int64_t i = 0; i < count; ++i) {
      s0 = s0 * a + a, s1 = s1 * a + a, s2 = s2 * a + a, s3 = s3 * a + a, s4 = s4 * a + a, s5 = s5 * a + a;
      s6 = s6 * a + a, s7 = s7 * a + a, s8 = s8 * a + a, s9 = s9 * a + a, s10 = s10 * a + a, s11 = s11 * a + a;
    }
    Floats sum = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + s10 + s11;
    asm volatile("" : : "m"(sum));
  });
  return 12.0 * sizeof(Floats) / sizeof(float) * count * threads / seconds;
}
"""
FLAGS = ("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-shared", "-fPIC")


@cache
def _library() -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        raise EngineError("no C++ compiler found; install g++ or clang++")
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "limits.cc"), Path(directory, "limits.so")
        source.write_text(SOURCE)
        subprocess.run([*compiler, *FLAGS, "-pthread", str(source), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.MultiplyAddsPerSecond.restype = ctypes.c_double
    return loaded


def float_operations_per_s(threads: int) -> float:
    """float32 multiply-adds on registers; each counts as two."""
    steps = 2_000_000
    return 2 * float(_library().MultiplyAddsPerSecond(ctypes.c_int64(steps), threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=344, help="that are read")
    parser.add_argument("--rounds", type=int, default=15, help="of which medians are shown")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.megabytes < 1:
        parser.error(f"--rounds {arguments.rounds} and --megabytes {arguments.megabytes}, expected 1 or more")
    data = np.ones(arguments.megabytes << 20, np.uint8)
    print(
        "| threads | plain read, GB/s | from eight pages in turn | over plain | float32, GOPS |\n|---|---|---|---|---|"
    )
    for threads in range(1, physical_cores() + 1):
        reader = Reader(data, threads, pass_bytes=data.nbytes)
        rounds = [
            (reader.measure(), reader.measure(in_turn=True), float_operations_per_s(threads))
            for _ in range(arguments.rounds)
        ]
        plain, in_turn, multiply = (statistics.median(values) / 1e9 for values in zip(*rounds, strict=True))
        ratio = statistics.median(round[1] / round[0] for round in rounds)
        print(f"| {threads} | {plain:.1f} | {in_turn:.1f} | {ratio:.2f} x | {multiply:.0f} |", flush=True)


if __name__ == "__main__":
    run(main)
