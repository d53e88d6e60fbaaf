"""Files that are something else: nothing waits for a pipe, and nothing is read without end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cases.scripted import write_text_files
from qwen_build.checkpoint.files import read_json
from qwen_build.checkpoint.text_files import read_text_files
from qwen_build.plan.rules import read_rules
from qwen_engine.errors import QwenError
from qwen_engine.manifest import Manifest
from qwen_engine.regular_files import read_regular
from qwen_run.accuracy.datasets import load_dataset
from qwen_run.accuracy.gate import load_thresholds
from qwen_run.accuracy.report import Report
from qwen_run.bench.trace import read_trace
from qwen_run.commands.run_files import prompt_text
from qwen_run.engine_files.onnx_file import read_graph
from qwen_run.text.chat_template import ChatTemplate
from qwen_run.text.text_model import TextModel
from qwen_run.text.tokenizer import Tokenizer

READERS: dict[str, Callable[[Path], object]] = {
    "engine.json": lambda path: Manifest.read(path.parent),
    "config.json": read_json,
    "tokenizer.json": lambda path: Tokenizer.load(path.parent),
    "tokenizer_config.json": lambda path: ChatTemplate.load(path.parent),
    "generation_config.json": lambda path: TextModel.load(path.parent),
    "model.onnx": read_graph,
    "rules.json": read_rules,
    "calibration.txt": lambda path: load_dataset(str(path)),
    "merges.txt": lambda path: read_text_files(path.parent, SimpleNamespace(vocab_size=9, eos_token_ids=())),
    "thresholds.toml": load_thresholds,
    "report.json": Report.read,
    "trace.csv": read_trace,
    "prompts.txt": lambda path: prompt_text(SimpleNamespace(input_file=str(path))),
}


@pytest.mark.parametrize("name", list(READERS))
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_an_error_that_names_it(tmp_path: Path, name: str, kind: str) -> None:
    write_text_files(tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if name == "merges.txt":  # is read where there is no tokenizer.json
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text("{}")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(QwenError) as found:
        READERS[name](path)
    assert len(str(found.value).splitlines()) == 1


def test_content_kinds_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_regular(tmp_path / "file") == read_regular(tmp_path / "file", 10) == b"0123456789"
    with pytest.raises(OSError, match="it has 10 bytes, expected at most 9"):
        read_regular(tmp_path / "file", 9)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is no regular file"):
        read_regular(tmp_path / "pipe")
