"""A tokenizer.json that hangs or fills memory: an error that names the file; those of Qwen are opened at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from cases.scripted import core_tokenizer, write_text_files
from qwen_engine.errors import EngineError
from qwen_run.text import tokenizer_file
from qwen_run.text.tokenizer import Tokenizer
from qwen_run.text.tokenizer_file import LLAMA_WORDS, QWEN_WORDS, has_known_parts

Change = Callable[[dict[str, Any]], object]


def replaced(times: int) -> Change:
    """The normalizer makes 32 characters of every one, so many times over."""
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 32}
    return lambda config: config.update(normalizer={"type": "Sequence", "normalizers": [step] * times})


def split(pattern: str) -> Change:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return lambda config: config.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [part, byte_level]})


def wrapped(config: dict[str, Any]) -> None:
    """Every text comes a hundred thousand times."""
    single = [{"Sequence": {"id": "A", "type_id": 0}}] * 100_000
    config["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}


HOSTILE: dict[str, Change] = {
    "text that grows": replaced(6),
    "text that comes again": wrapped,
}


def written(directory: Path, change: Change) -> Path:
    write_text_files(directory)
    path = directory / "tokenizer.json"
    config = json.loads(path.read_text("utf-8"))
    change(config)
    path.write_text(json.dumps(config), "utf-8")
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="children are limited on Linux only")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr("qwen_run.text.bounded_run.CPU_S", 1)
    with pytest.raises(
        EngineError, match=r"tokenizer\.json: to read it and to tokenize short texts takes more than 1 s"
    ):
        Tokenizer.load(written(tmp_path, HOSTILE[name]))
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="tried on Linux only")
def test_a_pattern_that_tries_every_way_is_refused_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"tokenizer\.json cannot tokenize: .*retry-limit-in-match over; download"):
        Tokenizer.load(written(tmp_path, split(r"(?:a|aa|a)+[bcd]{3}")))


def test_known_parts_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_file, "run_bounded", lambda *_: pytest.fail("tried"))
    for index, pattern in enumerate((QWEN_WORDS, LLAMA_WORDS)):
        core = core_tokenizer()
        core.normalizer = normalizers.NFC()
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        directory = write_text_files(tmp_path / str(index))
        core.save(str(directory / "tokenizer.json"))
        assert Tokenizer.load(directory).encode("the 12") == core.encode("the 12").ids


def test_other_parts_are_tried_and_taken(tmp_path: Path) -> None:
    directory = written(tmp_path, split(r"\w+|\W+"))
    assert not has_known_parts((directory / "tokenizer.json").read_bytes())
    assert Tokenizer.load(directory).decode(Tokenizer.load(directory).encode("the answer")) == "the answer"


def test_a_name_cannot_hide_behind_escapes(tmp_path: Path) -> None:
    directory = written(tmp_path, replaced(6))
    content = (directory / "tokenizer.json").read_bytes()
    assert not has_known_parts(content)
    assert not has_known_parts(content.replace(b'"type": "Replace"', b'"t\\u0079pe": "Replace"'))
    assert has_known_parts(json.dumps(json.loads(core_tokenizer().to_str())).encode())
