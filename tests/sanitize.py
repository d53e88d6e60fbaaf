"""Runs the operators under sanitizers: ``python tests/sanitize.py``, with options for pytest after it.

Their tests, and random calls of them, run on a library compiled with AddressSanitizer and UBSan; a stress test of the
plugin's threads runs with ThreadSanitizer.

Needs g++. A finding ends the run with the sanitizer's report. Leaks are not looked for: the interpreter has its own.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FUZZ_SECONDS = 60
CSRC = ROOT / "qwen_plugin" / "csrc"
TESTED = ("attention", "embedding", "linear", "moe", "scale_search", "threads")
FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        stress = Path(directory, "threads_stress")
        sources = [ROOT / "tests/qwen_plugin/threads_stress.cc", CSRC / "operator/threads.cc"]
        for flags in (("-fsanitize=thread",), FLAGS):
            subprocess.run(
                ["g++", "-std=c++17", "-O1", "-g", "-pthread", f"-I{CSRC}", *flags, *sources, "-o", stress], check=True
            )
            subprocess.run([stress], check=True)
        library = Path(directory, "libqwen_plugin.so")
        flags = [f"--flag={flag}" for flag in FLAGS]
        command = [sys.executable, "-m", "qwen_plugin.compile", "--output", library, *flags]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"CXX": "g++"})
        # The interpreter is not compiled with them, so the sanitizers must be loaded before anything else.
        runtimes = [
            subprocess.run(
                ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
            ).stdout.strip()
            for name in ("libasan.so", "libubsan.so", "libstdc++.so")
        ]
        environment = os.environ | {
            "LD_PRELOAD": ":".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "QWEN_PLUGIN_LIBRARY": str(library),
        }
        tests = sorted(path for name in TESTED for path in (ROOT / "tests/qwen_plugin").glob(f"test_{name}*.py"))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--capture=sys",
            "-p",
            "no:cacheprovider",
            "-o",
            "timeout=7200",
            *tests,
        ]
        command += sys.argv[1:]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        fuzz = [sys.executable, "-m", "fuzz.operators", "--seconds", str(FUZZ_SECONDS)]
        return subprocess.run(fuzz, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT / "tests")}).returncode


if __name__ == "__main__":
    sys.exit(main())
