"""What an engine gets of a checkpoint's files for text: all of their tokens, and those that end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cases.configs import PUBLISHED
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.text_files import read_text_files
from qwen_build.checkpoint.tokenizer_files import engine_tokenizer
from qwen_engine.errors import CheckpointError
from qwen_run.text.token_text import BYTES_OF_CHARACTERS
from qwen_run.text.tokenizer_file import QWEN_WORDS

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("i", "m")]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = ["hello world.", "a<|im_end|>b", "<extra>foo</extra> bar", "x <extra> y", "it's  12\n\n é e\u0301 中", "<a><b>"]
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def vocabulary() -> dict[str, int]:
    tokens = [*BYTES_OF_CHARACTERS, *(left + right for left, right in MERGES)]
    return {token: i for i, token in enumerate(tokens)}


def whole_tokenizer() -> Tokenizer:
    core = Tokenizer(models.BPE(vocabulary(), MERGES))
    core.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"), byte_level])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return core


FIRST = len(vocabulary()) + len(SPECIAL)  # the next id


def token(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    return {"content": content, "special": special, **FLAGS, **flags}


def write(directory: Path, config: dict[str, Any], files: dict[str, Any], slow: bool = False) -> Path:
    """A checkpoint's files for text; ``slow``: saved without tokenizer.json."""
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "qwen2"}')
    if slow:
        (directory / "vocab.json").write_text(json.dumps(vocabulary()))
        merges = "\n".join(" ".join(merge) for merge in MERGES)
        (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    else:
        whole_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"} | config))
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


DECLARED = {str(len(vocabulary()) + i): token(content) for i, content in enumerate(SPECIAL)}

ADDED, FAST = {"__type": "AddedToken"}, "PreTrainedTokenizerFast"

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "nothing to add": ({"added_tokens_decoder": DECLARED}, {}, False),
    "declared tokens": (
        {"added_tokens_decoder": DECLARED | {str(FIRST): token("<extra>"), str(FIRST + 1): token("</extra>", False)}},
        {},
        False,
    ),
    "a token that strips": (
        {"added_tokens_decoder": DECLARED | {str(FIRST): token("<extra>", False, lstrip=True, rstrip=True)}},
        {},
        False,
    ),
    "other ids": ({"added_tokens_decoder": DECLARED | {"900": token("<b>"), "700": token("<a>")}}, {}, False),
    "a token made special": ({"added_tokens_decoder": DECLARED | {"3": token("$", True)}}, {}, False),
    "added_tokens.json": ({}, {"added_tokens.json": {"</extra>": FIRST + 1, "<extra>": FIRST}}, False),
    "additional special tokens": ({"additional_special_tokens": ["<extra>", "</extra>"]}, {}, False),
    "extra special tokens": ({"extra_special_tokens": ["<extra>"], "additional_special_tokens": ["<b>"]}, {}, False),
    "special tokens by a name of their own": ({"extra_special_tokens": {"image_token": "<extra>"}}, {}, False),
    "roles of other tokens": ({"eos_token": "<extra>", "pad_token": ADDED | token("<b>")}, {}, False),
    "a map of roles": ({}, {"special_tokens_map.json": {"pad_token": "<b>", "sep_token": token("<a>")}}, False),
    "slow": ({}, {"added_tokens.json": {name: len(vocabulary()) + i for i, name in enumerate(SPECIAL)}}, True),
    "slow, declared": ({"added_tokens_decoder": DECLARED | {str(FIRST): token("<extra>", False)}}, {}, True),
    "slow, prefixed": ({"added_tokens_decoder": DECLARED, "add_prefix_space": True}, {}, True),
    "slow, without a special token": ({}, {}, True),
    "a general class": ({"tokenizer_class": FAST, "additional_special_tokens": ["<a>"]}, {}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_engine_tokenises_as_transformers_does(name, tmp_path):
    config, files, slow = CASES[name]
    checkpoint = write(tmp_path / "ckpt", config, files, slow)
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    found = engine_tokenizer(checkpoint)
    assert found is not None
    ours = found.open()
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text, add_special_tokens=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_a_tokenizer_without_additions_is_copied_byte_for_byte(tmp_path):
    checkpoint = write(tmp_path / "ckpt", {"added_tokens_decoder": DECLARED}, {})
    found = engine_tokenizer(checkpoint)
    assert found is not None
    assert found.content == (checkpoint / "tokenizer.json").read_bytes()
    assert found.notes == ()


def test_an_id_that_transformers_does_not_keep_is_named(tmp_path):
    found = engine_tokenizer(write(tmp_path / "ckpt", *CASES["other ids"]))
    assert found is not None
    assert found.notes == (
        f"<a> is declared with the id 700 and gets {FIRST}, as in transformers.",
        f"<b> is declared with the id 900 and gets {FIRST + 1}, as in transformers.",
    )


@pytest.mark.parametrize("slow", [False, True])
def test_switches_that_engines_do_not_have_are_named(slow, tmp_path):
    config = {"added_tokens_decoder": DECLARED, "split_special_tokens": True, "add_prefix_space": True}
    found = engine_tokenizer(write(tmp_path / "ckpt", config, {}, slow))
    assert found is not None
    named = [note.split()[1] for note in found.notes]
    assert named == ["split_special_tokens", *([] if slow else ["add_prefix_space"])]


@pytest.mark.parametrize(
    ("files", "slow", "message"),
    [
        ({"tokenizer.json": {"added_tokens": 5}}, False, "tokenizer.json is no tokenizer"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": token("a")}}}, False, "tokens of .* are damaged"),
        ({"tokenizer_config.json": {"added_tokens_decoder": ["a"]}}, False, "tokens of .* are damaged"),
        ({"tokenizer_config.json": {"additional_special_tokens": [5]}}, False, "tokens of .* are damaged"),
        ({"tokenizer_config.json": {"eos_token": 5}}, False, "tokens of .* are damaged"),
        ({"added_tokens.json": {"a": "5"}}, False, "tokens of .* are damaged"),
        ({"vocab.json": {"a": "x"}}, True, "merges.txt and vocab.json make no tokenizer"),
        ({"vocab.json": {"a": 0}}, True, "merges.txt and vocab.json make no tokenizer"),
    ],
)
def test_damaged_tokenizers_are_refused_by_name(files, slow, message, tmp_path):
    checkpoint = write(tmp_path / "ckpt", {}, files, slow)
    with pytest.raises(CheckpointError, match=message):
        engine_tokenizer(checkpoint)


def test_a_checkpoint_without_a_tokenizer_has_none(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")  # without merges it is none
    assert engine_tokenizer(tmp_path) is None


# what ends an answer


def read(checkpoint: Path, **config: Any):
    return read_text_files(checkpoint, ModelConfig.from_json(PUBLISHED | {"vocab_size": 300} | config))


def test_end_of_sequence_ids_are_the_union(tmp_path):
    files = {"generation_config.json": {"eos_token_id": [9, 7]}}
    checkpoint = write(tmp_path / "ckpt", {"eos_token": {"content": "<|endoftext|>", "__type": "AddedToken"}}, files)
    end_of_text, _, end_of_turn = range(FIRST - 3, FIRST)
    assert read(checkpoint, eos_token_id=7).eos_token_ids == (9, 7, end_of_text, end_of_turn)


@pytest.mark.parametrize(
    ("files", "eos", "message"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 300]}}, 7, r"generation_config.json: .* \[300\] are outside"),
        ({"generation_config.json": {"eos_token_id": -1}}, 7, r"generation_config.json: .* \[-1\] are outside"),
        ({}, [7, 400], r"ckpt/config.json: .* \[400\] are outside the vocabulary of 300; correct eos_token_id there"),
        ({"generation_config.json": {"eos_token_id": "<|im_end|>"}}, 7, "generation_config.json: eos_token_id is"),
    ],
)
def test_ends_that_no_token_has_name_their_file(files, eos, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read(write(tmp_path / "ckpt", {}, files), eos_token_id=eos)


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "tokenizer.json", "merges.txt"])
def test_a_link_out_of_the_checkpoint_is_not_copied(name, tmp_path):
    checkpoint = write(tmp_path / "ckpt", {}, {}, slow=name == "merges.txt")
    private = tmp_path / "id_rsa"
    private.write_text("s3cret")
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to("../id_rsa")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to .*id_rsa, outside the checkpoint; put the file"):
        read(checkpoint)
