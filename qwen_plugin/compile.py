"""Compiles ``csrc`` into the operator library; ``python -m qwen_plugin.compile`` does it in place.

Only the standard library is imported, as this runs before the package and its dependencies are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwen_engine.errors import EngineError
from qwen_plugin import LIBRARY_NAME

SOURCES = Path(__file__).parent / "csrc"

# Sums must come out the same wherever they are computed: no contraction into FMA but where the source says so.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", f"-I{SOURCES}")

# Files for one instruction set, by the end of their name; compiled on processors of its kind alone.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
X86_FLAGS = {
    "_avx2": AVX2,
    "_avxvnni": (*AVX2, "-mavxvnni"),
    "_avx512": (*AVX2, *AVX512),
    "_avx512vnni": (*AVX2, *AVX512, "-mavx512vnni"),
    "_amx": (*AVX2, *AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8", "-mamx-bf16", "-mgfni"),
}
ARM_FLAGS = {"_neon": (), "_neondot": ("-mcpu=generic+dotprod",)}  # zig has no -march
PROCESSORS = {"x86_64": X86_FLAGS, "amd64": X86_FLAGS, "aarch64": ARM_FLAGS, "arm64": ARM_FLAGS}


def find_compiler() -> list[str] | None:
    """The command of the first C++ compiler there is: ``CXX``, then c++, g++, clang++, then the ziglang wheel's."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    if importlib.util.find_spec("ziglang") is not None:
        target = f"{platform.machine()}-linux-gnu.2.28" if sys.platform == "linux" else "native"
        return [sys.executable, "-m", "ziglang", "c++", "-target", target]
    return None


def sources() -> dict[Path, Sequence[str]]:
    """Every file to compile on this processor and the flags that only it gets."""
    own = PROCESSORS.get(platform.machine().lower(), {})
    others = (X86_FLAGS.keys() | ARM_FLAGS.keys()) - own.keys()
    chosen: dict[Path, Sequence[str]] = {}
    for path in sorted(SOURCES.rglob("*.cc")):
        ending = "_" + path.stem.rpartition("_")[2]
        if ending not in others:
            chosen[path] = own.get(ending, ())
    return chosen


def is_current(library: Path) -> bool:
    """Whether ``library`` is younger than everything it is made from."""
    made_from = [*SOURCES.rglob("*.[ch]*"), Path(__file__)]
    return library.is_file() and library.stat().st_mtime >= max(path.stat().st_mtime for path in made_from)


def compile_library(library: Path, extra_flags: Sequence[str] = ()) -> None:
    """Compile the sources into ``library``, which appears whole or not at all.

    Raises:
        EngineError: there is no C++ compiler, or it failed; the message ends with what it said.
    """
    compiler = find_compiler()
    if compiler is None:
        raise EngineError("no C++ compiler found; install g++ or clang++, or: pip install ziglang")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".compile-") as directory:

        def compile_file(path: Path, flags: Sequence[str]) -> str:
            compiled = str(Path(directory, path.stem + ".o"))
            _run([*compiler, *FLAGS, *flags, *extra_flags, "-c", str(path), "-o", compiled])
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_file, *zip(*sources().items(), strict=True)))
        linked = Path(directory, library.name)
        link = [*compiler, "-shared", "-pthread", *extra_flags, *objects, "-o", str(linked)]
        if "ziglang" in compiler or sys.platform != "linux" or extra_flags:
            _run(link)
        else:
            try:  # the C++ runtime inside, so that an older one on the user's machine doesn't matter
                _run([*link, "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"])
            except EngineError:  # there is no static one here
                _run(link)
        os.replace(linked, library)


def _run(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise EngineError(f"the C++ compiler {command[0]} cannot be run: {error}; is CXX right?") from None
    if result.returncode != 0:
        raise EngineError(f"the C++ compiler failed: {shlex.join(command)}\n{result.stderr.strip()[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qwen_plugin.compile", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / LIBRARY_NAME, help="the library")
    parser.add_argument("--force", action="store_true", help="even where nothing has changed")
    parser.add_argument("--flag", action="append", default=[], help="one more compiler flag, e.g. --flag=-g")
    arguments = parser.parse_args()
    if not arguments.force and is_current(arguments.output):
        return
    try:
        compile_library(arguments.output, arguments.flag)
    except EngineError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
