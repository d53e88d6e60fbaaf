"""Exit while threads run a model: the process ends quietly, whatever a daemon thread is doing."""

import os
import threading
import time

import pytest

from cases.processes import run_python
from qwen_run.runtime.native_calls import NativeCalls

DAEMON = """if True:
    import sys, threading, time
    from qwen_run import LLM, SamplingParams

    llm = LLM(sys.argv[1], threads=1)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    def work(number):
        while True:
            llm.generate([[1 + number] * 60] * 4, params, use_tqdm=False)
            answered.set()

    answered = threading.Event()
    for number in range(3):
        threading.Thread(target=work, args=(number,), daemon=True).start()
    assert answered.wait(60)
    time.sleep(float(sys.argv[2]))
    print("done")
"""


@pytest.fixture(scope="module")
def directory(tiny_checkpoint, build_engine):
    return build_engine(tiny_checkpoint("qwen3-tied").path, quant="none")


@pytest.mark.parametrize("pause_s", [0, 0.003, 0.011, 0.017])
def test_a_daemon_thread_does_not_end_the_process(directory, pause_s):
    done = run_python(DAEMON, directory, pause_s)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


ASYNC = """if True:
    import asyncio, sys
    from qwen_run import AsyncLLM, SamplingParams

    async def main():
        llm = AsyncLLM(sys.argv[1], threads=1)  # and nobody closes it
        params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
        stream = await llm.add_request([1, 2, 3], params)
        await anext(stream)
        kept.append((llm, stream))

    kept = []
    asyncio.run(main())
    print("done")
"""


def test_an_async_llm_that_nobody_closes_does_not_keep_the_process(directory):
    done = run_python(ASYNC, directory)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_the_end_waits_for_calls_and_lets_none_begin():
    calls, order = NativeCalls(), []
    inside, leave = threading.Event(), threading.Event()

    def first():
        with calls.call():
            inside.set()
            leave.wait(60)
            order.append("first")

    def second():
        ended.wait(60)
        with calls.call():
            order.append("second")

    ended = threading.Event()
    threads = [threading.Thread(target=target, daemon=True) for target in (first, second)]
    for thread in threads:
        thread.start()
    assert inside.wait(60)
    threading.Timer(0.05, leave.set).start()
    calls.end()
    order.append("ended")
    ended.set()
    with calls.call():  # who ends the interpreter may still call, from other exit handlers
        order.append("mine")
    time.sleep(0.05)
    assert order == ["first", "ended", "mine"]
    assert threads[1].is_alive()
    calls.forget()


def test_a_forked_child_waits_for_no_thread_of_its_parent():
    calls = NativeCalls()
    os.register_at_fork(after_in_child=calls.forget)
    with calls.call():
        pid = os.fork()
        if pid == 0:
            calls.end()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
