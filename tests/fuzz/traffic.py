"""Random requests, many of them nonsense: each is answered or refused, and every block of the cache is free after."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

from cases.scripted import IM_END, SPECIAL, scripted_model, write_text_files
from fuzz.mutations import NUMBERS, OTHERS
from fuzz.rounds import Attempt, main

# What is likely to be taken, by option. ``make`` puts in nonsense now and then.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 0, 0.7, 1.5),
    "top_p": (1.0, 0.5),
    "top_k": (0, 1, 5),
    "repetition_penalty": (1.0, 1.3),
    "seed": (0, 1, 2**63 - 1),
    "max_tokens": (1, 2, 8, 40, 512),
    "min_p": (0.0, 0.2),
    "presence_penalty": (0.0, 0.5),
    "frequency_penalty": (0.0, 0.5),
    "logit_bias": ({}, {5: 3.0}, {0: -100}, {IM_END: -1000}),
    "n": (1, 1, 1, 2, 4),
    "stop": ((), "A", ("AB", "é"), ("X" * 20,)),
    "stop_token_ids": ((), (1, 2), tuple(range(300))),
    "include_stop_str_in_output": (False, True),
    "ignore_eos": (False, True),
    "min_tokens": (0, 3),
    "logprobs": (None, 0, 3),
    "prompt_logprobs": (None, 0, 2),
    "num_beams": (1, 1, 1, 1, 2, 3),
    "length_penalty": (1.0, -1.0),
    "early_stopping": (False, True, "never"),
}
PIECES = ("a", "hello ", "é", "🤗", "\ud800", "\x00", *SPECIAL, "ab" * 40)


def make(directory: Path, rng: random.Random, folder: Path) -> Attempt:
    size = rng.choice([64, 100, 400])
    options = {
        "max_batch_size": rng.choice([1, 2, 16]),
        "max_batch_tokens": rng.choice([16, 33, 256]),
        "prefix_caching": rng.random() < 0.7,
        "max_drafts": rng.choice([0, 1, 8]),
    }
    asked = [random_request(rng) for _ in range(rng.choice([1, 3, 12, 40]))]
    return Attempt(f"{len(asked)} requests, length {size}", partial(answer_all, directory, size, options, asked, rng))


def random_request(rng: random.Random) -> tuple[Any, dict[str, Any]]:
    """A prompt and its sampling options."""
    prompt: Any = "".join(rng.choices(PIECES, k=rng.choice([0, 1, 2, 5, 20])))
    if rng.random() < 0.3:
        prompt = rng.choices(range(300), k=rng.choice([0, 1, 50, 500])) + rng.choices(
            [-1, 2**63, 5], k=rng.choice([0, 0, 1])
        )
    names = rng.sample(sorted(OPTIONS), rng.choice([0, 1, 2, 4, 8]))
    params = {name: rng.choice(OPTIONS[name]) for name in names}
    if names and rng.random() < 0.2:
        params[names[0]] = rng.choice([*NUMBERS, *OTHERS])
    return prompt, params


def answer_all(
    directory: Path, size: int, options: dict[str, Any], asked: list[tuple[Any, dict[str, Any]]], rng: random.Random
) -> str:
    from qwen_engine.errors import RequestError
    from qwen_run import LLM, SamplingParams

    model, script = scripted_model(directory, lambda prompt: prompt.upper().encode("utf-8", "replace").decode(), size)
    running, refused, seen = [], 0, 0
    with LLM(model, **options) as llm:
        for prompt, params in asked:
            try:
                pending = llm.prepare(prompt, SamplingParams(**params))
                llm.submit(pending)
                running.append(pending)
            except RequestError as error:
                refused += 1
                if "\n" in str(error):
                    return f"an error of several lines: {error!s:.300}"
            for _ in range(rng.choice([0, 0, 1, 5])):
                llm.step()
            if running and rng.random() < 0.1:
                llm.abort(rng.choice(running))
        while not llm.core.is_done:
            llm.step()
            seen += 1
            if seen > 100_000:
                return "no end of steps"
        for pending in running:
            output = pending.output()
            if not (output.finished and all(choice.finish_reason for choice in output.outputs)):
                return f"unfinished: {output!r:.300}"
    if not script.is_idle:
        return f"{script.cache.num_blocks - script.cache.num_free} blocks of the cache are still owned"
    return f"answered: {len(running)}" if running else f"refused: {refused}"


if __name__ == "__main__":
    main(__doc__, lambda directory: write_text_files(directory / "text"), make)
