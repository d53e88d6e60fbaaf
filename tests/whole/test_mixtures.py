"""A tiny model, with the kernels it is served with: nothing that happens around a request changes what it is told."""

from __future__ import annotations

import random

import pytest

from cases.traffic import MAX_SEQ_LEN, assert_mixtures_answer_as_alone

SCHEDULES = 200

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen2", {"quant": "int4"}), ("qwen3-tied", {"quant": "int8", "kv_cache_dtype": "int8"})],
    ids=["qwen2 int4", "qwen3 int8"],
)
def test_any_mixture_answers_as_each_request_alone(family, options, tiny_checkpoint, build_engine):
    path = tiny_checkpoint(family).path
    directory = build_engine(path, max_seq_len=MAX_SEQ_LEN, block_size=32, **options)
    text = random.Random(0).choices(range(131), k=1000)
    happened = assert_mixtures_answer_as_alone(directory, range(SCHEDULES), text)
    assert len(happened) == 7, happened
