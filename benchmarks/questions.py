"""How many plain questions an engine answers as the float model does, word for word in the first sentence.

    python -m benchmarks.questions                  the demo, the schemes of SCHEMES
    python -m benchmarks.questions --before DIR     and the default engine of another checkout, its operators compiled

KL says how near probabilities are; this says what a user reads. Every question is answered greedily, alone in its
conversation. An engine that rounds can only agree or not: there is no partial credit, and no judge of what is right.
The float model is the engine of ``--quant none``, which writes what transformers writes.

Engines stay in ``--work``; an empty one builds them again. With the demo a build and its answers take seconds each, a
calibrated build a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.command import run, say
from benchmarks.schemes import RESULTS, Engines
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_engine.errors import QwenError
from qwen_run.bench.measure import processor_name

WORKER = Path(__file__).with_name("questions_worker.py")
ANSWER_TOKENS = 96

FLOAT = "float32"
# scheme -> the options of qwen-build that make it
SCHEMES = {
    FLOAT: "--quant none",
    **{f"int{bits}": f"--quant int{bits}" for bits in (8, 6, 5)},
    "int4": "--quant int4",
    **{f"int4, {method}": f"--quant int4 --int4-method {method}" for method in ("gptq", "awq", "auto")},
    "int4-mixed": "--quant int4-mixed",
    "int4-mixed, auto": "--quant int4-mixed --int4-method auto",
}
BEFORE = "int4, before"

# Written before any engine was asked.
QUESTIONS = (
    "What is the capital of Italy?",
    "What is the largest planet in the solar system?",
    "How many days are in a leap year?",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "What is the boiling point of water in degrees Celsius?",
    "Which ocean lies between Europe and America?",
    "What is the chemical symbol of gold?",
    "How many legs does a spider have?",
    "What language is spoken in Brazil?",
    "What is photosynthesis?",
    "Who painted the Mona Lisa?",
    "What is the square root of 81?",
    "Why is the sky blue?",
    "What is the opposite of cold?",
    "In which country is Mount Fuji?",
    "What is a prime number?",
    "How many minutes are in an hour?",
    "What do plants need to grow?",
    "Who was the first president of the United States?",
    "What is the smallest prime number?",
    "What is the freezing point of water?",
    "Which animal is known as the king of the jungle?",
    "What is the main ingredient of bread?",
    "What is a verb?",
    "How many continents are there?",
    "What is the currency of Japan?",
    "What causes rain?",
    "What is the largest mammal?",
    "What instrument has 88 keys?",
    "Where does the sun rise?",
    "What is an algorithm?",
    "How do birds fly?",
    "What is the heart for?",
    "Which metal is liquid at room temperature?",
    "What is the longest river in Africa?",
    "What colour do you get from blue and yellow?",
    "How many players are in a football team?",
    "What is democracy?",
    "What is the difference between weather and climate?",
)


def first_sentence(answer: str) -> list[str]:
    """The words of ``answer`` up to the first full stop, question or exclamation mark, or end of line.

    A mark ends a sentence where white space or the end follows it. Without any, all words count.

    >>> first_sentence("It boils at 99.9 degrees. Higher up\\nit boils sooner.")
    ['It', 'boils', 'at', '99.9', 'degrees.']
    """
    return re.split(r"(?<=[.!?])\s|\n", answer.strip(), maxsplit=1)[0].split()


def equal_sentences(expected: Sequence[str], found: Sequence[str]) -> list[bool]:
    """Of each pair of answers: whether their first sentences have the same words.

    >>> equal_sentences(["Yes. It is.", "No."], ["Yes. It was.", "No!"])
    [True, False]
    """
    return [first_sentence(one) == first_sentence(other) for one, other in zip(expected, found, strict=True)]


def answers(engine: Path, checkout: Path | None = None) -> list[str]:
    """What ``engine`` answers to each of :data:`QUESTIONS`.

    Args:
        checkout: whose runtime asks it; None: this one.

    Raises:
        QwenError: it does not answer; the last line of what it says.
    """
    done = _python([WORKER, engine, ANSWER_TOKENS], checkout, json.dumps(QUESTIONS))
    found: list[str] = json.loads(done)
    return found


def build_before(checkout: Path, checkpoint: Path, directory: Path) -> Path:
    """The default engine that the builder of ``checkout`` makes of the folder ``checkpoint``."""
    _python(["-m", "qwen_build.cli", checkpoint, "--output", directory, "--force"], checkout)
    return directory


def _python(words: Sequence[object], checkout: Path | None, read: str = "") -> str:
    environment = os.environ | ({"PYTHONPATH": str(checkout.resolve())} if checkout else {})
    command = [sys.executable, "-P", *map(str, words)]
    done = subprocess.run(command, input=read, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"{shlex.join(command)} ended with {done.returncode}"]
        raise QwenError(said[-1].removeprefix("Error: "))
    return done.stdout


def report_lines(head: str, found: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A table of counts, a row a scheme, and one of what the float model answers and who differs.

    Args:
        found: scheme -> its answers to :data:`QUESTIONS`; :data:`FLOAT` is among them.
    """
    equal = {name: equal_sentences(found[FLOAT], those) for name, those in found.items() if name != FLOAT}
    yield from (
        head,
        "",
        f"| scheme | first sentences equal, of {len(QUESTIONS)} | whole answers equal |",
        "|---|---|---|",
    )
    for name, marks in equal.items():
        whole = sum(one == other for one, other in zip(found[FLOAT], found[name], strict=True))
        yield f"| {name} | {sum(marks)} | {whole} |"
    yield from ("", f"Greedy answers of up to {ANSWER_TOKENS} tokens; equal: word for word that of float32.", "")
    yield from ("| question | first sentence of float32 | others that differ |", "|---|---|---|")
    for number, question in enumerate(QUESTIONS):
        sentence = " ".join(first_sentence(found[FLOAT][number])).replace("|", "\\|")
        others = "; ".join(name for name, marks in equal.items() if not marks[number])
        yield f"| {question} | {sentence} | {others} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", metavar="SCHEME", help=f"some of: {'; '.join(SCHEMES)}")
    parser.add_argument("--checkpoint", help="directory or Hub id; the demo if left out")
    parser.add_argument("--before", type=Path, metavar="DIR", help="a checkout whose default engine is asked as well")
    parser.add_argument("--work", type=Path, default=Path("build/questions"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    if unknown := set(arguments.schemes) - set(SCHEMES):
        parser.error(f"no scheme {', '.join(sorted(unknown))}; choose from {'; '.join(SCHEMES)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    located = resolve_checkpoint(arguments.checkpoint)
    engines = Engines(arguments.checkpoint, arguments.work / located.name)
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys((FLOAT, *(arguments.schemes or SCHEMES))):
        found[name] = answers(engines.ready(SCHEMES[name]))
        say(f"{name}: {sum(equal_sentences(found[FLOAT], found[name]))} of {len(QUESTIONS)}")
    if arguments.before:
        engine = build_before(arguments.before, located.path, arguments.work / located.name / "before")
        found[BEFORE] = answers(engine, arguments.before)
    head = f"{located.name}, {len(QUESTIONS)} questions; {processor_name()}; {datetime.now(UTC):%Y-%m-%d}"
    report = arguments.output / f"questions-{located.name}.md"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(report_lines(head, found)) + "\n", encoding="utf-8")
    print(report.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    run(main)
