"""Where the peers are: environments that have their packages, and how one with all of them is made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent

# program -> the package that has it
PACKAGES = {
    "llama.cpp": "llama-cpp-python",
    "OpenVINO": "openvino-genai",
    "onnxruntime-genai": "onnxruntime-genai",
}
# _tile_loadconfig of GCC 12 names only the first of the bytes it reads, and the compiler drops the stores to the
# others: llama.cpp then ends with a fault at its first prompt on a processor with AMX. Flags for the file with that
# call alone make it no faster. Its loops for AVX512-FP16 take 128 numbers at once and leave heads of 64 to one that
# takes them singly: without them decode after 512 tokens is 1.6 times as fast.
LLAMA_CPP_BUILD = {
    "CMAKE_ARGS": "-DGGML_NATIVE=ON",
    "CFLAGS": "-U__AVX512FP16__",
    "CXXFLAGS": "-U__AVX512FP16__ -fno-tree-dse -fno-dse",
}
BUILDER_PACKAGES = ("onnx", "onnx-ir", "torch", "transformers")  # what onnxruntime-genai's model builder needs


def find_pythons(environments: Sequence[Path]) -> dict[str, Path]:
    """The interpreter of each program: ours, and of every peer the first environment that has its package."""
    pythons = {"engine": Path(sys.executable)}
    for environment in environments:
        python = environment / "bin" / "python"
        if not python.is_file():
            raise SystemExit(f"{environment} is no virtual environment; make one with --install {environment}")
        script = "import importlib.metadata as m; print(*(d.metadata['Name'].lower() for d in m.distributions()))"
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
        installed = {name.replace("_", "-") for name in done.stdout.split()}
        for program, package in PACKAGES.items():
            if package in installed:
                pythons.setdefault(program, python)
    return pythons


def pinned(package: str) -> str:
    """``package`` with the version of constraints.txt, where that has it.

    Of torch it matters: where an index offers a CPU build of that version, pip takes it, and of the newest version a
    build with gigabytes of GPU libraries.
    """
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(f"{package}==")), package)


def install(environment: Path) -> None:
    """A virtual environment with all peers; llama.cpp is compiled for this machine, which takes many minutes."""
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip: list[str | Path] = [environment / "bin" / "python", "-m", "pip", "install", "--quiet"]
    builder = [pinned(package) for package in BUILDER_PACKAGES]
    subprocess.run([*pip, "openvino-genai", "onnxruntime-genai", *builder], check=True)
    llama_cpp = [*pip, "--no-binary", "llama-cpp-python", "llama-cpp-python"]
    subprocess.run(llama_cpp, check=True, env=os.environ | LLAMA_CPP_BUILD)
