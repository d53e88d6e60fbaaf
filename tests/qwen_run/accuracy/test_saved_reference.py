"""A saved reference says what the live one said, to those it was saved for, without torch."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cases.processes import run_python
from cases.saved_reference import IDENTITY, SEQUENCES, positions
from qwen_engine.errors import RequestError
from qwen_run.accuracy.origin_checks import TextFacts
from qwen_run.accuracy.recipe import Recipe
from qwen_run.accuracy.reference import CHUNK_TOKENS, HuggingFace
from qwen_run.accuracy.report import Cost
from qwen_run.accuracy.saved_reference import (
    Answers,
    Recording,
    SavedReference,
    load_reference,
    save_reference,
)
from qwen_run.runtime.engine import Engine

FACTS = TextFacts({"tokenizer.json": "bb"}, (7, 9))
COST = Cost("reference", 1, 2, 12.5, 30.0, 10**9, None)


@pytest.fixture(scope="module")
def engine_directory(tiny_checkpoint, build_engine) -> Path:
    return build_engine(tiny_checkpoint("qwen3").path, quant="int8")


@pytest.fixture(scope="module")
def live(tiny_checkpoint, engine_directory) -> dict[str, HuggingFace]:
    path = tiny_checkpoint("qwen3").path
    recipe = Recipe.read(engine_directory)
    return {"original": HuggingFace(path, 1), "as_built": HuggingFace(path, 1, recipe)}


@pytest.fixture(scope="module")
def file(live, tmp_path_factory) -> Path:
    recordings = {role: Recording(reference) for role, reference in live.items()}
    for recording in recordings.values():
        for sequence in SEQUENCES:
            for _ in recording.logits(sequence):
                pass
    recordings["original"].continuation(SEQUENCES[2], 6, {7, 9})
    originals = list(recordings["original"].logits(SEQUENCES[0]))
    recordings["as_built"].rounded(SEQUENCES[0], originals)
    assert len(list(recordings["as_built"].logits(SEQUENCES[0], 8))) == 1
    path = tmp_path_factory.mktemp("saved") / "reference.npz"
    answers = [recordings[role].answers for role in ("original", "as_built")]
    save_reference(path, SavedReference(IDENTITY, *answers, {"doc": tuple(SEQUENCES[2])}, FACTS, COST))
    assert [item.name for item in path.parent.iterdir()] == ["reference.npz"]
    return path


@pytest.mark.parametrize("role", ["original", "as_built"])
def test_the_saved_answers_judge_as_the_live_ones(role, live, file, engine_directory):
    saved, engine = getattr(load_reference(file, IDENTITY), role), Engine.load(engine_directory, threads=1)
    for sequence in SEQUENCES:
        expected, found = positions(live[role], engine, sequence), positions(saved, engine, sequence)
        # half of this vocabulary is kept as it is, the rest sampled: see TopLogits
        assert found.kl.mean() == pytest.approx(expected.kl.mean(), rel=0.05)
        assert np.array_equal(found.top1, expected.top1)
        np.testing.assert_allclose(found.reference_log_likelihood, expected.reference_log_likelihood, atol=1e-6)
        np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, atol=1e-6)


def test_everything_else_comes_back(live, file):
    saved = load_reference(file, IDENTITY)
    continuation = live["original"].continuation(SEQUENCES[2], 6, {7, 9})
    assert saved.original.continuation(SEQUENCES[2], 6, {7, 9}) == continuation
    assert saved.identity == IDENTITY
    assert saved.prompts == {"doc": tuple(SEQUENCES[2])}
    assert saved.text_facts == FACTS
    assert saved.cost == COST


def test_what_rounding_costs_and_long_sequences_come_back(live, file):
    saved = load_reference(file, IDENTITY)
    originals = list(saved.original.logits(SEQUENCES[0]))
    rounded = saved.as_built.rounded(SEQUENCES[0], [])
    assert rounded == live["as_built"].rounded(SEQUENCES[0], originals)
    assert 0 < rounded.rounding_kl < rounded.original_kl  # int8 weights besides
    (some,) = saved.as_built.logits(SEQUENCES[0], 8)
    every = np.concatenate([chunk.top_ids for chunk in saved.as_built.logits(SEQUENCES[0])])
    assert np.array_equal(some.top_ids[:, 0], every[4::8, 0])  # 261 positions, the last among them
    with pytest.raises(RequestError, match="the saved reference has no text of these 9 tokens"):
        saved.as_built.rounded(SEQUENCES[2], [])


def test_chunks_are_those_of_the_live_reference(file):
    saved = load_reference(file, IDENTITY).original
    assert [len(chunk) for chunk in saved.logits(SEQUENCES[0])] == [CHUNK_TOKENS, CHUNK_TOKENS, 5]
    assert [len(chunk) for chunk in saved.logits(SEQUENCES[1])] == [CHUNK_TOKENS]


def test_a_recording_does_not_ask_again(live):
    class Counting:
        asked = 0

        def logits(self, token_ids, every=1):
            Counting.asked += 1
            return live["original"].logits(token_ids, every)

        def continuation(self, *arguments):
            Counting.asked += 1
            return live["original"].continuation(*arguments)

    recording = Recording(Counting())
    first = [len(chunk) for chunk in recording.logits(SEQUENCES[0])]
    assert [len(chunk) for chunk in recording.logits(SEQUENCES[0])] == first
    assert recording.continuation(SEQUENCES[2], 6, set()) == recording.continuation(SEQUENCES[2], 6, set())
    assert Counting.asked == 2


def test_an_abandoned_sequence_is_not_kept(live):
    recording = Recording(live["original"])
    next(recording.logits(SEQUENCES[0]))
    assert recording.answers.sequences == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": {"model.safetensors": "x", "tokenizer.json": "bb"}}, "another checkpoint (model.safetensors"),
        ({"checkpoint": {"tokenizer.json": "bb"}}, "another checkpoint (model.safetensors"),
        ({"dataset": "xx"}, "other texts"),
        ({"recipe": "xx"}, "an engine of another quantisation"),
        ({"options": {"max_new_tokens": 8}}, "other options (max_new_tokens 6, expected 8)"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused(change, message, file):
    with pytest.raises(RequestError, match=re.escape(f"reference.npz was saved for {message}")):
        load_reference(file, replace(IDENTITY, **change))


def test_ids_that_were_not_asked_are_refused(file):
    saved = load_reference(file, IDENTITY)
    for ask in (saved.original.logits, lambda ids: saved.as_built.continuation(ids, 6, set())):
        with pytest.raises(RequestError, match="no text of these 8 tokens"):
            ask(SEQUENCES[2][:8])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip", b"\x93NUMPY\x01\x00"])
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="is not a saved reference") as refusal:
        load_reference(path, IDENTITY)
    assert "\n" not in str(refusal.value)


def test_a_truncated_or_changed_file_is_refused(file, tmp_path):
    content = file.read_bytes()
    middle = len(content) // 2
    for damaged in (content[:middle], content[:middle] + b"\xff\x00\xff" + content[middle + 3 :]):
        path = tmp_path / "x.npz"
        path.write_bytes(damaged)
        with pytest.raises(RequestError, match="is not a saved reference"):
            load_reference(path, IDENTITY)


def test_another_version_is_refused(tmp_path):
    header = np.frombuffer(json.dumps({"format_version": 99}).encode(), np.uint8)
    np.savez(tmp_path / "x.npz", header=header)
    with pytest.raises(RequestError, match="format version 99, this runtime reads 3"):
        load_reference(tmp_path / "x.npz", IDENTITY)


def test_a_missing_file_and_an_unwritable_place_are_refused(tmp_path):
    with pytest.raises(RequestError, match="does not exist; make it with --save-reference"):
        load_reference(tmp_path / "x.npz", IDENTITY)
    saved = SavedReference(IDENTITY, Answers(), Answers(), {}, FACTS)
    with pytest.raises(RequestError, match="cannot be written"):
        save_reference(tmp_path / "none" / "x.npz", saved)


def test_an_engine_is_judged_where_nothing_but_the_runtime_is(live, file, engine_directory, tmp_path):
    script = """
import sys
for name in ("torch", "transformers", "qwen_build", "onnx", "safetensors"):
    sys.modules[name] = None
import json
from pathlib import Path
from cases.tiny import run_alone
from cases.saved_reference import IDENTITY, SEQUENCES, positions
from qwen_run.runtime.engine import Engine
from qwen_run.accuracy.saved_reference import load_reference
saved = load_reference(Path(sys.argv[1]), IDENTITY)
engine = Engine.load(Path(sys.argv[2]), threads=1)
print(json.dumps([positions(role, engine, SEQUENCES[0]).kl.mean() for role in (saved.original, saved.as_built)]))
"""
    done = run_python(script, file, engine_directory)
    assert done.returncode == 0, done.stderr
    engine, saved = Engine.load(engine_directory, threads=1), load_reference(file, IDENTITY)
    expected = [positions(role, engine, SEQUENCES[0]).kl.mean() for role in (saved.original, saved.as_built)]
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize(
    ("making", "remedy"),
    [
        (
            "next(iter([reference for reference, _ in [sources.open('original').__enter__()]]))()",
            "use --reference FILE",
        ),
        ("_transformers(engine, options, 1, 1)", "leave out --compare hf"),
    ],
    ids=["qwen-summarize", "qwen-bench"],
)
def test_without_torch_each_command_says_what_it_can_do(making, remedy):
    script = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
sys.modules["torch"] = None
from qwen_engine.errors import RequestError
from qwen_run.accuracy.reference_sources import LiveSources
from qwen_run.bench import measure
from qwen_run.bench.measure import _transformers
origin = SimpleNamespace(sha256={{}}, digests={{}}, rope_scaling=None, adapters=())
manifest = SimpleNamespace(origin=origin, linears=[])
engine, options = SimpleNamespace(manifest=manifest), SimpleNamespace(hf_dtype="float32", checkpoint=".")
measure.find_checkpoint = lambda *_: Path(".")
measure.HuggingFaceSide.__init__.__globals__["dense_reads"] = lambda *_: None
sources = LiveSources(manifest, Path("."), Path("."), 1, False)
try:
    {making}
except RequestError as error:
    print(error)
"""
    done = run_python(script)
    assert f"run pip install 'torch>=2.4' 'transformers>=5.0', or {remedy}" in done.stdout, done.stderr
