"""An engine in stages answers as the same engine in one process: every bit, whatever is asked."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases.processes import is_running, run_async, wait_until_gone
from qwen_engine.errors import EngineError
from qwen_engine.manifest import WEIGHTS_FILE
from qwen_run import LLM, AsyncLLM, SamplingParams
from qwen_run.pipeline.local import LocalStages
from qwen_run.pipeline.staged_engine import StagedEngine, open_engine
from qwen_run.runtime.engine import Batch, Engine

Ask = Callable[..., Any]


@contextmanager
def staged(engine: Path, num_stages: int, **options: Any) -> Iterator[StagedEngine]:
    opened = open_engine(engine, 1, pipeline_parallel_size=num_stages, **options)
    assert isinstance(opened, StagedEngine)
    try:
        yield opened
    finally:
        opened.close()


def pids_of(engine: StagedEngine) -> list[int]:
    assert isinstance(engine.executor, LocalStages)
    return engine.executor.pids


@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_answers_are_those_of_one_process(each_engine: Path, ask: Ask, num_stages: int) -> None:
    """Greedy, seeds, samples, beams, log probabilities, penalties; drafts, shared prefixes, preemption, chunks."""
    options: dict[str, Any] = {"keep_logits": True, "max_batch_size": 8}
    expected = ask(LLM(Engine.load(each_engine, threads=1, num_blocks=200), **options))
    num_preempted = 0
    with staged(each_engine, num_stages, num_blocks=40) as engine:
        for changed in ({"max_batch_tokens": 48}, {"max_drafts": 4}, {"prefix_caching": False, "max_drafts": 0}):
            llm = LLM(engine, **options | changed)
            assert ask(llm) == expected, changed
            assert engine.cache.num_free == 40
            num_preempted += llm.core.statistics.num_preempted
    assert num_preempted > 0


def test_logits_never_travel_and_stages_have_their_layers_alone(engine: Path) -> None:
    with staged(engine, 3, num_blocks=32) as opened:
        facts = opened.executor.connect()
        assert [each["layers"] for each in facts] == [[0, 2], [2, 4]]
        sizes = [each["weight_bytes"] for each in facts]
        assert sum(sizes) < (engine / WEIGHTS_FILE).stat().st_size
        batch = one_token(5)
        opened.submit(batch)
        hidden = opened.executor.receive()
        assert isinstance(hidden, np.ndarray)
        assert hidden.shape == (1, opened.manifest.model.hidden_size)


def one_token(token_id: int, block: int = 0, index: int = 0) -> Batch:
    counts = [np.array(each, np.int32) for each in ([0, 1], [0], [[block]])]
    return Batch(np.array([token_id]), *counts, np.array([index]))


def test_a_refused_batch_is_told_and_those_behind_it_come(engine: Path) -> None:
    """By the first stage or by the last; what happens to blocks in between reaches every stage."""
    whole = Engine.load(engine, threads=1, num_blocks=32)
    with staged(engine, 3, num_blocks=32) as opened:
        for bad in (one_token(5, block=10**6), one_token(5, index=7)):
            for batch in (one_token(3), bad, one_token(4)):
                opened.submit(batch)
            assert np.array_equal(opened.collect()[0], whole.run(one_token(3)))
            with pytest.raises(EngineError, match="cannot run"):
                opened.collect()
            assert np.array_equal(opened.collect()[0], whole.run(one_token(4)))


def test_the_names_of_vllm_and_an_event_loop(engine: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    expected = LLM(engine, threads=1, num_blocks=32).generate(["one", "two"], params)

    async def answers() -> list[Any]:
        options = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
        async with AsyncLLM(engine, threads=1, num_blocks=32, **options) as llm:

            async def answer(prompt: str) -> Any:
                async for output in llm.generate(prompt, params):
                    last = output
                return last

            return list(await asyncio.gather(answer("one"), answer("two")))

    found = run_async(answers())
    assert [each.outputs[0].text for each in found] == [each.outputs[0].text for each in expected]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"pipeline_parallel_size": 7}, "7 stages are asked for, expected 1 to 6, as many as the engine has"),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size is 0, expected a whole number, 1 or more"),
        ({"distributed_executor_backend": "gpu"}, "distributed_executor_backend is 'gpu', expected one of local, "),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(engine: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EngineError, match=complaint):
        LLM(engine, **options)


def test_one_stage_is_an_engine_in_one_process(engine: Path) -> None:
    assert isinstance(LLM(engine, pipeline_parallel_size=1, num_blocks=32).core.engine, Engine)


def test_an_engine_that_nobody_holds_ends_its_stages(engine: Path) -> None:
    llm = LLM(engine, threads=1, num_blocks=32, pipeline_parallel_size=2)
    assert isinstance(llm.core.engine, StagedEngine)
    pids = pids_of(llm.core.engine)
    assert all(map(is_running, pids))
    del llm
    gc.collect()
    wait_until_gone(*pids)


def test_a_stage_that_cannot_be_loaded_says_why(engine: Path, tmp_path: Path) -> None:
    """By its number and layers; the process is gone then."""
    damaged = Path(shutil.copytree(engine, tmp_path / "engine"))
    with (damaged / WEIGHTS_FILE).open("r+b") as file:
        file.seek((engine / WEIGHTS_FILE).stat().st_size // 4)
        file.write(os.urandom(64))
    with pytest.raises(EngineError, match=r"^stage 0 \(layers 0 to 1\): .*weights\.bin is not as it was built where"):
        open_engine(damaged, 1, num_blocks=32, pipeline_parallel_size=3)


def test_an_engine_that_is_closed_says_so(engine: Path) -> None:
    with staged(engine, 2, num_blocks=32) as opened:
        pass
    opened.close()
    with pytest.raises(EngineError, match="the engine's stages have been ended; load it again"):
        opened.recover()
