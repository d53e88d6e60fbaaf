"""Several replicas as one engine: the answers of one, whatever happens to them. Without Ray."""

import asyncio
import threading
from dataclasses import replace

import pytest

from cases.fleet import QUICK, LocalReplicas, answer_of, fleet_of, read
from cases.processes import PATIENCE_S, run_async
from qwen_engine.errors import EngineError, RequestError
from qwen_run import AsyncLLM, RequestOutputKind, SamplingParams
from qwen_run.cluster.handles import NoReplica

OPTIONS = {"threads": 1, "num_blocks": 100, "max_batch_size": 8}
LONG = {"ignore_eos": True, "max_tokens": 60}
KINDS = {
    "greedy": SamplingParams(temperature=0, **LONG),
    "in parts": SamplingParams(temperature=0, output_kind=RequestOutputKind.DELTA, **LONG),
    "at its end": SamplingParams(temperature=0, output_kind=RequestOutputKind.FINAL_ONLY, **LONG),
    "seeded": SamplingParams(temperature=1, seed=5, output_kind=RequestOutputKind.DELTA, **LONG),
    "samples": SamplingParams(temperature=1, seed=6, n=3, output_kind=RequestOutputKind.DELTA, **LONG),
    "log probabilities": SamplingParams(
        temperature=1, seed=7, logprobs=3, output_kind=RequestOutputKind.DELTA, prompt_logprobs=2, **LONG
    ),
    "all so far": SamplingParams(temperature=1, seed=7, logprobs=1, **LONG),
    "beams": SamplingParams(temperature=0, num_beams=3, n=2, max_tokens=40),
    "a stop text": SamplingParams(temperature=1, seed=8, stop=["e"], output_kind=RequestOutputKind.DELTA, **LONG),
}
PROMPTS = {
    name: f"Question about {name}: {'what is it? ' * (3 + 20 * (index % 3))}" for index, name in enumerate(KINDS)
}


async def undisturbed(engine):
    async with AsyncLLM(engine, **OPTIONS) as llm:
        return {name: await read(llm, PROMPTS[name], params) for name, params in KINDS.items()}


async def kill_when(replicas, number, num_tokens):
    while replicas.made[number].num_tokens < num_tokens:
        await asyncio.sleep(0.002)
    replicas.made[number].die()


def test_answers_are_those_of_one_engine(chat_engine):
    async def main():
        expected = await undisturbed(chat_engine)
        async with fleet_of(LocalReplicas(chat_engine, **OPTIONS), 2) as llm:
            found = await asyncio.gather(*(read(llm, PROMPTS[name], params) for name, params in KINDS.items()))
            assert llm.statistics.num_moved == 0
        assert {name: answer_of(one) for name, one in zip(KINDS, found, strict=True)} == {
            name: answer_of(one) for name, one in expected.items()
        }

    run_async(main())


@pytest.mark.parametrize("when", [1, 40, 150])
def test_no_reader_sees_that_a_replica_dies(chat_engine, when):
    async def main():
        expected = await undisturbed(chat_engine)
        replicas = LocalReplicas(chat_engine, **OPTIONS)
        async with fleet_of(replicas, 2) as llm:
            killing = asyncio.ensure_future(kill_when(replicas, 0, when))
            found = await asyncio.gather(*(read(llm, PROMPTS[name], params) for name, params in KINDS.items()))
            await killing
            assert llm.statistics.num_deaths == 1
            assert llm.statistics.num_moved > 0
            assert llm._fleet.is_idle
        assert {name: answer_of(one) for name, one in zip(KINDS, found, strict=True)} == {
            name: answer_of(one) for name, one in expected.items()
        }

    run_async(main())


def test_requests_wait_while_no_replica_lives(chat_engine):
    async def main():
        replicas = LocalReplicas(chat_engine, **OPTIONS)
        async with fleet_of(replicas, 1) as llm:
            expected = answer_of(await read(llm, "A prompt", KINDS["seeded"]))
            begun = asyncio.ensure_future(read(llm, "A prompt", KINDS["seeded"]))
            await kill_when(replicas, 0, replicas.made[0].num_tokens + 5)
            while llm.statistics.num_ready:
                await asyncio.sleep(0.001)
            with pytest.raises(NoReplica, match="none of 1 replicas answers"):
                await llm.check_health()
            waiting = await read(llm, "A prompt", KINDS["seeded"])
            assert [answer_of(await begun), answer_of(waiting)] == [expected, expected]
            await llm.check_health()
            assert len(replicas.made) == 2

    run_async(main())


def test_a_replica_that_falls_silent_is_replaced(chat_engine):
    async def main():
        replicas = LocalReplicas(chat_engine, **OPTIONS)
        async with fleet_of(replicas, 1, patience=replace(QUICK, silence_s=0.5)) as llm:
            expected = answer_of(await read(llm, "A prompt", KINDS["seeded"]))
            replicas.made[0].is_frozen = True
            assert answer_of(await read(llm, "A prompt", KINDS["seeded"])) == expected
            assert replicas.made[0].is_dead

    run_async(main())


def test_a_replica_whose_engine_stands_still_is_replaced(chat_engine):
    async def main():
        replicas = LocalReplicas(chat_engine, **OPTIONS)
        async with fleet_of(replicas, 1, patience=replace(QUICK, stall_s=0.5)) as llm:
            engine = replicas.made[0]._replica._opened.llm.core.engine
            release, run = threading.Event(), engine.run

            def stands_still(batch):
                release.wait(PATIENCE_S)
                return run(batch)

            engine.run = stands_still
            try:
                assert (await read(llm, "A prompt", KINDS["greedy"])).finished
                assert llm.statistics.num_deaths == 1
            finally:
                release.set()

    run_async(main())


def test_an_idle_replica_has_to_answer_a_probe(chat_engine):
    async def main():
        replicas = LocalReplicas(chat_engine, **OPTIONS)
        async with fleet_of(replicas, 1, patience=replace(QUICK, probe_s=0.2, stall_s=0.5)) as llm:
            replicas.made[0]._replica.probe = lambda: asyncio.sleep(100)
            while len(replicas.made) < 2:
                await asyncio.sleep(0.01)
            assert llm.statistics.num_deaths == 1

    run_async(main())


def test_an_engine_that_fails_ends_its_replica(chat_engine):
    async def main():
        replicas = LocalReplicas(chat_engine, **OPTIONS)
        async with fleet_of(replicas, 1) as llm:
            expected = answer_of(await read(llm, "A prompt", KINDS["greedy"]))

            def fail(batch):
                raise EngineError("no memory")

            replicas.made[0]._replica._opened.llm.core.engine.run = fail
            assert answer_of(await read(llm, "A prompt", KINDS["greedy"])) == expected
            assert replicas.made[0].is_dead

    run_async(main())


def test_a_request_that_ends_replicas_does_not_end_them_for_ever(chat_engine):
    async def main():
        replicas = LocalReplicas(chat_engine, **OPTIONS)
        async with fleet_of(replicas, 2) as llm:

            async def end_all():
                while True:
                    for each in replicas.made:
                        if each.num_begun and not each.is_dead:
                            each.die()
                    await asyncio.sleep(0.001)

            ending = asyncio.ensure_future(end_all())
            with pytest.raises(EngineError, match="3 replicas have ended while they answered this request"):
                await read(llm, "A prompt", KINDS["at its end"])
            ending.cancel()
            assert answer_of(await read(llm, "A prompt", KINDS["greedy"]))

    run_async(main())


@pytest.mark.parametrize("kind", ["in parts", "at its end"])
@pytest.mark.parametrize("after", [0, 20])
def test_only_the_request_that_ends_replicas_is_refused(chat_engine, kind, after):
    """One prompt ends each replica that runs it; those that wait or run beside it get their answers."""

    async def main():
        params, poison = KINDS[kind], "poison " * 5
        replicas = LocalReplicas(chat_engine, **OPTIONS)
        async with fleet_of(replicas, 2) as llm:
            expected = [answer_of(await read(llm, f"prompt {index}", params)) for index in range(12)]
            ids = tuple(llm.llm.tokenizer.encode(poison))
            start = replicas.start

            def poisoned(replica):
                run = replica._replica._opened.llm.core.step

                def step(failed):
                    requests = [pending.request for pending in replica._replica._opened.llm._answering.values()]
                    for request in requests:
                        if request.prompt == ids and request.sequences[0].num_output >= after:
                            replica.die()
                            raise EngineError("poisoned")
                    return run(failed)

                replica._replica._opened.llm.core.step = step

            def starting():
                replica = start()
                opened = replica.open

                async def open_poisoned():
                    found = await opened()
                    poisoned(replica)
                    return found

                replica.open = open_poisoned
                return replica

            replicas.start = starting
            for replica in replicas.made:
                poisoned(replica)
            prompts = [f"prompt {index}" for index in range(12)]
            prompts.insert(6, poison)
            found = await asyncio.gather(*(read(llm, each, params) for each in prompts), return_exceptions=True)
            refused = found.pop(6)
            assert isinstance(refused, EngineError)
            assert "3 replicas have ended" in str(refused)
            assert [answer_of(each) for each in found] == expected

    run_async(main())


def test_replicas_that_would_not_answer_alike_are_refused_by_name(chat_engine):
    def differs(number, found):
        identity = dict(found.identity) | ({"numerics": "other"} if number == 1 else {})
        return replace(found, name=f"machine {number}", identity=identity)

    with pytest.raises(EngineError, match=r"numerics is .* at machine \d and .* at machine \d; give all machines"):
        LocalReplicas(chat_engine, differs, **OPTIONS).llm(2)


def test_a_replica_with_less_room_is_not_taken_in_place_of_another(chat_engine):
    async def main():
        rooms = {1: 100, 2: 2048}  # of the replicas that follow the first
        replicas = LocalReplicas(
            chat_engine, lambda number, found: replace(found, max_seq_len=rooms.get(number, 2048)), **OPTIONS
        )
        async with fleet_of(replicas, 1) as llm:
            assert llm.llm.max_seq_len == 2048
            replicas.made[0].die()
            while llm.statistics.num_deaths < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(
                NoReplica, match=r"room for 100 tokens at .*, those before it had for 2048; free memory"
            ):
                await llm.check_health()
            assert (await read(llm, "A prompt", KINDS["greedy"])).finished
            assert len(replicas.made) == 3

    run_async(main())


def test_an_engine_that_is_not_there_is_an_error_at_once(tmp_path):
    (tmp_path / "engine.json").write_text("{}")
    with pytest.raises(EngineError, match=r"engine\.json"):
        LocalReplicas(tmp_path, **OPTIONS).llm(2)


def test_aborting_and_leaving(chat_engine):
    async def main():
        replicas = LocalReplicas(chat_engine, **OPTIONS)
        async with fleet_of(replicas, 1) as llm:
            endless = SamplingParams(temperature=0, ignore_eos=True, max_tokens=1500)
            core = replicas.made[0]._replica._opened.llm.core
            stream = await llm.add_request("A prompt", endless, "mine")
            await anext(stream)
            with pytest.raises(RequestError, match="'mine' is not finished"):
                await llm.add_request("A prompt", endless, "mine")
            await llm.abort("mine")
            outputs = [output async for output in stream]
            assert outputs[-1].finished
            assert outputs[-1].outputs[0].finish_reason == "abort"
            assert outputs[-1].outputs[0].token_ids
            left = await llm.add_request("A prompt", endless)
            await anext(left)
            left.close()
            while not core.is_done:
                await asyncio.sleep(0.01)
            assert llm._fleet.is_idle

    run_async(main())


def test_draining_and_closing(chat_engine):
    async def main():
        llm = await asyncio.to_thread(lambda: LocalReplicas(chat_engine, **OPTIONS).llm(2))
        stream = await llm.add_request("A prompt", SamplingParams(temperature=0, ignore_eos=True, max_tokens=1500))
        await anext(stream)
        assert not await llm.drain(0.01)
        with pytest.raises(EngineError, match="about to close"):
            await llm.add_request("A prompt")
        await llm.close()
        assert [output async for output in stream][-1].outputs[0].finish_reason == "abort"
        with pytest.raises(EngineError, match="are closed"):
            await llm.add_request("A prompt")

    run_async(main())


def test_what_cannot_be_sent_to_another_process_is_refused_alone(chat_engine):
    async def main():
        replicas = LocalReplicas(chat_engine, **OPTIONS)
        async with fleet_of(replicas, 1) as llm:
            (replica,) = replicas.made
            begin = replica.begin

            async def pickled(asked):
                if any(each.params.logits_processors for each in asked):
                    raise TypeError("cannot pickle 'lock' object")
                await begin(asked)

            replica.begin = pickled
            params = SamplingParams(temperature=0, logits_processors=[lambda ids, logits: logits])
            with pytest.raises(RequestError, match="a request cannot be passed on: cannot pickle 'lock' object; leave"):
                await read(llm, "A prompt", params)
            assert (await read(llm, "A prompt", KINDS["greedy"])).finished
            assert llm.statistics.num_deaths == 0

    run_async(main())


def test_what_a_request_gets_wrong_is_said(chat_engine):
    async def main():
        async with fleet_of(LocalReplicas(chat_engine, **OPTIONS), 1) as llm:
            with pytest.raises(RequestError, match="empty"):
                await llm.add_request([])
            with pytest.raises(EngineError, match="is run by replicas"):
                llm.llm.generate("A prompt", use_tqdm=False)

    run_async(main())
