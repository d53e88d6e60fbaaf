"""What the commands print for programs: one head for all, one word for each thing, the same rounding."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from qwen_build.cli import main as build
from qwen_engine.json_output import SIGNIFICANT_DIGITS, to_json
from qwen_run.accuracy.report import Cost, EngineInfo, Report
from qwen_run.bench import measure
from qwen_run.bench.figures import Figures
from qwen_run.commands.bench import main as bench
from qwen_run.commands.inspect import main as inspect

HEAD = {"schema_version": int, "command": str, "created": str, "engine": dict}


@pytest.fixture
def printed(tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What each command prints with ``--json``; of qwen-run and qwen-summarize, their own tests see to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "PAUSE_S", 0.0)
    monkeypatch.setattr(measure, "Reader", lambda size_bytes, threads: SimpleNamespace(bytes_per_s=lambda: 1e9 / 3))
    checkpoint = str(tiny_checkpoint("qwen2").path)
    typed = {
        "qwen-build": (build, [checkpoint, "--output", "engines/tiny", "--json"]),
        "qwen-build --dry-run": (build, [checkpoint, "--dry-run", "--json"]),
        "qwen-inspect": (inspect, ["--json"]),
        "qwen-inspect --graph": (inspect, ["--graph", "--json"]),
        "qwen-inspect --list": (inspect, ["--list", "--json"]),
        "qwen-bench": (bench, ["latency", "--input-length", "9", "--output-length", "3", "--repeat", "1", "--threads",
                               "1", "--json"]),
    }  # fmt: skip
    found = {}
    for name, (command, arguments) in typed.items():
        result = CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        found[name] = json.loads(result.stdout)
    return found


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from numbers(inner)


def test_every_command_prints_one_object_with_one_head(printed: dict[str, dict[str, Any]]) -> None:
    for name, record in printed.items():
        for key, kind in HEAD.items():
            none = key == "engine" and name in ("qwen-build --dry-run", "qwen-inspect --list")
            assert isinstance(record[key], type(None) if none else kind), (name, key)
        assert record["command"].startswith(name.partition(" ")[0])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["created"])
        if record["engine"]:
            assert record["engine"] == {"name": "tiny", "directory": "engines/tiny"}
        if name == "qwen-inspect --graph":  # whose numbers are the graph's own
            continue
        assert list(record)[: len(HEAD)] == list(HEAD)
        assert all(number == float(f"{number:.{SIGNIFICANT_DIGITS}g}") for number in numbers(record)), name


def test_a_report_has_the_same_head_and_the_same_words() -> None:
    assert HEAD.keys() <= {field.name for field in fields(Report)}
    assert {"name", "directory"} <= {field.name for field in fields(EngineInfo)}
    figures, costs = ({field.name for field in fields(kind)} for kind in (Figures, Cost))
    assert {"ttft_ms", "decode_tokens_per_s"} <= figures & costs


def test_json_can_be_encoded_and_does_not_drive_a_terminal() -> None:
    record = {"text": "é \ud800 \x1b \x9b \x7f"}
    text = to_json(record)
    text.encode()
    assert not set(text) & {"\x1b", "\x9b", "\x7f"}
    assert json.loads(text) == record
    assert "é" in to_json({"text": "é"})
