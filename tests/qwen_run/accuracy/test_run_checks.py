"""What an engine is checked for while it runs: other ways to feed a text, its full length, its answers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from qwen_engine.manifest import Manifest
from qwen_run.accuracy.findings import Findings
from qwen_run.accuracy.run_checks import checks
from qwen_run.accuracy.step_checks import (
    COMPARED,
    WAYS,
    Difference,
    at_once,
    compare_ways,
    feed,
    longest,
    promises_bits,
)
from qwen_run.runtime.engine import Engine

TEXTS = [
    np.random.default_rng(seed).integers(0, 131, length).tolist() for seed, length in enumerate((300, 61, 200, 17))
]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint, build_engine) -> Engine:
    return Engine.load(build_engine(tiny_checkpoint("qwen2").path, quant="int8", block_size=32), threads=1)


def test_every_way_gives_the_bits_of_one_run(engine):
    texts = longest(TEXTS, 640)
    assert [len(text) for text in texts] == [300, 200, 61]
    free = engine.cache.num_free
    differences = compare_ways(engine, texts)
    assert {name: found.differing for name, found in differences.items()} == dict.fromkeys(differences, 0)
    assert [found.positions for found in differences.values()] == [3 * COMPARED] * 4 + [COMPARED]
    assert engine.cache.num_free == free


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_a_way_feeds_every_token_once_and_in_order(way, engine, monkeypatch):
    """What it feeds, told by the cache: the logits of another text at the same places are others."""
    texts, batches = longest(TEXTS, 640), []
    run = Engine.run

    def watched(self, batch):
        batches.append(batch)
        return run(self, batch)

    monkeypatch.setattr(Engine, "run", watched)
    found = feed(engine, texts, way)
    expected = [at_once(engine, text) for text in (texts[:1] if way.shared else texts)]
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    steps = [np.diff(batch.cumulative_lengths) for batch in batches[: -len(expected)]]
    widest = max(len(step) for step in steps)
    assert widest == (3 if way.name == "beside others" else 1)
    if way.shared:  # the second time, only what is not in whole blocks
        assert [int(step[0]) for step in steps] == [300, 300 - 256]


def test_texts_are_cut_to_what_the_engine_takes():
    assert [len(text) for text in longest([range(900), range(900), range(12)], 100)] == [97, 60]
    assert longest([range(COMPARED)], 640) == []


@pytest.mark.parametrize(
    ("options", "promised"),
    [({"quant": "int4"}, True), ({"quant": "int8", "exclude": ("lm_head",)}, False), ({"quant": "none"}, False),
     ({"quant": "int8", "kernels": "stock"}, False)],
)  # fmt: skip
def test_bits_are_promised_where_all_is_quantised_with_our_kernels(options, promised, tiny_checkpoint, build_engine):
    assert promises_bits(Manifest.read(build_engine(tiny_checkpoint("qwen2").path, **options))) is promised


def manifest(group_size: int, cache: str) -> SimpleNamespace:
    stored = SimpleNamespace(group_size=group_size, kernels="native" if group_size else "stock")
    return SimpleNamespace(
        linears=[SimpleNamespace(quantization=stored)],
        cache=SimpleNamespace(dtype=cache),
        limits=SimpleNamespace(max_seq_len=640),
    )


FLOAT, INT8 = manifest(0, "float32"), manifest(32, "float16")


def found(of: SimpleNamespace, **parts) -> dict[str, tuple[bool, str]]:
    nothing = {"ways": {}, "window": None, "answers": [], "together": [], "samples": []}
    findings = Findings(original=[], as_built=[], rounded=[], layers=(), routed=(), costs=(), **nothing | parts)
    return {check.name: (check.passed, check.message) for check in checks(findings, of, [])}


@pytest.mark.parametrize(
    ("of", "difference", "passed"),
    [
        (INT8, Difference(48, 0, 0.0, 0.0), True),
        (INT8, Difference(48, 1, 1e-7, 1e-15), False),  # a bit is a bit
        (FLOAT, Difference(48, 48, 1e-5, 1e-11), True),
        (FLOAT, Difference(48, 48, 1e-3, 1e-7), False),
    ],
)
def test_ways_have_to_give_the_bits_or_be_close(of, difference, passed):
    assert found(of, ways={"in pieces": difference})["in pieces"][0] is passed


@pytest.mark.parametrize(
    ("kl", "passed"),
    [([1e-7] * 80, True), ([1e-7] * 79 + [np.nan], False), ([2e-5] * 80, False), ([1e-7] * 72 + [1.1e-4] * 8, False)],
)
def test_the_full_length_is_close_everywhere(kl, passed):
    window = {"tokens": 640, "bounded": "the engine's full length", "kl": kl}
    ok, message = found(INT8, window=window)["full length"]
    assert ok is passed
    assert message.startswith("640 of 640 tokens (the engine's full length): KL ")


def test_answers_are_the_same_alone_together_and_by_the_reference():
    samples = [SimpleNamespace(prompt=SimpleNamespace(continues=True), continuation=(1, 2))]
    same = {"samples": samples, "answers": [[1, 2]], "together": [[1, 2]]}
    assert found(INT8, **same) == {"answers together": (True, "all 1 are those that are given alone")}
    assert found(FLOAT, **same) == {"greedy answers": (True, "all 1 are those that are given by the reference")}
    other = same | {"answers": [[1, 3]]}
    assert found(INT8, **other) == {"answers together": (False, "1 of 1 are not those that are given alone")}
    assert not found(FLOAT, **other)["greedy answers"][0]
