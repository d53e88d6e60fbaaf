"""A sequence that cannot go on ends with an error of its own; all others get the answers they get alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cases.scripted_engine import VOCAB_SIZE, ScriptedEngine
from cases.traffic import answers, assert_nothing_is_owned, make_guesses_cheap
from qwen_engine.errors import EngineError
from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.engine import Batch
from qwen_run.runtime.request import Request, Sequence, message_of
from qwen_run.sampling.params import SamplingParams

POISON = 9
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, logprobs=1)
SAMPLED = SamplingParams(temperature=1.5, max_tokens=6, seed=3, n=3)
BEAMS = SamplingParams(temperature=0.0, max_tokens=4, num_beams=3)


class PoisonedEngine(ScriptedEngine):
    """Like a model whose key of one token overflows: whoever has it in its past gets logits that are not numbers."""

    def run(self, batch: Batch) -> np.ndarray:
        logits = super().run(batch)
        pool = self.cache.pools["tokens"]
        ends = batch.cumulative_lengths
        for row, index in enumerate(batch.logits_indices):
            sequence = int(np.searchsorted(ends, index, side="right")) - 1
            length = batch.past_lengths[sequence] + index - ends[sequence] + 1
            if POISON + 1 in pool[batch.block_table[sequence]].reshape(-1)[:length]:
                logits[row] = np.nan
        return logits


class RefusingEngine(ScriptedEngine):
    """Refuses every run that feeds one token; ``refuses_all`` every run."""

    refuses_all = False

    def run(self, batch: Batch) -> np.ndarray:
        if self.refuses_all or POISON in batch.input_ids:
            raise EngineError("the batch is refused")
        return super().run(batch)


def play(engine: ScriptedEngine, requests: list[Request], **options: int) -> list[Sequence]:
    """Answer ``requests`` together; the sequences that failed."""
    engine.leaves_drafts = "max_drafts" in options
    core = Core(engine, CoreOptions(**options))  # type: ignore[arg-type]
    make_guesses_cheap(core)
    for request in requests:
        core.add(request)
    failed: list[Sequence] = []
    while not core.is_done:
        ended = len(failed)
        core.step(failed)
        assert all(sequence.finish_reason == "error" for sequence in failed[ended:])
    assert_nothing_is_owned(engine)
    return failed


def innocent() -> list[Request]:
    prompts = ((1, 2, 3, 4, 5), (0, 1, 2) * 3, (3,), (1, 2, 3, 4, 6, 7))
    return [Request(p, params) for p, params in zip(prompts, (GREEDY, SAMPLED, BEAMS, GREEDY), strict=True)]


@pytest.mark.parametrize("engine", [PoisonedEngine, RefusingEngine])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, BEAMS, replace(GREEDY, prompt_logprobs=1)])
@pytest.mark.parametrize("max_batch_tokens", [6, 40])
def test_one_poisonous_prompt_ends_alone(
    engine: type[ScriptedEngine], params: SamplingParams, max_batch_tokens: int
) -> None:
    # no innocent answer may come upon the token by itself
    bias = {POISON: -100.0}
    poisonous = Request((1, 2, POISON, 4), params)
    alone = [Request(r.prompt, replace(r.params, logit_bias=bias)) for r in innocent()]
    together = [Request(r.prompt, replace(r.params, logit_bias=bias)) for r in innocent()]
    for request in alone:
        assert play(ScriptedEngine(), [request]) == []
    requests = [*together[:2], poisonous, *together[2:]]
    failed = play(engine(num_blocks=60), requests, max_batch_size=6, max_batch_tokens=max_batch_tokens, max_drafts=2)
    assert {sequence.request for sequence in failed} == {poisonous}
    assert all(sequence.finish_reason == "error" and sequence.output == [] for sequence in poisonous.sequences)
    expected = "position 3 hold nan" if params.prompt_logprobs else "position 4 hold nan"
    expected = expected if engine is PoisonedEngine else "the batch is refused"
    assert all(expected in str(sequence.error) for sequence in poisonous.sequences)
    assert [answers(request) for request in together] == [answers(request) for request in alone]


def test_a_sample_that_comes_upon_the_poison_ends_and_its_siblings_go_on() -> None:
    params = SamplingParams(temperature=2.0, max_tokens=12, seed=1, n=8)
    request = Request((1, 2, 3), params)
    failed = play(PoisonedEngine(num_blocks=60), [request])
    reasons = [sequence.finish_reason for sequence in request.sequences]
    assert set(reasons) == {"error", "length"}
    assert [sequence for sequence in request.sequences if sequence.finish_reason == "error"] == sorted(
        failed, key=lambda sequence: sequence.index
    )
    for sequence in request.sequences:
        assert POISON not in sequence.output[:-1]
        assert sequence.num_output == 12 or (sequence.finish_reason, sequence.output[-1]) == ("error", POISON)


def test_whatever_a_stopper_raises_ends_its_request_only() -> None:
    class Broken:
        def push(self, token_id: int) -> bool:
            raise KeyError(token_id)

    broken, sound = Request((1, 2), GREEDY, new_stopper=Broken), Request((1, 2), GREEDY)
    (sequence,) = play(ScriptedEngine(), [broken, sound])
    assert sequence.request is broken
    assert sequence.error is not None
    assert message_of(sequence.error).startswith("KeyError: ")
    assert sound.sequences[0].finish_reason == "length"


def test_without_a_list_for_failures_the_first_is_raised() -> None:
    core = Core(PoisonedEngine(), CoreOptions())  # type: ignore[arg-type]
    core.add(request := Request((POISON,), GREEDY))
    with pytest.raises(EngineError, match="position 1 hold nan, expected numbers"):
        core.step()
    assert request.sequences[0].finish_reason == "error"
    assert core.is_done


def test_an_engine_that_refuses_everything_is_an_engine_error() -> None:
    engine = RefusingEngine()
    engine.refuses_all = True
    core = Core(engine, CoreOptions())  # type: ignore[arg-type]
    core.add(Request((1, 2), GREEDY))
    with pytest.raises(EngineError, match="the batch is refused"):
        core.step([])
    assert_nothing_is_owned(engine)


def test_a_lone_request_that_is_refused_leaves_an_engine_that_runs() -> None:
    engine = RefusingEngine()
    assert len(play(engine, [Request((1, POISON), GREEDY)])) == 1
    assert play(engine, [Request((1, VOCAB_SIZE - 1), GREEDY)]) == []
