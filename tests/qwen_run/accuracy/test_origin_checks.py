"""An engine and the checkpoint it came from: files, tokenizer, template, ends of an answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_engine.errors import CheckpointError
from qwen_engine.manifest import MANIFEST_FILE, Manifest
from qwen_run.accuracy.origin_checks import (
    check_checkpoint,
    compare_text_facts,
    compare_text_files,
    describe_difference,
    read_text_facts,
)

ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TOKENIZER: dict[str, Any] = {
    "added_tokens": [{"content": "<|im_end|>", "id": 5} | ADDED, {"content": "<|endoftext|>", "id": 6} | ADDED],
    "normalizer": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    "model": {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4},
        "merges": [["a", "b"], ["b", "c"]],
        "ignore_merges": False,
    },
}


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    directory = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("qwen2").path, directory)
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (directory / "generation_config.json").write_text('{"eos_token_id": [6, 9]}')
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return directory


@pytest.fixture
def engine(checkpoint, tmp_path) -> Path:
    """An engine of ``checkpoint``; built anew because the tests change it."""
    from qwen_build.checkpoint.locate import resolve_checkpoint
    from qwen_build.checkpoint.weights import Checkpoint
    from qwen_build.engine_build import plan_build, write_engine
    from qwen_build.plan.options import BuildOptions

    with Checkpoint.open(checkpoint) as weights:
        plan = plan_build(weights, resolve_checkpoint(str(checkpoint)), BuildOptions(quant="int8"))
        write_engine(plan, weights, tmp_path / "engine")
    return tmp_path / "engine"


def failed(checks) -> dict[str, str]:
    return {check.name: check.message for check in checks if not check.passed}


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_new_engine_passes_every_check(engine, checkpoint):
    checks = compare_text_files(engine, checkpoint)
    assert [check.name for check in checks] == ["tokenizer", "chat template", "generation defaults", "end of sequence"]
    assert failed(checks) == {}
    assert checks[-1].message == "[5, 6, 9]"


def test_a_merge_that_was_removed_is_named(engine, checkpoint):
    rewrite(engine / "tokenizer.json", lambda tokenizer: tokenizer["model"]["merges"].pop())
    found = failed(compare_text_files(engine, checkpoint))
    assert found == {
        "tokenizer": "tokenizer.json of the engine differs from the checkpoint's: it lacks 1 of the merges ('b c')"
    }


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_another_template_is_seen(file, engine, checkpoint):
    (engine / file).write_text('{"eos_token": "a"}')
    assert failed(compare_text_files(engine, checkpoint)) == {
        "chat template": f"{file} of the engine differs from the checkpoint's"
    }


def test_a_template_that_only_one_side_has_is_seen(engine, checkpoint):
    (engine / "chat_template.jinja").unlink()
    (engine / "chat_template.json").write_text("{}")
    assert failed(compare_text_files(engine, checkpoint)).keys() == {"chat template"}


@pytest.mark.parametrize(
    ("ids", "message"),
    [([6, 5], "the engine lacks [9]"), ([9, 5, 6, 12], "the engine has [12] besides")],
)
def test_other_ends_of_an_answer_are_seen(ids, message, engine, checkpoint):
    rewrite(engine / MANIFEST_FILE, lambda manifest: manifest.update(eos_token_ids=ids))
    assert failed(compare_text_files(engine, checkpoint)) == {"end of sequence": message}


def test_facts_that_were_kept_find_the_same_without_the_checkpoint(engine, checkpoint):
    facts = read_text_facts(checkpoint)
    rewrite(engine / "tokenizer.json", lambda tokenizer: tokenizer["model"]["merges"].pop())
    rewrite(engine / MANIFEST_FILE, lambda manifest: manifest.update(eos_token_ids=[5]))
    expected = compare_text_files(engine, checkpoint)
    shutil.rmtree(checkpoint)
    found = compare_text_facts(engine, facts)
    assert [(check.name, check.passed) for check in found] == [(check.name, check.passed) for check in expected]
    assert failed(found).keys() == {"tokenizer", "end of sequence"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["vocab"].update(ab=4), "it lacks 1 of the vocabulary ('ab' = 3); it adds 1"),
        (lambda t: t["model"]["merges"].reverse(), "the merges stand in another order"),
        (lambda t: t["added_tokens"].pop(), 'it lacks 1 of the added tokens ({"content": "<|endoftext|>", "id": 6'),
        (lambda t: t.update(normalizer={}), "it lacks 1 of the settings (normalizer = null)"),
        (lambda t: t["model"].update(ignore_merges=True), "it adds 1 of the settings (model.ignore_merges = true)"),
        (lambda t: t["model"].update(merges=["a b", "b c"]), "only in how the same content is written"),
        (lambda t: t.pop("model"), "one of them is not a tokenizer of the kind Qwen has"),
    ],
)  # fmt: skip
def test_the_difference_of_two_tokenizers_is_described(change, message, tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(TOKENIZER))
    second.write_text(json.dumps(TOKENIZER, indent=1))
    assert describe_difference(first.read_bytes(), second) == "only in how the same content is written"
    rewrite(second, change)
    assert message in describe_difference(first.read_bytes(), second)


def test_the_checkpoint_an_engine_was_built_from_is_accepted(engine, checkpoint):
    check_checkpoint(Manifest.read(engine), checkpoint)


def test_a_changed_checkpoint_is_refused_by_name(engine, checkpoint):
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="was built from: ") as refusal:
        check_checkpoint(Manifest.read(engine), checkpoint)
    assert "model.safetensors has changed" in str(refusal.value)
    assert "chat_template.jinja is missing" in str(refusal.value)
    assert "config.json" not in str(refusal.value).replace("generation_config.json", "")


def test_a_checkpoint_that_is_gone_is_asked_for(engine, checkpoint):
    with pytest.raises(CheckpointError, match="is not here; name its directory with --checkpoint"):
        check_checkpoint(Manifest.read(engine), checkpoint / "gone")
