"""AsyncLLM: many tasks of an event loop, each with its own answer or its own error."""

import asyncio
import threading
import time
from contextlib import aclosing
from dataclasses import replace

import pytest

from cases.processes import PATIENCE_S, run_async
from cases.scripted import Script, poison
from qwen_engine.errors import EngineError, RequestError
from qwen_run import AsyncLLM, SamplingParams

GREEDY = SamplingParams(temperature=0)
LONG = "x" * 60


def test_one_poisonous_request_does_not_end_an_async_engine(model):
    poison(model.engine, "Paris")

    async def ask(llm, prompt):
        return [output async for output in llm.generate(prompt, GREEDY)][-1].outputs[0]

    async def main():
        async with AsyncLLM(model) as llm:
            answers = await asyncio.gather(*(ask(llm, prompt) for prompt in (LONG, "I love Paris", "abc")))
            return [*answers, await ask(llm, "later")]

    answers = run_async(main())
    assert [answer.finish_reason for answer in answers] == ["stop", "error", "stop", "stop"]
    assert [answer.text for answer in answers] == [LONG.upper(), "", "ABC", "LATER"]


# -- AsyncLLM


@pytest.fixture
def slow(monkeypatch):
    """Let a run take time, so that a long answer is still on its way when something happens to it."""
    original = Script.run

    def run(self, batch):
        time.sleep(0.01)
        return original(self, batch)

    monkeypatch.setattr(Script, "run", run)


def run_with(main, model, **options):
    async def with_llm():
        async with AsyncLLM(model, **options) as llm:
            await main(llm)
        assert model.engine.is_idle
        assert not llm._worker.thread.is_alive()
        assert llm._worker.is_idle

    run_async(with_llm())


async def last(outputs):
    async for output in outputs:
        final = output
    return final


def test_many_tasks_at_once(model):
    async def main(llm):
        prompts = ["a" * n for n in range(1, 40)]
        results = await asyncio.gather(*(last(llm.generate(prompt, GREEDY)) for prompt in prompts))
        assert [result.outputs[0].text for result in results] == [prompt.upper() for prompt in prompts]
        assert all(result.finished for result in results)

    run_with(main, model)


def test_a_stream_shows_progress_and_a_slow_reader_skips(model):
    async def main(llm):
        lengths = [len(output.outputs[0].token_ids) async for output in llm.generate(LONG, GREEDY)]
        assert lengths == sorted(set(lengths))
        assert lengths[-1] == 61
        stream = await llm.add_request(LONG, GREEDY)
        while not llm._llm.core.is_done or not stream.pending.is_told:
            await asyncio.sleep(0.01)
        assert [output.finished async for output in stream] == [True]

    run_with(main, model)


@pytest.mark.usefixtures("slow")
def test_a_cancelled_reader_gives_its_request_up(model):
    async def main(llm):
        reader = asyncio.create_task(last(llm.generate(LONG, GREEDY)))
        while model.engine.is_idle:
            await asyncio.sleep(0.001)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        stream = await llm.add_request(LONG, GREEDY)
        reader = asyncio.create_task(last(stream))
        await asyncio.sleep(0.01)
        reader.cancel()
        while not model.engine.is_idle:
            await asyncio.sleep(0.001)
        async with aclosing(llm.generate(LONG, GREEDY)) as outputs:
            async for _ in outputs:
                break
        while not model.engine.is_idle:
            await asyncio.sleep(0.001)
        assert max(len(request.sequences[0].output) for request in model.engine.seen) < 61
        assert (await last(llm.generate("ab", GREEDY))).outputs[0].text == "AB"

    run_with(main, model)


@pytest.mark.usefixtures("slow")
def test_abort_ends_the_stream_with_what_there_is(model):
    async def main(llm):
        stream = await llm.add_request(LONG, GREEDY, "mine")
        with pytest.raises(RequestError, match="request 'mine' is not finished"):
            await llm.add_request("a", GREEDY, "mine")
        await anext(stream)
        await llm.abort("mine")
        await llm.abort("nobody")
        final = await last(stream)
        assert (final.finished, final.outputs[0].finish_reason) == (True, "abort")
        assert final.outputs[0].text == "X" * len(final.outputs[0].token_ids)
        assert (await last(await llm.add_request("ab", GREEDY, "mine"))).outputs[0].text == "AB"

    run_with(main, model)


@pytest.mark.usefixtures("slow")
def test_requests_wait_for_a_place(model):
    async def main(llm):
        first, second = await llm.add_request(LONG, GREEDY), await llm.add_request("ab", GREEDY)
        third = asyncio.create_task(llm.add_request("c", GREEDY))
        await last(second)
        await last(await third)
        assert len(model.engine.seen) == 3
        await last(first)

    async def crowded(llm):
        streams = [await llm.add_request(LONG, GREEDY) for _ in range(2)]
        waiting = asyncio.create_task(llm.add_request("c", GREEDY))
        await asyncio.sleep(0)
        assert not waiting.done()
        for stream in streams:
            stream.close()
        await last(await waiting)

    run_with(main, model, max_requests=2)
    run_with(crowded, model, max_requests=2)


@pytest.mark.usefixtures("slow")
def test_refusals_reach_the_caller_alone(model):
    async def main(llm):
        other = asyncio.create_task(last(llm.generate(LONG, GREEDY)))
        with pytest.raises(RequestError, match="the prompt has"):
            await llm.add_request("x" * 500, GREEDY)
        with pytest.raises(RequestError, match="num_beams is 20"):
            await last(llm.generate("x", replace(GREEDY, num_beams=20)))
        assert (await other).outputs[0].text == LONG.upper()

    run_with(main, model, max_requests=2)


def test_a_failure_reaches_every_reader_and_who_comes_later(model, monkeypatch):
    original = Script.run

    def run(self, batch):
        if self.num_runs == 5:
            raise EngineError("broken")
        return original(self, batch)

    monkeypatch.setattr(Script, "run", run)

    async def main(llm):
        readers = [last(llm.generate(prompt, GREEDY)) for prompt in (LONG, LONG, LONG)]
        for found in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(found, EngineError)
            assert "the engine has stopped: broken" in str(found)
        with pytest.raises(EngineError, match="the engine has stopped: broken"):
            await llm.add_request("a", GREEDY)

    run_with(main, model)


@pytest.mark.usefixtures("slow")
def test_a_request_without_a_name_gets_one_that_is_free(model):
    async def main():
        async with AsyncLLM(model) as llm:
            named = await llm.add_request(LONG, GREEDY, request_id="0")
            return named.request_id, (await llm.add_request("a", GREEDY)).request_id

    assert run_async(main()) == ("0", "1")


@pytest.mark.usefixtures("slow")
def test_closing_ends_what_is_unfinished(model):
    async def main():
        llm = AsyncLLM(model)
        stream = await llm.add_request(LONG, GREEDY)
        await anext(stream)
        await llm.close()
        assert (await asyncio.wait_for(last(stream), PATIENCE_S)).outputs[0].finish_reason == "abort"
        with pytest.raises(EngineError, match="the engine is closed"):
            await llm.add_request("a", GREEDY)

    run_async(main())
    assert model.engine.is_idle
    assert not [thread for thread in threading.enumerate() if thread.name == "qwen-engine"]
