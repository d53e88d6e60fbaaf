"""What a server needs of the runtime: salts, drafts that are counted, parts of long answers, an end in order."""

import asyncio
import time

import pytest

from cases.processes import run_async
from cases.scripted import Script, scripted_model, write_text_files
from qwen_engine.errors import EngineError, RequestError
from qwen_run import LLM, AsyncLLM, RequestOutputKind, SamplingParams

GREEDY = SamplingParams(temperature=0)
LONG = "abcdefgh" * 20


@pytest.fixture
def model(tmp_path):
    return scripted_model(write_text_files(tmp_path), str.upper, max_seq_len=400)[0]


def test_a_salt_keeps_the_cache_apart(model):
    llm = LLM(model)

    def cached(salt):
        params = SamplingParams(temperature=0, cache_salt=salt, max_tokens=1)
        return llm.generate(LONG, params, use_tqdm=False)[0].num_cached_tokens

    found = [cached(salt) for salt in (None, None, "a", "a", "b", None)]
    full = (len(LONG) - 1) // Script.BLOCK_SIZE * Script.BLOCK_SIZE
    assert found == [0, full, 0, full, 0, full]


@pytest.mark.parametrize("salt", ["", "\ud800", 5])
def test_a_salt_is_a_text(salt):
    with pytest.raises(RequestError, match=r"cache_salt is .*, expected None or a text of 1 to 1024 characters"):
        SamplingParams(cache_salt=salt)


def test_drafts_are_counted(model):
    guessed, none = (LLM(model, max_drafts=n).generate("abab" * 30, GREEDY, use_tqdm=False)[0] for n in (8, 0))
    assert guessed == none
    assert 0 < guessed.num_accepted_tokens <= guessed.num_draft_tokens
    assert (none.num_accepted_tokens, none.num_draft_tokens) == (0, 0)


@pytest.mark.parametrize("max_tokens", [None, 2**31 - 1])
def test_an_answer_may_take_what_is_left(model, max_tokens):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    (result,) = LLM(model).generate("abc", params, use_tqdm=False)
    assert len(result.prompt_token_ids) + len(result.outputs[0].token_ids) == 400
    assert result.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("stop", [None, "XY"])
def test_parts_join_to_the_whole(model, stop):
    shared = {"temperature": 0, "logprobs": 2, "n": 2, "stop": stop}
    parts = list(LLM(model).stream("abc" * 20 + "xyz", SamplingParams(**shared, output_kind=RequestOutputKind.DELTA)))
    (whole,) = LLM(model).generate("abc" * 20 + "xyz", SamplingParams(**shared), use_tqdm=False)
    for index in range(2):
        mine = [part.outputs[index] for part in parts]
        assert "".join(part.text for part in mine) == whole.outputs[index].text
        assert [i for part in mine for i in part.token_ids] == whole.outputs[index].token_ids
        assert [each for part in mine for each in part.logprobs] == whole.outputs[index].logprobs
        assert mine[-1].cumulative_logprob == pytest.approx(whole.outputs[index].cumulative_logprob)


def test_a_part_costs_the_same_however_long_the_answer_is(model, monkeypatch):
    """Nothing of an answer that was told is touched again: neither texts nor log probabilities."""
    params = SamplingParams(temperature=0, logprobs=1, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    sizes = [
        (len(part.outputs[0].token_ids), len(part.outputs[0].logprobs), len(part.outputs[0].text))
        for part in LLM(model, max_drafts=0).stream("abc", SamplingParams(**{**vars(params), "max_tokens": 200}))
    ]
    assert max(sizes) <= (1, 1, 1)


def test_a_drain_waits_for_what_runs_and_takes_no_more(model, monkeypatch):
    original = Script.run
    monkeypatch.setattr(Script, "run", lambda self, batch: (time.sleep(0.005), original(self, batch))[1])

    async def scene():
        llm = AsyncLLM(model)
        stream = await llm.add_request("x" * 60, GREEDY)
        assert not await llm.drain(timeout=0)
        with pytest.raises(EngineError, match="about to close and takes no more requests"):
            await llm.add_request("late", GREEDY)
        reader = asyncio.ensure_future(anext(aiter(_last(stream))))
        assert await llm.drain(timeout=60)
        await llm.close()
        return await reader

    final = run_async(scene())
    assert (final.finished, final.outputs[0].text) == (True, "X" * 60)
    assert model.engine.is_idle


async def _last(stream):
    async for output in stream:
        final = output
    yield final


def test_health_and_statistics(model):
    async def scene():
        llm = AsyncLLM(model)
        await llm.check_health()
        async for _ in llm.generate("abc", GREEDY):
            pass
        statistics = llm.statistics
        await llm.close()
        with pytest.raises(EngineError, match="the engine is closed"):
            await llm.check_health()
        return statistics

    statistics = run_async(scene())
    assert (statistics.num_running, statistics.num_waiting) == (0, 0)
    assert statistics.num_steps > 0


def test_a_conversation_is_continued(model):
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two,"}]
    (result,) = LLM(model).chat(messages, GREEDY, use_tqdm=False, continue_final_message=True)
    assert result.prompt.endswith("assistant\nOne, two,")
