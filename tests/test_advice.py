"""Advice that messages give: options that they name exist where they are read, and what they say works."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cases import ROOT
from cases.processes import PATIENCE_S
from cases.scripted import scripted_model, shout, write_text_files
from qwen_build.cli import main as build
from qwen_run.commands.bench import main as bench
from qwen_run.commands.inspect import main as inspect
from qwen_run.commands.run import main as run
from qwen_run.commands.summarize import main as summarize
from qwen_run.text.text_model import TextModel

# module, or the package it is in -> the commands that show its messages; the longest name counts
READERS: dict[str, tuple[click.Command, ...]] = {
    "qwen_run": (run, summarize, bench, inspect),
    "qwen_run.accuracy": (summarize,),
    "qwen_run.accuracy.reference": (summarize, bench),
    "qwen_run.accuracy.origin_checks": (summarize, bench),
    "qwen_run.api": (run,),
    "qwen_run.bench": (bench,),
    "qwen_run.cluster": (run,),  # and qwen-serve, which has these options too
    "qwen_run.commands": (run,),
    "qwen_run.commands.bench": (bench,),
    "qwen_run.commands.command": (run, summarize, bench, inspect),
    "qwen_run.commands.inspect": (inspect,),
    "qwen_run.commands.summarize": (summarize,),
    "qwen_run.reports": (summarize,),
    "qwen_run.runtime": (run, summarize, bench),
    "qwen_run.text": (run,),  # the other commands do without a chat template
}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


def options_of(command: click.Command) -> set[str]:
    """What may be typed, those of subcommands included."""
    commands = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    return {"--help"} | {word for one in commands for p in one.params for word in (*p.opts, *p.secondary_opts)}


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every message of a module: its strings but for docstrings, f-strings joined."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values]
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside | docs:
            yield node.lineno, node.value


def unknown_options(module: str, text: str) -> list[str]:
    """The options that ``text`` names and that a reader of it has not; those of qwen-build where it is named."""
    names = [name for name in READERS if f"{module}.".startswith(f"{name}.")]
    readers = READERS[max(names, key=len)]
    named = OPTION.findall(text.replace("ray start --head", ""))  # a command of Ray's
    if OPTION.fullmatch(text):  # no message, but the option itself
        return []
    builds = "build" in text or "built" in text
    return [
        option
        for option in named
        if not all(option in options_of(reader) for reader in readers) and not (builds and option in options_of(build))
    ]


def test_every_option_that_a_message_names_exists_where_it_is_read() -> None:
    found = []
    for path in sorted(set((ROOT / "qwen_run").rglob("*.py")) - {ROOT / "qwen_run/reports/html_page.py"}):  # of styles
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for line, text in sentences(path):
            found += [f"{path.name}:{line} {option}" for option in unknown_options(module, text)]
    assert found == []


@pytest.mark.parametrize(
    ("module", "text", "unknown"),
    [
        ("qwen_run.accuracy.reference", "or use --reference", ["--reference"]),  # which qwen-bench lacks
        ("qwen_run.accuracy.reference_sources", "or use --reference", []),
        ("qwen_run.accuracy.assess", "use --raw", ["--raw"]),
        ("qwen_run.text.tokenizer", "use --raw", []),
        ("qwen_run.bench.sides", "build it with a larger --max-seq-len, --nope", ["--nope"]),
    ],
)
def test_an_option_that_is_not_there_is_found(module: str, text: str, unknown: list[str]) -> None:
    assert unknown_options(module, text) == unknown


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a scripted engine under engines/, and what the cases below read."""
    monkeypatch.chdir(tmp_path)
    directory = write_text_files(tmp_path / "engines" / "tiny")
    (directory / "engine.json").write_text("{}")
    model, _ = scripted_model(directory, shout, max_seq_len=300)
    raw, _ = scripted_model(directory, str.upper, raw=True)
    monkeypatch.setattr(TextModel, "load", lambda engine, threads=None, raw_=False, *_, **__: raw if raw_ else model)
    Path("array.json").write_text('["one", {"prompt": "two"}]')
    Path("q.jsonl").write_text('{"prompt": "one"}\n{"prompt": 2}\n')
    Path("latin1.txt").write_bytes(b"caf\xe9\n")
    Path("notes.txt").write_text("notes\n")
    return tmp_path


def convert_with_jq(advice: re.Match[str]) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    lines = subprocess.run(
        ["jq", "-c", ".[]", "array.json"], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    Path("array.json").write_text("".join(f"{x}\n" for x in lines.stdout.splitlines() if x.startswith("{")))


def to_utf8(advice: re.Match[str]) -> None:
    Path("latin1.txt").write_text(Path("latin1.txt").read_text("latin-1"), "utf-8")


def nothing(advice: re.Match[str]) -> None:
    pass


# what is typed, the advice that it gets, what is done then, and what is typed after that
FOLLOWED: list[tuple[list[str], str, Callable[[re.Match[str]], None], list[str]]] = [
    (["engines/tiny"], "name it with (--engine)", nothing, ["{1}", "engines/tiny", "x"]),
    (["x", "--input-text", "y"], "give one", nothing, ["--input-text", "y"]),
    (["x", "--input-file", "notes.txt"], "exclude each other", nothing, ["--input-file", "notes.txt"]),
    (["x", "--as-finished"], "for (--input-file)", nothing, ["--as-finished", "{1}", "notes.txt"]),
    (["--input-file", "notes.txt", "--retry-errors"], "for --input-file with (--output-file)", nothing,
     ["--input-file", "notes.txt", "--retry-errors", "{1}", "a"]),
    (["x", "--logprobs", "1"], "needs (--json)", nothing, ["x", "--logprobs", "1", "{1}"]),
    (["x", "--output-logits", "l", "-n", "1"], "leave out -n and --num-beams", nothing, ["x", "--output-logits", "l"]),
    (["x", "--raw", "--system", "y"], "leave out (--raw)", nothing, ["x", "--system", "y"]),
    (["--input-file", "notes.txt", "--json"], "--input-file always writes JSON Lines", nothing,
     ["--input-file", "notes.txt"]),
    (["--input-file", "array.json"], "convert them with jq -c '.\\[\\]'", convert_with_jq,
     ["--input-file", "array.json"]),
    (["--input-file", "latin1.txt"], "convert it to UTF-8", to_utf8, ["--input-file", "latin1.txt"]),
    (["--input-file", "absent"], "choose another (--input-file)", nothing, ["{1}", "notes.txt"]),
    (["x", "--output-file", "engines/tiny/new"], "choose another (--output-file)", nothing, ["x", "{1}", "a"]),
    (["x", "--output-file", "absent/a"], "choose another (--output-file)", nothing, ["x", "{1}", "a"]),
    (["x", "--output-logits", "absent/a"], "choose another (--output-logits)", nothing, ["x", "{1}", "a"]),
    (["x", "--output-file", "a", "--output-logits", "a"], "choose another for one", nothing,
     ["x", "--output-file", "a", "--output-logits", "b"]),
    (["--input-file", "notes.txt", "--output-file", "q.jsonl"], "or choose another (--output-file)", nothing,
     ["--input-file", "notes.txt", "{1}", "a"]),
    (["--input-file", "notes.txt", "--output-file", "q.jsonl"], "remove the file", lambda _: Path("q.jsonl").unlink(),
     ["--input-file", "notes.txt", "--output-file", "q.jsonl"]),
    (["x" * 400], "the prompt has \\d+ tokens.*shorten it", nothing, ["x" * 100]),
    (["x", "--temperature", "-1"], "expected (0)", nothing, ["x", "--temperature", "{1}"]),
    (["x", "--top-p", "2"], "expected a number from 0 to (1)", nothing, ["x", "--top-p", "{1}"]),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "says", "act", "then"), FOLLOWED, ids=[" ".join(row[0])[:40] for row in FOLLOWED])
def test_advice_works_when_it_is_followed(folder, typed, says, act, then) -> None:
    refused = CliRunner().invoke(run, typed, catch_exceptions=False)
    assert refused.exit_code in (1, 2)
    advice = re.search(says, " ".join(refused.stderr.split()))
    assert advice, refused.stderr
    act(advice)
    groups = ("", *advice.groups())
    done = CliRunner().invoke(run, [word.format(*groups) if "{" in word else word for word in then])
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("typed", "says", "then"),
    [
        (["x", "--max-new-tokens", "2"], "set another limit with (--max-new-tokens)", ["x", "{1}", "100"]),
        (["x", "--top-p", "0.5"], "add (--temperature)", ["x", "--top-p", "0.5", "{1}", "1"]),
    ],
)
def test_a_note_is_gone_when_its_advice_is_followed(folder, typed, says, then) -> None:
    noted = CliRunner().invoke(run, typed)
    advice = re.search(says, noted.stderr)
    assert (noted.exit_code, bool(advice)) == (0, True)
    done = CliRunner().invoke(run, [word.format("", *advice.groups()) for word in then])
    assert done.exit_code == 0
    assert not re.search(says, done.stderr)


def test_a_record_of_an_error_can_be_asked_again(folder) -> None:
    ask = ["--input-file", "q.jsonl", "--output-file", "a.jsonl"]
    refused = CliRunner().invoke(run, ask)
    assert "1 of 2 prompts could not be answered, see their records" in refused.stderr
    record = json.loads(Path("a.jsonl").read_text().splitlines()[1])
    assert record["error"] == '"prompt" is int, expected text'
    Path("q.jsonl").write_text('{"prompt": "one"}\n{"prompt": "2"}\n')
    assert CliRunner().invoke(run, ask).exit_code == 0
