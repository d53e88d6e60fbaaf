"""Layers that see the last tokens alone answer as transformers does, however a text is fed."""

from __future__ import annotations

import numpy as np
import pytest

from cases.tiny import WINDOWED, run_alone, run_chunks
from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.request import Request
from qwen_run.sampling.params import SamplingParams

RNG = np.random.default_rng(11)
SEQUENCES = [RNG.integers(0, 131, length).tolist() for length in (300, 41, 33)]
every_windowed = pytest.mark.parametrize("family", WINDOWED)


@every_windowed
def test_logits_are_those_of_transformers_beyond_the_window(family, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint(family)
    engine = Engine.load(build_engine(checkpoint.path, quant="none"), threads=1)
    for sequence in SEQUENCES:
        # float32 sums in another order: 1e-4 of logits that reach 10 and more
        np.testing.assert_allclose(run_alone(engine, sequence), checkpoint.logits(sequence), rtol=1e-4, atol=1e-4)


@every_windowed
@pytest.mark.parametrize("kv_cache_dtype", ["float16", "int8"])
def test_any_schedule_gives_the_same_bits(family, kv_cache_dtype, tiny_checkpoint, build_engine):
    engine = Engine.load(build_engine(tiny_checkpoint(family).path, kv_cache_dtype=kv_cache_dtype), threads=2)
    alone = [run_alone(engine, sequence) for sequence in SEQUENCES]
    schedules = [
        [[300, 41, 33]],
        [[39, 0, 0], [1, 40, 32], [1, 1, 1], [127, 0, 0], *([[1, 0, 0]] * 12), [120, 0, 0]],
    ]
    for schedule in schedules:
        for expected, found in zip(alone, run_chunks(engine, SEQUENCES, schedule), strict=True):
            assert np.array_equal(found, expected)


@every_windowed
@pytest.mark.parametrize("options", [{}, {"max_drafts": 4}, {"max_batch_tokens": 32}], ids=str)
def test_requests_that_share_a_beginning_answer_alike_with_every_option(family, options, tiny_checkpoint, build_engine):
    """The cache of prefixes, guessed tokens and small steps change no token."""
    directory = build_engine(tiny_checkpoint(family).path)
    params = SamplingParams(temperature=0, max_tokens=24)
    prompts = [(*SEQUENCES[0][:140], last) for last in (1, 2)]

    def answers(one_by_one: bool, **options) -> list[list[int]]:
        core = Core(Engine.load(directory, threads=1), CoreOptions(**options))
        requests = [Request(prompt, params) for prompt in prompts]
        for request in requests:
            core.add(request)
            while one_by_one and not core.is_done:
                core.step()
        while not core.is_done:
            core.step()
        assert not one_by_one or core.statistics.num_prefix_tokens == 2 * 64
        return [request.sequences[0].output for request in requests]

    assert answers(one_by_one=True, **options) == answers(one_by_one=False)
