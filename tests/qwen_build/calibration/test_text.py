"""The text of a calibration: what of it is read, and what a user is told who gives none that can be."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from cases.calibration import LETTERS, letters, with_tokenizer
from qwen_build.calibration.built_in import built_in_text
from qwen_build.calibration.text import DEFAULT_TOKENS, read_halves, read_sequences
from qwen_build.checkpoint.config import ModelConfig
from qwen_engine.errors import BuildError
from qwen_run.accuracy.datasets import built_in_documents, half_of, overlap
from qwen_run.text.tokenizer import Tokenizer


@pytest.fixture
def directory(tiny_checkpoint, tmp_path):
    return with_tokenizer(tiny_checkpoint("qwen2").path, tmp_path / "checkpoint")


@pytest.fixture
def config(directory):
    return ModelConfig.from_hf(directory)


def write_documents(directory, documents):
    path = directory / "texts.jsonl"
    path.write_text("".join(json.dumps({"document": document}) + "\n" for document in documents))
    return path


def ids_of(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text if letter in LETTERS]


def test_documents_follow_each_other_in_whole_sequences(directory, config, tmp_path):
    documents = [letters(700, 1), letters(900, 2), letters(50, 3)]
    path = write_documents(tmp_path, documents)
    found = read_sequences(directory, config, path)
    assert found.shape == (3, 512)
    assert found.dtype == np.int64
    documents.sort(key=half_of)  # "calibration" comes before "evaluation"
    np.testing.assert_array_equal(found.reshape(-1), ids_of("".join(documents))[:1536])


def test_a_document_calibrates_or_verifies(directory, config, tmp_path):
    documents = [letters(200, seed) for seed in range(40)]
    path = write_documents(tmp_path, documents)
    halves = {half: "".join(one for one in documents if half_of(one) == half) for half in ("calibration", "evaluation")}
    first, held_out, words = read_halves(directory, config, path, None, most_held_out=3)
    count = len(halves["calibration"]) // 512
    np.testing.assert_array_equal(first.ravel(), ids_of(halves["calibration"])[: count * 512])
    np.testing.assert_array_equal(held_out.ravel(), ids_of(halves["evaluation"])[: 3 * 512])
    assert str(path) in words
    # what engines calibrate with that are told the file and so many tokens
    np.testing.assert_array_equal(read_sequences(directory, config, path, first.size), first)


def test_of_one_document_the_end_verifies(directory, config, tmp_path):
    text = letters(512 * 9)
    for path in (write_documents(tmp_path, [text]), tmp_path / "text.txt"):
        path.exists() or path.write_text(text)
        first, held_out, _ = read_halves(directory, config, path, None, most_held_out=1)
        assert (len(first), len(held_out)) == (6, 3)
        np.testing.assert_array_equal(np.concatenate([first, held_out]).ravel(), ids_of(text))


def test_without_a_file_the_halves_are_those_of_the_samples(directory, config):
    first, held_out, _ = read_halves(directory, config, None, 1024, most_held_out=2)
    for half, found in (("calibration", first), ("evaluation", held_out)):
        text = "".join(document.document for document in built_in_text(directory, half))
        np.testing.assert_array_equal(found.ravel(), ids_of(text)[:1024])


@pytest.mark.parametrize(
    ("lengths", "tokens", "message"),
    [
        ({"calibration": 1000, "evaluation": 2000}, None, "one half of .* has 1,000 tokens, calibration takes 1,024"),
        ({"calibration": 2000, "evaluation": 500}, None, "the other half of .* has 500 tokens, calibration takes 512"),
        ({"calibration": 2000, "evaluation": 500}, 2048, "one half of .* has 2,000 tokens, calibration takes 2,048"),
        ({"calibration": 1500}, None, "makes 1,024 tokens, 1,536 are needed to calibrate and to verify"),
    ],
)
def test_text_of_which_nothing_can_be_held_out(lengths, tokens, message, directory, config, tmp_path):
    documents = []
    for half, length in lengths.items():
        texts = (letters(length, seed) for seed in range(99))
        documents.append(next(text for text in texts if half_of(text) == half))
    with pytest.raises(BuildError, match=message):
        read_halves(directory, config, write_documents(tmp_path, documents), tokens, most_held_out=8)


@pytest.mark.parametrize(("tokens", "sequences"), [(1024, 2), (1500, 2), (2048, 4), (None, DEFAULT_TOKENS // 512)])
def test_so_many_tokens_are_read(tokens, sequences, directory, config, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(letters(20_000))
    assert len(read_sequences(directory, config, path, tokens)) == sequences


def test_without_a_file_it_is_the_calibration_half(directory, config, tmp_path):
    texts = "".join(document.document for document in built_in_text(directory, "calibration"))
    np.testing.assert_array_equal(read_sequences(directory, config, None, 4096).reshape(-1), ids_of(texts)[:4096])


def test_the_built_in_text_has_all_kinds_early_and_whole_documents_once(directory):
    halves = {half: built_in_text(directory, half) for half in ("calibration", "evaluation")}
    first = "".join(document.document for document in halves["calibration"])[:40_000]
    for words in ("User: ", "    return ", "，", " @-@ "):
        assert first.count(words) > 2, words
    assert not overlap(halves["calibration"], halves["evaluation"])
    ids = [{document.id for document in half} for half in halves.values()]
    assert not ids[0] & ids[1]
    for sample in built_in_documents("default", "calibration"):
        parts = [document.document for document in halves["calibration"] if document.id == sample.id]
        assert "".join(parts) == sample.document
        assert all(len(part) > 0 for part in parts)


def test_chats_are_written_by_the_checkpoints_template(directory):
    config = {"chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    chats = [one.document for one in built_in_text(directory, "calibration") if one.id.startswith("chat-")]
    assert chats
    assert all(chat.startswith("<user>") and "<assistant>" in chat for chat in chats)


def test_a_file_is_a_file_though_a_sample_has_its_name(directory, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").write_text("b" * 1024)
    assert set(read_sequences(directory, config, tmp_path.joinpath("default").relative_to(tmp_path)).reshape(-1)) == {1}


def test_of_a_long_text_only_the_beginning_is_tokenised(directory, config, tmp_path, monkeypatch):
    path, seen = tmp_path / "text.txt", []
    path.write_text(letters(200_000))
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: seen.append(len(text)) or encode(self, text))
    found = read_sequences(directory, config, path, 1024)
    assert seen == [64 * 1024]
    np.testing.assert_array_equal(found.reshape(-1), ids_of(letters(200_000))[:1024])


def test_sequences_are_no_longer_than_the_model_takes(directory, config, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(letters(200))
    config = dataclasses.replace(config, longest=config.longest._replace(tokens=80))
    assert read_sequences(directory, config, path).shape == (2, 80)


@pytest.mark.parametrize(
    ("content", "tokens", "message"),
    [
        (b"a" * 1023, None, "has 1,023 tokens, calibration takes 1,024; give a longer text with --calibration"),
        (
            b"a" * 2000,
            2048,
            "has 2,000 tokens, calibration takes 2,048; give a longer text with --calibration, or fewer",
        ),
        (b"a" * 2000, 1000, "--calibration-tokens 1000 is too few, expected 1024 or more"),
        (b" \n", None, "is empty"),
        (b"a\xff", None, "UTF-8"),
        (b'{"document": 3}', None, "'document' is int, expected text"),
        (b"{not json", None, "is not JSON"),
        (None, None, "is neither a file nor"),
    ],
)
def test_a_text_that_cannot_be_used(content, tokens, message, directory, config, tmp_path):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BuildError) as error:
        read_sequences(directory, config, path, tokens)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_a_tokenizer_or_with_another_models(directory, config, tmp_path):
    with pytest.raises(BuildError, match="has token 25, the model 20; use the model's own"):
        read_sequences(directory, dataclasses.replace(config, vocab_size=20))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(BuildError, match=r"has no tokenizer\.json, which calibration needs"):
        read_sequences(directory, config)
