"""``qwen-run --ray``: a file of prompts answered by replicas on a cluster, into the same records as by one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from qwen_engine.errors import EngineError, RequestError
from qwen_run.api.outputs import RequestOutput
from qwen_run.api.pending_request import PendingRequest
from qwen_run.cluster.replicated_llm import ReplicatedLLM
from qwen_run.commands.answer_file import AnswersOut, AnswerTally
from qwen_run.commands.prompt_file import FilePrompt
from qwen_run.sampling.rules import RequestOutputKind

_IN_HAND = 2  # prompts for each place of each batch: one is answered and the next one waits there


async def answer_all_on(
    llm: ReplicatedLLM,
    prompts: Sequence[FilePrompt],
    prepare: Callable[[FilePrompt], PendingRequest],
    answers: AnswersOut,
) -> None:
    """Answer those of ``prompts`` that ``answers`` does not have; a replica that ends loses none of them.

    Raises:
        RequestError: at the end, if some prompts could not be answered; what was wrong stands in their records.
    """
    tally = AnswerTally(len(prompts), answers)
    statistics = llm.statistics
    in_hand = asyncio.Semaphore(_IN_HAND * statistics.num_replicas * llm.llm.core.options.max_batch_size)

    async def answer(prompt: FilePrompt) -> None:
        try:
            pending = await asyncio.to_thread(prepare, prompt)
            tally.take(prompt, await _answer(llm, pending))
        except (RequestError, EngineError) as error:
            tally.refuse(prompt, str(error))
        finally:
            in_hand.release()
            tally.show()

    with tally.bar:
        async with asyncio.TaskGroup() as tasks:
            for prompt in prompts:
                if prompt.line not in answers.answered:
                    await in_hand.acquire()
                    tasks.create_task(answer(prompt))
    ended = llm.statistics
    more = f"; {ended.num_replicas} replicas"
    if ended.num_deaths:
        more += f", {ended.num_deaths} were replaced, {ended.num_moved} prompts moved"
    tally.finish(more)


async def _answer(llm: ReplicatedLLM, pending: PendingRequest) -> RequestOutput:
    """
    Raises:
        EngineError: it cannot be answered.
    """
    request = pending.request
    request.params = replace(request.params, output_kind=RequestOutputKind.FINAL_ONLY)
    stream = await llm.begin(pending)
    found: RequestOutput | None = None
    try:
        async for output in stream:
            found = output
    finally:
        stream.close()
    assert found is not None  # a stream ends with an output or an error
    return found
