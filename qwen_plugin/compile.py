"""Compiles ``csrc`` into the operator library; ``python -m qwen_plugin.compile`` does it in place.

A library is either for this machine, by whatever C++ compiler is there, or for the platform of a wheel, such as
manylinux_2_28_aarch64: then the ziglang wheel compiles it, on any machine, against the glibc that the platform names.

Only the standard library is imported, as this runs before the package and its dependencies are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qwen_engine.errors import EngineError
from qwen_plugin import LIBRARY_NAME, MOST_THREADS, THREADS_ENTRY

SOURCES = Path(__file__).parent / "csrc"
OLDEST_GLIBC = "2.28"  # what ziglang compiles against where nothing else is asked for

# Sums must come out the same wherever they are computed: no contraction into FMA but where the source says so.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", f"-I{SOURCES}"),
    *(f"-DMOST_THREADS={MOST_THREADS}", f'-DTHREADS_ENTRY="{THREADS_ENTRY}"'),
)

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


_WHEEL_PLATFORM = re.compile(r"manylinux_(\d+)_(\d+)_(\w+)")


@dataclass(frozen=True)
class Target:
    """What a library is compiled for.

    Attributes:
        machine: the processor, as ``platform.machine()`` has it.
        glibc: the oldest version it runs with; None: this machine and its libraries.
    """

    machine: str
    glibc: str | None = None

    @classmethod
    def here(cls) -> Target:
        return cls(platform.machine().lower())

    @classmethod
    def of_wheel(cls, tag: str) -> Target:
        """The target of wheels with this platform tag.

        >>> Target.of_wheel("manylinux_2_28_aarch64")
        Target(machine='aarch64', glibc='2.28')

        Raises:
            EngineError: the tag is none for which libraries can be compiled.
        """
        match = _WHEEL_PLATFORM.fullmatch(tag)
        if match is None or match[3] not in PROCESSORS:
            raise EngineError(
                f"wheels cannot be made for the platform {tag!r}, expected one such as manylinux_2_28_x86_64 or "
                "manylinux_2_28_aarch64"
            )
        return cls(match[3], f"{match[1]}.{match[2]}")


def find_compiler(target: Target | None = None) -> list[str] | None:
    """The command of a C++ compiler for ``target``, or None if there is none.

    For this machine it is the first that there is: ``CXX``, then c++, g++, clang++, then the ziglang wheel's. For a
    glibc of a certain age it is always the latter: no other has the libraries of another system.
    """
    target = target or Target.here()
    if target.glibc is None:
        if os.environ.get("CXX"):
            return shlex.split(os.environ["CXX"])
        for name in ("c++", "g++", "clang++"):
            if shutil.which(name):
                return [name]
    if importlib.util.find_spec("ziglang") is None:
        return None
    is_linux = target.glibc is not None or sys.platform == "linux"
    triple = f"{target.machine}-linux-gnu.{target.glibc or OLDEST_GLIBC}" if is_linux else "native"
    return [sys.executable, "-P", "-m", "ziglang", "c++", "-target", triple]


def sources(machine: str) -> dict[Path, Sequence[str]]:
    """Every file to compile for a processor and the flags that only it gets."""
    own = PROCESSORS.get(machine, {})
    others = (X86_FLAGS.keys() | ARM_FLAGS.keys()) - own.keys()
    chosen: dict[Path, Sequence[str]] = {}
    for path in sorted(SOURCES.rglob("*.cc")):
        ending = "_" + path.stem.rpartition("_")[2]
        if ending not in others:
            chosen[path] = own.get(ending, ())
    return chosen


def is_current(library: Path) -> bool:
    """Whether ``library`` is younger than everything it is made from."""
    sources = (path for path in SOURCES.rglob("*.*") if path.is_file())
    made_from = [*sources, Path(__file__), Path(__file__).with_name("__init__.py")]
    return library.is_file() and library.stat().st_mtime >= max(path.stat().st_mtime for path in made_from)


def compile_library(library: Path, extra_flags: Sequence[str] = (), target: Target | None = None) -> None:
    """Compile the sources into ``library``, which appears whole or not at all.

    Args:
        target: this machine if None.

    Raises:
        EngineError: there is no C++ compiler, or it failed; the message ends with what it said.
    """
    target = target or Target.here()
    compiler = find_compiler(target)
    if compiler is None:
        others = "install g++ or clang++, or: " if target.glibc is None else ""
        raise EngineError(f"no C++ compiler found for {target.machine}; {others}pip install ziglang")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".compile-") as directory:

        def compile_file(path: Path, flags: Sequence[str]) -> str:
            compiled = str(Path(directory, path.stem + ".o"))
            _run([*compiler, *FLAGS, *flags, *extra_flags, "-c", str(path), "-o", compiled])
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_file, *zip(*sources(target.machine).items(), strict=True)))
        linked = Path(directory, library.name)
        _link([*compiler, "-shared", "-pthread", *extra_flags, *objects, "-o", str(linked)], bool(extra_flags))
        os.replace(linked, library)


def _link(command: Sequence[str], is_special: bool) -> None:
    """Link with the C++ runtime inside, so that an older one on the user's machine doesn't matter.

    Args:
        is_special: the compiler got flags from the user, such as a sanitizer's, which want the runtime outside.
    """
    exports = f"-Wl,--version-script={SOURCES / 'exports.map'}"
    if "ziglang" in command:  # its runtime is always inside
        _run([*command, "-s", *([exports] if "linux" in command[command.index("-target") + 1] else [])])
    elif sys.platform != "linux" or is_special:
        _run(command)
    else:
        try:
            _run([*command, "-static-libstdc++", "-static-libgcc", exports])
        except EngineError:  # there is no static one here
            _run([*command, exports])


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
    parser.add_argument("--platform", metavar="TAG", help="for wheels of this platform, e.g. manylinux_2_28_aarch64")
    parser.add_argument("--force", action="store_true", help="even where nothing has changed")
    parser.add_argument("--flag", action="append", default=[], help="one more compiler flag, e.g. --flag=-g")
    arguments = parser.parse_args()
    if not arguments.force and is_current(arguments.output):
        return
    try:
        target = None if arguments.platform is None else Target.of_wheel(arguments.platform)
        compile_library(arguments.output, arguments.flag, target)
    except EngineError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
