"""Prompts of a dataset of Ray Data: python ray_data.py ENGINE PROMPTS.jsonl ANSWERS_FOLDER"""

import asyncio
import os
import sys

import ray

from qwen_run import AsyncLLM, EngineError, SamplingParams


class Answering:
    """An engine in a process of its own; several batches are in it at once."""

    def __init__(self, engine: str) -> None:
        self.llm = AsyncLLM(engine, threads=1)

    async def __call__(self, batch):
        batch["text"] = await asyncio.gather(*map(self.answer, batch["prompt"]))
        yield batch

    async def answer(self, prompt: str) -> str:
        try:
            async for output in self.llm.generate(prompt, SamplingParams(temperature=0, max_tokens=60)):
                text = output.outputs[0].text
            return text
        except EngineError:
            os._exit(1)  # Ray would ask the same process again


if __name__ == "__main__":
    engine, prompts, answers = map(os.path.abspath, sys.argv[1:])
    pool = ray.data.ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=4)
    options = {"fn_constructor_args": [engine], "compute": pool, "num_cpus": 1, "max_concurrency": 4}
    # Readers and writers ask for no processor: where the pool has all of them, they would wait for ever.
    rows = ray.data.read_json(prompts, num_cpus=0).map_batches(Answering, batch_size=16, **options)
    rows.write_json(answers, ray_remote_args={"num_cpus": 0})
