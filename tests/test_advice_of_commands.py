"""Advice of qwen-run, qwen-summarize, qwen-inspect and qwen-serve: each is given on a tiny engine, and followed.

``tests/test_advice.py`` follows what qwen-run says of its options, on a scripted engine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import socket
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cases import ROOT
from cases.advice import Act, Row, config, follow, move, not_followed, remove, stale, typed, write
from qwen_build.cli import main as build
from qwen_engine.errors import CheckpointError
from qwen_engine.manifest import Manifest, MergedAdapter
from qwen_run.accuracy.origin_checks import check_checkpoint
from qwen_run.commands.inspect import main as inspect
from qwen_run.commands.run import main as run
from qwen_run.commands.summarize import main as summarize
from qwen_serve.cli import main as serve

RUN = "hi --max-new-tokens 2 --threads 1"
SUM = "--dataset texts.jsonl --max-samples 1 --max-new-tokens 3 --no-cost --threads 1 --report R"
TINY = "engines/tiny"


def both(*acts: Act) -> Act:
    return lambda: [act() for act in acts]


def build_again(output: str = TINY, options: str = "") -> Act:
    def act() -> None:
        built = typed(build, f"C --quant int8 --force --output {output} {options}")
        assert built.exit_code == 0, built.stderr

    return act


def origin(**changes: Any) -> Act:
    """Change where ``engine.json`` says that the engine comes from."""

    def act() -> None:
        path = Path(TINY, "engine.json")
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"origin": manifest["origin"] | changes}))

    return act


def compared(*options: str) -> Act:
    """A comparison that ends well."""

    def act() -> None:
        done = typed(summarize, " ".join([SUM, *options]))
        assert done.exit_code == 0, done.stderr

    return act


def make(path: str) -> Act:
    return lambda: Path(path).mkdir(parents=True)


def as_directory(path: str) -> Act:
    return both(remove(path), make(path))


def the_checkpoint_has_no(template: str | None) -> Act:
    """An engine of a checkpoint whose chat template is this one, or is not there."""
    return both(config("C/tokenizer_config.json", chat_template=template), build_again())


WIDE = build_again(options="--kv-cache-dtype float32")  # 2048 tokens take 1.5 MiB of cache
AGAIN = "build the engine again"
DAMAGED = [
    (inspect, Row(TINY, f"line 1 column 2 (char 1); {AGAIN}",
                  TINY, write(f"{TINY}/engine.json", "{"), build_again())),
    (inspect, Row(TINY, f"; {AGAIN}", TINY, write(f"{TINY}/engine.json", b"\xff"), build_again())),
    (inspect, Row(TINY, f"{AGAIN} with the qwen-build of this installation", TINY,
                  config(f"{TINY}/engine.json", format_version=1), build_again())),
    (inspect, Row(TINY, f"; {AGAIN}", TINY, config(f"{TINY}/engine.json", name=None), build_again())),
    (inspect, Row(TINY, f"has no part model.onnx, layers.onnx, weights.bin; {AGAIN}", TINY,
                  config(f"{TINY}/engine.json", parts={}), build_again())),
    (inspect, Row(f"{TINY} --graph", f"is not ONNX; {AGAIN}", f"{TINY} --graph",
                  write(f"{TINY}/model.onnx", "no graph"), build_again())),
    (inspect, Row(f"{TINY} --graph", f"cannot be read: No such file or directory; {AGAIN}", f"{TINY} --graph",
                  remove(f"{TINY}/model.onnx"), build_again())),
    (inspect, Row(TINY, "; copy the engine again", "engines/copy", as_directory(f"{TINY}/engine.json"),
                  lambda: shutil.copytree("kept", "engines/copy"))),
    (run, Row(RUN, f"weights.bin is missing; {AGAIN} or copy it again", RUN, remove(f"{TINY}/weights.bin"),
              build_again())),
    (run, Row(RUN, f"(its crc32 differs); {AGAIN} or copy it again", RUN,
              lambda: Path(TINY, "weights.bin").write_bytes(bytes(Path(TINY, "weights.bin").stat().st_size)),
              lambda: shutil.copytree("kept", TINY, dirs_exist_ok=True))),
    (run, Row(RUN, "which this installation's plugin does not have; build the engine again with the qwen-build", RUN,
              config(f"{TINY}/engine.json", operators=[{"domain": "qwen", "name": "QuantLinear", "version": 99}]),
              build_again())),
    (run, Row(RUN, f"invalid start byte; {AGAIN}", RUN,
              write(f"{TINY}/tokenizer_config.json", b"\xff"), build_again())),
    (run, Row(RUN, "; build the engine again, which writes only what requests take", RUN,
              config(f"{TINY}/generation_config.json", top_p="hot"), build_again())),
    (run, Row(RUN, "download it again and build the engine again", RUN,
              write(f"{TINY}/tokenizer.json", "{}"), build_again())),
]  # fmt: skip
RUNS = [
    (inspect, Row("C", "is a checkpoint; make an engine of it with `qwen-build C`", "",
                  followed=lambda: typed(build, "C"))),
    (inspect, Row("empty", "has no engine.json; make an engine with qwen-build", "engines/new", make("empty"),
                  build_again("engines/new"))),
    (inspect, Row(f"{TINY} --engine {TINY}", "are the same; give one", TINY, exit_code=2)),
    (inspect, Row(f"{TINY} --plot bits.png", "pictures are SVG; name it", f"{TINY} --plot bits.svg", exit_code=2)),
    (inspect, Row(f"{TINY} --plot absent/a.svg", "; choose another --plot", f"{TINY} --plot a.svg")),
    (run, Row(RUN, "; make one with qwen-build", RUN, move("engines", "away"), build_again())),
    (run, Row(RUN, ", or name one with --engine", f"{RUN} --engine away/tiny", move("engines", "away"))),
    (run, Row(f"{RUN} --engine engines/\udcff", "is not a UTF-8 path; rename it", f"{RUN} --engine engines/utf8",
              move(TINY, "engines/\udcff"), move("engines/\udcff", "engines/utf8"))),
    (run, Row(RUN, "does not exist; build the engine from a checkpoint that has tokenizer.json", RUN,
              both(move("C/tokenizer.json", "kept.json"), build_again()),
              both(move("kept.json", "C/tokenizer.json"), build_again()))),
    (run, Row(RUN, "has no chat template; use --raw to send the prompt as it is", f"{RUN} --raw",
              the_checkpoint_has_no(None))),
    (run, Row(RUN, "; correct it in the checkpoint and build again", RUN, the_checkpoint_has_no("{% if %}"),
              the_checkpoint_has_no("{{ messages[0].content }}"))),
    (run, Row(RUN, ", or use --raw", f"{RUN} --raw", the_checkpoint_has_no("{% if %}"))),
    (run, Row(f"{RUN} --json-schema form.json", "; change it", f"{RUN} --json-schema form.json",
              write("form.json", '{"type": "nothing"}'), write("form.json", '{"type": "object"}'))),
    (run, Row(f"{RUN} --max-seq-len 99999", "max_seq_len is 99999, expected 2 to 2048", f"{RUN} --max-seq-len 2048",
              exit_code=2)),
    (run, Row(f"{RUN} --max-seq-len 2048 --kv-cache-memory 1", "; ask for 2 MiB or more with --kv-cache-memory",
              f"{RUN} --max-seq-len 2048 --kv-cache-memory 2", WIDE, exit_code=2)),
    (run, Row(f"{RUN} --max-seq-len 2048 --kv-cache-memory 1", ", or for a smaller --max-seq-len",
              f"{RUN} --max-seq-len 1024 --kv-cache-memory 1", WIDE, exit_code=2)),
    (run, Row(f"{'x' * 9000} --max-new-tokens 2", "; shorten it", RUN)),
    (serve, Row("--api-key= --port 0", "An API key is empty; leave it out", "--port 0", exit_code=2)),
    (serve, Row("--api-key= --port 0", ", or give one.", "--api-key=k --port 0", exit_code=2)),
    (serve, Row("--host 203.0.113.1", "; choose another --port or --host", "--host 127.0.0.1 --port 0")),
]  # fmt: skip
SUMMARIES = [
    Row(f"{SUM} --layers --reference kept.npz", "--layers needs the checkpoint in transformers; leave out --reference.",
        f"{SUM} --layers", exit_code=2),
    Row(f"{SUM} --save-reference a.npz --reference a.npz", "; leave one out.", f"{SUM} --save-reference a.npz",
        exit_code=2),
    Row(f"{SUM} --dataset odd.jsonl", "; name the fields to read", f"{SUM} --dataset odd.jsonl --document-field text",
        write("odd.jsonl", '{"text": "one"}\n')),
    Row(f"{SUM} --dataset odd.jsonl --max-samples 2", "; give each line its own", f"{SUM} --dataset odd.jsonl",
        write("odd.jsonl", '{"document": "one", "id": 1}\n{"document": "two", "id": 1}\n'),
        write("odd.jsonl", '{"document": "one", "id": 1}\n{"document": "two", "id": 2}\n')),
    Row(f"{SUM} --dataset odd.jsonl", ", which stands for nothing alone; remove it", f"{SUM} --dataset odd.jsonl",
        write("odd.jsonl", '{"document": "one \\ud800"}\n'), write("odd.jsonl", '{"document": "one "}\n')),
    Row(f"{SUM} --dataset odd.txt", "; convert it to UTF-8", f"{SUM} --dataset odd.txt",
        write("odd.txt", b"caf\xe9"), write("odd.txt", "café")),
    Row(f"{SUM} --thresholds absent.toml", "; choose another --thresholds", f"{SUM} --thresholds gate.toml",
        write("gate.toml", '"original.kl_mean" = { at_most = 1000 }')),
    Row(f"{SUM} --thresholds gate.toml", 'write one as "original.kl_mean" = { at_most = 0.01, reason = "why" }',
        f"{SUM} --thresholds gate.toml", write("gate.toml", ""),
        write("gate.toml", '"original.kl_mean" = { at_most = 0.01, reason = "why" }')),
    Row(f"{SUM} --resume", "is no result of qwen-summarize; run without --resume", SUM,
        both(make("R"), write("R/progress.jsonl", "x\n"))),
    Row(f"{SUM} --resume", " or choose another --report", f"{SUM} --resume --report S",
        both(make("R"), write("R/progress.jsonl", "x\n"))),
    Row(f"{SUM} --resume --max-new-tokens 4", "; run without --resume or with the same options", f"{SUM} --resume",
        compared()),
    Row(f"{SUM} --report notes.txt", "; choose another --report", SUM, write("notes.txt", "x")),
    Row(SUM, "the report cannot be written: Is a directory; give another --report", f"{SUM} --report S",
        make("R/report.json")),
    Row(SUM, "; the engine was built from it, name it with --checkpoint", f"{SUM} --checkpoint C",
        origin(checkpoint="gone")),
    Row(f"{SUM} --checkpoint C", "has changed; build the engine again", f"{SUM} --checkpoint C",
        config(transformers_version="0"), build_again()),
    Row(f"{SUM} --checkpoint C", ", or name the checkpoint it was built from", SUM,
        config(transformers_version="0")),
    Row(f"{SUM} --baseline absent.json", "; give a report.json", f"{SUM} --baseline R/report.json", compared()),
    Row(f"{SUM} --baseline engines/tiny/weights.bin", "; give a report.json of qwen-summarize",
        f"{SUM} --baseline R/report.json", compared()),
    Row(f"{SUM} --baseline odd.json", "is not JSON", f"{SUM} --baseline R/report.json",
        both(compared(), write("odd.json", "{"))),
    Row(f"{SUM} --baseline R/report.json", "make the report again with this installation's qwen-summarize",
        f"{SUM} --baseline R/report.json", both(compared(), config("R/report.json", schema_version=1)), compared()),
    Row(f"{SUM} --baseline R/report.json", "; make the report again with qwen-summarize",
        f"{SUM} --baseline R/report.json", both(compared(), config("R/report.json", engine=None)), compared()),
    Row(f"{SUM} --reference a.npz", "does not exist; make it with --save-reference", f"{SUM} --reference a.npz",
        followed=compared("--save-reference", "a.npz")),
    Row(f"{SUM} --reference a.npz", "; make it with --save-reference", f"{SUM} --reference a.npz",
        write("a.npz", "x"), compared("--save-reference", "a.npz")),
    Row(f"{SUM} --reference a.npz --max-samples 2", "; give --max-samples 1", f"{SUM} --reference a.npz",
        compared("--save-reference", "a.npz")),
    Row(f"{SUM} --reference a.npz --dataset odd.jsonl --max-samples 2",
        "; give the same --dataset and --max-samples 1", f"{SUM} --reference a.npz",
        both(compared("--save-reference", "a.npz"),
             write("odd.jsonl", '{"document": "one", "id": "x"}\n{"document": "two", "id": "y"}\n'))),
    Row(f"{SUM} --reference a.npz", "; save one for this engine and these texts",
        f"{SUM} --reference a.npz", compared("--save-reference", "a.npz", "--max-new-tokens 4"),
        compared("--save-reference", "a.npz")),
    Row(f"{SUM} --check --kv-cache-memory 1 --max-samples 3 --dataset long.jsonl", "; raise --kv-cache-memory to",
        f"{SUM} --check --kv-cache-memory 2 --max-samples 3 --dataset long.jsonl",
        both(WIDE, write("long.jsonl", "".join(json.dumps({"document": f"{i} long " * 200}) + "\n" for i in "abc")))),
]  # fmt: skip


@pytest.fixture
def folder(chat_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint C, its engine under engines/, a copy of that, and a text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(Manifest.read(chat_engine).origin.checkpoint, "C")
    shutil.copytree(chat_engine, TINY)
    shutil.copytree(chat_engine, "kept")
    Path("texts.jsonl").write_text("".join(json.dumps({"document": f"some text {i}", "id": i}) + "\n" for i in "ab"))
    return tmp_path


def named(row: Any) -> str:
    return f"{row.typed}: {row.advice}"[:70].encode(errors="replace").decode() if isinstance(row, Row) else ""


@pytest.mark.parametrize(("command", "row"), [*DAMAGED, *RUNS], ids=named)
def test_advice_works_when_it_is_followed(folder: Path, monkeypatch: Any, command: Any, row: Row) -> None:
    async def ends_at_once(*_: Any) -> None:
        pass

    monkeypatch.setattr("qwen_serve.http.program._serve", ends_at_once)
    follow(command, row)


@pytest.mark.parametrize("row", SUMMARIES, ids=named)
def test_advice_of_a_comparison_works_when_it_is_followed(folder: Path, row: Row) -> None:
    follow(summarize, row, judged=True)


def test_a_port_that_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ends_at_once(*_: Any) -> None:
        pass

    monkeypatch.setattr("qwen_serve.http.program._serve", ends_at_once)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = typed(serve, f"--port {taken.getsockname()[1]}")
        assert "; choose another --port or --host" in refused.stderr
        assert typed(serve, "--port 0").exit_code == 0


def test_an_adapter_that_is_put_back(folder: Path) -> None:
    manifest = Manifest.read(Path(TINY))
    adapter = MergedAdapter("A", 1.0, {"adapter_config.json": hashlib.sha256(b"{}").hexdigest()})
    merged = dataclasses.replace(manifest, origin=dataclasses.replace(manifest.origin, adapters=(adapter,)))
    with pytest.raises(CheckpointError, match="is not there or has changed; put it back, or build the engine again"):
        check_checkpoint(merged, Path("C"))
    make("A")()
    write("A/adapter_config.json", "{}")()
    check_checkpoint(merged, Path("C"))


# what is missing -> what is typed where it is, and where it is not
EXTRAS: list[tuple[str, Any, str]] = [
    ("llguidance", run, f"{RUN} --json-schema form.json"),
    ("prometheus_client", serve, "--port 0"),
    ("transformers", summarize, SUM),
]


@pytest.mark.parametrize(("package", "command", "line"), EXTRAS)
def test_a_package_that_is_missing_is_named(folder, monkeypatch, package, command, line) -> None:
    """pip knows what the advice names: it is what pyproject.toml asks for."""
    write("form.json", '{"type": "object"}')()
    monkeypatch.setitem(sys.modules, package, None)
    refused = typed(command, line)
    assert refused.exit_code == 1
    found = re.search(r"run pip install (.*)", refused.stderr)
    assert found, refused.stderr
    named = {re.split("[<>=]", word.strip("',"))[0] for word in found[1].split() if not word.startswith("--")}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    known = {re.split("[<>=]", requirement)[0] for needed in extras.values() for requirement in needed}
    assert package in named
    assert named - {"or", "use", "--reference", "FILE"} <= known


OF_OTHERS = ("api", "bench", "harness", "runtime", "sampling", "torch_model")  # of python and of builds
FOLDERS = ("qwen_engine", "qwen_plugin", *sorted(
    f"qwen_run/{path.name}" for path in (ROOT / "qwen_run").iterdir()
    if (path / "__init__.py").is_file() and path.name not in OF_OTHERS
))  # fmt: skip
# what is not followed here: a piece of the message -> why, or where it is
OPTIONS = "tests/test_advice.py"
ELSEWHERE = {
    "writes no answer; leave out": "without them: tests/qwen_run/commands/test_run_pooled.py",
    "expected one that {}; ask this one with": "tests/whole/test_pooled.py",
    "free some memory": "of the machine",
    "remove it by hand": "what cannot be removed is a fault of the file system: tests/qwen_engine/test_user_cache.py",
    "install the package again": "tests/qwen_plugin/test_compile.py compiles what is not there",
    "QWEN_PLUGIN_ISA names": "without it is how all tests run",
    "the checkpoint lacks": "the one it was built from: tests/qwen_run/accuracy/test_weight_checks.py",
    "the weights of {} cannot be read": "the one it was built from: tests/qwen_run/accuracy/test_weight_checks.py",
    "nothing, give at least": "tests/qwen_run/accuracy/test_gate.py",
    "which is merged into the engine": "a test above",
    "; write one as": "a row follows it",
    "is no directory; make it first": "tests/test_advice_of_builds.py",
    "choose another --output-file": OPTIONS,
    "choose another --output-logits": OPTIONS,
    "torch and transformers are needed": "a test above",
    "llguidance is not installed": "a test above",
    "is not here; name its directory": "the row of a checkpoint that is gone names it",
    "; lower --max-new-tokens": "every row asks for few",
    ", or use --reference FILE": "tests/qwen_run/accuracy/test_saved_reference.py",
    "the saved reference has no text of these": "tests/qwen_run/accuracy/test_saved_reference.py",
    "this runtime reads {}; save it again": "saving again is what other rows do",
    "remove the file or choose another --output-file": OPTIONS,
    "wait for it to end": "tests/qwen_run/commands/test_run.py asks again when the file is free",
    "where the output goes; make room": "tests/qwen_run/commands/test_command.py; room is of the disk",
    "set another limit with --max-new-tokens": OPTIONS,
    "convert them with jq": OPTIONS,
    "at temperature 0; add --temperature": OPTIONS,
    "leave out --raw": OPTIONS,
    "give it in several parts": "what any row gives is short",
    "choose another for one": OPTIONS,
    "leave out -n and --num-beams": OPTIONS,
    "name it with --engine": OPTIONS,
    "the chat template's {} is not to be set": "tests/test_advice_of_python.py",
    "after is {}, which is no token": "tests/test_advice_of_python.py",
    "has no <think>; leave it out": "tests/test_advice_of_python.py",
    "tokenizer.json has decoder": "the tokenizer of every row is such a one",
    ", or use another checkpoint": "every row uses one whose tokenizer works",
    "; run it whole, without stages": "tests/qwen_run/runtime/test_stage.py runs every engine whole, too",
    "set QWEN_PLUGIN_ISA where processors differ": "tests/qwen_run/pipeline/test_ray_stages.py has stages alike, too",
    "or ask for fewer stages": "tests/qwen_run/pipeline/test_ray_stages.py asks for fewer",
    "run pip install 'ray[data]>=2.60'": "tests/qwen_run/pipeline/test_ray_stages.py, where it is installed",
    "; install one version everywhere": "one version is what all tests of stages have",
}


def test_every_advice_is_followed_or_says_why_not() -> None:
    followed = [row.advice for row in (*(row for _, row in (*DAMAGED, *RUNS)), *SUMMARIES)]
    assert not_followed(FOLDERS, followed, ELSEWHERE) == []
    assert stale(FOLDERS, ELSEWHERE) == []
