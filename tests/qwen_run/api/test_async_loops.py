"""AsyncLLM beyond one event loop: several of them, loops that end early, and objects that nobody holds any more."""

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cases.processes import run_async
from cases.scripted import ADDED, IM_END, Script, scripted_model, write_text_files
from qwen_engine.errors import EngineError, QwenError
from qwen_run import AsyncLLM, SamplingParams

GREEDY = SamplingParams(temperature=0)
LONG = "x" * 60


@pytest.fixture
def model(tmp_path):
    return scripted_model(write_text_files(tmp_path), str.upper, max_seq_len=400)[0]


@pytest.fixture
def slow(monkeypatch):
    """Let a run take time, so that a long answer is still on its way when something happens to it."""
    original = Script.run

    def run(self, batch):
        time.sleep(0.005)
        return original(self, batch)

    monkeypatch.setattr(Script, "run", run)


async def text_of(outputs):
    async for output in outputs:
        final = output
    assert final.finished
    return final.outputs[0].text


def wait_until(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name == "qwen-engine"]


def test_one_event_loop_after_the_other(model):
    llm = AsyncLLM(model)
    for word in ("one", "two", "three"):
        assert run_async(text_of(llm.generate(word, GREEDY))) == word.upper()
    run_async(llm.close())
    assert model.engine.is_idle


@pytest.mark.parametrize("max_requests", [2, 1024])
def test_many_event_loops_at_once(model, max_requests):
    llm = AsyncLLM(model, max_requests=max_requests)

    async def ask(words):
        return await asyncio.gather(*(text_of(llm.generate(word, GREEDY)) for word in words))

    groups = [[f"{group}-{'z' * index}" for index in range(9)] for group in range(6)]
    with ThreadPoolExecutor(len(groups)) as pool:
        found = list(pool.map(lambda words: run_async(ask(words)), groups))
    assert found == [[word.upper() for word in words] for words in groups]
    run_async(llm.close())
    assert (model.engine.is_idle, engine_threads()) == (True, [])


@pytest.mark.usefixtures("slow")
def test_a_request_is_given_up_with_the_loop_that_asked(model):
    llm = AsyncLLM(model, max_requests=1)

    async def begin():
        return await llm.add_request(LONG, GREEDY)

    kept = run_async(begin())  # its loop is closed, and the stream never read
    assert run_async(text_of(llm.generate("ab", GREEDY))) == "AB"
    assert len(kept.pending.request.sequences[0].output) < len(LONG)
    run_async(llm.close())


@pytest.mark.usefixtures("slow")
def test_who_waits_for_a_place_in_a_loop_that_ends_blocks_nobody(model):
    llm = AsyncLLM(model, max_requests=1)

    async def wait_in_vain():
        stream = await llm.add_request(LONG, GREEDY)
        waiting = asyncio.create_task(llm.add_request("a", GREEDY))
        await asyncio.sleep(0.02)
        stream.close()  # hands the place over, and the loop ends before it is taken
        waiting.cancel()

    run_async(wait_in_vain())
    assert run_async(text_of(llm.generate("ab", GREEDY))) == "AB"
    run_async(llm.close())


def test_one_that_nobody_holds_ends_its_thread(model):
    for _ in range(3):
        llm = AsyncLLM(model)
        assert run_async(text_of(llm.generate("ab", GREEDY))) == "AB"
        del llm
    gc.collect()
    wait_until(lambda: not engine_threads())
    assert model.engine.is_idle


@pytest.mark.usefixtures("slow")
def test_a_stream_outlives_the_last_name_of_its_llm(model):
    async def main():
        stream = await AsyncLLM(model).add_request(LONG, GREEDY)
        gc.collect()
        return await text_of(stream)

    assert run_async(main()) == LONG.upper()
    gc.collect()
    wait_until(lambda: not engine_threads())


def test_a_closed_one_refuses_in_every_loop(model):
    llm = AsyncLLM(model)
    run_async(llm.close())
    for _ in range(2):
        with pytest.raises(EngineError, match="the engine is closed"):
            run_async(text_of(llm.generate("a", GREEDY)))


VOCABULARY = range(IM_END + len(ADDED) + 1)
# what redteaming has found to end everybody's requests
HOSTILE = {
    "beams, and every token stops": {"temperature": 0, "num_beams": 2, "stop_token_ids": VOCABULARY},
    "a least number of tokens, and every token stops": {"min_tokens": 1, "stop_token_ids": VOCABULARY},
    "no token is left": {"allowed_token_ids": [5], "suppress_tokens": [5]},
    "a processor that fails": {"logits_processors": [lambda output, logits: 1 / 0]},
    "an id beyond every vocabulary": {"logit_bias": {2**31 - 1: 1.0}},
    "a bad word beyond the vocabulary": {"bad_words_ids": [[5, 2**31 - 1]]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_ends_alone(model, slow, name):
    async def everyone():
        async with AsyncLLM(model) as llm:
            others = [asyncio.create_task(text_of(llm.generate(f"{LONG}{i}", GREEDY))) for i in range(5)]
            await asyncio.sleep(0.05)
            hostile = llm.generate("abc", SamplingParams(**{"temperature": 0} | HOSTILE[name]))
            (ended,) = await asyncio.gather(last_of(hostile), return_exceptions=True)
            texts = await asyncio.gather(*others)
            return ended, texts, await text_of(llm.generate("next", GREEDY))

    ended, texts, following = run_async(everyone())
    assert isinstance(ended, QwenError) or ended.finished
    assert texts == [f"{LONG.upper()}{i}" for i in range(5)]
    assert following == "NEXT"
    assert model.engine.is_idle


async def last_of(outputs):
    async for output in outputs:
        final = output
    return final
