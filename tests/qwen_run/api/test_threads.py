"""One LLM called by many threads at once: answers are those of each prompt alone, and threads share batches."""

import gc
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from cases.scripted import Script, scripted_model, write_text_files
from qwen_engine.errors import EngineError, RequestError
from qwen_run import LLM, SamplingParams
from qwen_run.api.turns import Turns

GREEDY = SamplingParams(temperature=0)
LONG = "x" * 60


@pytest.fixture
def model(tmp_path):
    return scripted_model(write_text_files(tmp_path), str.upper, max_seq_len=400)[0]


@pytest.fixture
def restless():
    """Threads change as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def text_of(results):
    (result,) = results
    assert result.finished
    return result.outputs[0].text


def alphabet(number):
    return "".join(chr(ord("a") + (number * 7 + i) % 26) for i in range(1 + number % 11))


def use(llm, number):
    """One of the ways in which a program asks for an answer; whether the answer is right."""
    prompt, way = alphabet(number), number % 5
    if way == 0:
        return text_of(llm.generate(prompt, GREEDY, use_tqdm=False)) == prompt.upper()
    if way == 1:
        texts = [output.outputs[0].text for output in llm.stream(prompt, GREEDY)]
        return texts[-1] == prompt.upper() and all(texts[-1].startswith(text) for text in texts)
    if way == 2:
        results = llm.generate([prompt, prompt + "!"], GREEDY, use_tqdm=False)
        return [result.outputs[0].text for result in results] == [prompt.upper(), prompt.upper() + "!"]
    if way == 3:
        stream = llm.stream(LONG, GREEDY)
        started = next(stream).outputs[0].text
        stream.close()
        return LONG.upper().startswith(started)
    with pytest.raises(RequestError, match="the engine takes 399"):
        llm.generate("y" * 500, GREEDY, use_tqdm=False)
    return True


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("num_threads", [2, 8, 48])
def test_every_thread_gets_its_own_answers(model, num_threads):
    llm = LLM(model)
    with ThreadPoolExecutor(num_threads) as pool:
        assert list(pool.map(lambda number: use(llm, number), range(240))) == [True] * 240
    assert (model.engine.is_idle, llm.core.is_done, llm.core.statistics.num_running) == (True, True, 0)
    assert text_of(llm.generate("abc", GREEDY, use_tqdm=False)) == "ABC"


def test_threads_share_batches(model, monkeypatch):
    original, widths = Script.run, []

    def run(self, batch):
        widths.append(len(batch.past_lengths))
        time.sleep(0.002)
        return original(self, batch)

    monkeypatch.setattr(Script, "run", run)
    llm, together = LLM(model, max_drafts=0), threading.Barrier(8)

    def ask(number):
        together.wait(60)
        return text_of(llm.generate(LONG[number:], GREEDY, use_tqdm=False))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [LONG[number:].upper() for number in range(8)]
    assert max(widths) == 8
    assert len(widths) < 2 * len(LONG)  # one after the other it would be eight times as many


def test_a_long_answer_keeps_no_other_thread_waiting(model, monkeypatch):
    """The short answer is there long before the long one, whoever takes the steps."""
    original, ended = Script.run, []

    def run(self, batch):
        time.sleep(0.001)
        return original(self, batch)

    monkeypatch.setattr(Script, "run", run)
    llm = LLM(model, max_drafts=0)

    def long():
        stream = llm.stream(LONG * 3, GREEDY)
        next(stream)
        begun.set()
        for _ in stream:
            pass
        ended.append("long")

    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(long)
        assert begun.wait(60)
        assert text_of(llm.generate("ab", GREEDY, use_tqdm=False)) == "AB"
        ended.append("short")
        future.result(60)
    assert ended == ["short", "long"]


def test_an_engine_that_fails_tells_every_thread(model, monkeypatch):
    original = Script.run

    def run(self, batch):
        time.sleep(0.002)
        if self.num_runs >= 20:
            raise EngineError("broken")
        return original(self, batch)

    monkeypatch.setattr(Script, "run", run)
    llm, together = LLM(model, max_drafts=0), threading.Barrier(4)

    def ask(_):
        together.wait(60)
        with pytest.raises(EngineError, match="broken"):
            llm.generate(LONG, GREEDY, use_tqdm=False)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [True] * 4
    assert (model.engine.is_idle, llm.core.is_done) == (True, True)
    monkeypatch.setattr(Script, "run", original)
    assert text_of(llm.generate("abc", GREEDY, use_tqdm=False)) == "ABC"


def test_a_stream_collected_in_the_midst_of_a_step_is_given_up_after_it(model, monkeypatch):
    """Python may collect what nobody reads wherever it likes, and closes it there."""
    original = Script.run
    llm = LLM(model)
    dropped = llm.stream(LONG, GREEDY)
    next(dropped)
    streams = [dropped]
    del dropped

    def run(self, batch):
        found = original(self, batch)
        streams.clear()  # its last reference: it is closed here
        gc.collect()
        return found

    monkeypatch.setattr(Script, "run", run)
    assert text_of(llm.generate("abc", GREEDY, use_tqdm=False)) == "ABC"
    assert (model.engine.is_idle, llm.core.is_done) == (True, True)


def test_a_step_cannot_be_taken_from_within_a_step(model, monkeypatch):
    llm, original = LLM(model), Script.run

    def run(self, batch):
        with pytest.raises(EngineError, match="at work in this thread already"):
            llm.generate("b", replace(GREEDY, max_tokens=1), use_tqdm=False)
        return original(self, batch)

    monkeypatch.setattr(Script, "run", run)
    assert text_of(llm.generate("abc", GREEDY, use_tqdm=False)) == "ABC"


def test_turns_are_given_in_the_order_in_which_they_were_asked_for():
    turns, order = Turns(), []

    def take(number):
        with turns.turn():
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    with turns.turn():
        for number, thread in enumerate(threads):
            thread.start()
            while len(turns._waiting) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join(60)
    assert order == list(range(6))


@pytest.mark.usefixtures("restless")
def test_turns_are_for_one_at_a_time_and_nobody_is_forgotten():
    turns, inside, most = Turns(), [], []

    def take(seed):
        rng = random.Random(seed)
        for _ in range(200):
            with turns.turn_if_free() if rng.random() < 0.3 else turns.turn() as is_mine:
                if is_mine is not False:
                    inside.append(seed)
                    most.append(len(inside))
                    inside.remove(seed)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(take, range(16)))
    assert max(most) == 1
    with turns.turn_if_free() as is_mine:
        assert is_mine


def test_a_thread_interrupted_while_it_waits_gives_its_turn_up(monkeypatch):
    turns = Turns()
    monkeypatch.setattr(turns, "_take", lambda me: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), turns.turn():
        pass
    monkeypatch.undo()
    with turns.turn_if_free() as is_mine:
        assert is_mine
