"""Engines of six small layers, and what to ask of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cases.scripted import write_text_files
from cases.tiny import TINY
from qwen_run import LLM, SamplingParams

BUILDS = {
    "int4, int8 cache": {"quant": "int4", "kv_cache_dtype": "int8", "block_size": 32},
    "int8, float16 cache": {"quant": "int8", "kv_cache_dtype": "float16", "block_size": 32},
}


@pytest.fixture(scope="session")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint."""
    import torch
    import transformers

    path = write_text_files(tmp_path_factory.mktemp("six") / "six", "qwen3")
    torch.manual_seed(4)
    sizes = TINY | {"model_type": "qwen3", "head_dim": 16, "vocab_size": 283, "num_hidden_layers": 6}
    sizes |= {"max_position_embeddings": 1024, "tie_word_embeddings": True}
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**sizes)).save_pretrained(path)
    return path


@pytest.fixture(scope="session", params=BUILDS)
def each_engine(request: pytest.FixtureRequest, six_layers: Path, build_engine: Callable[..., Path]) -> Path:
    return build_engine(six_layers, **BUILDS[request.param])


@pytest.fixture(scope="session")
def engine(six_layers: Path, build_engine: Callable[..., Path]) -> Path:
    return build_engine(six_layers, **BUILDS["int8, float16 cache"])


@pytest.fixture(scope="session")
def questions() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of all lengths, some of which begin alike or repeat themselves, each asked in another way."""
    rng = random.Random(2)
    shared = [rng.randrange(250) for _ in range(150)]
    ways: list[dict[str, Any]] = [
        {"temperature": 0, "max_tokens": 90},
        {"temperature": 0.8, "seed": 5, "max_tokens": 20, "logprobs": 3},
        {"temperature": 0.9, "seed": 6, "max_tokens": 9, "n": 3},
        {"temperature": 0, "num_beams": 3, "max_tokens": 8},
        {"temperature": 0, "max_tokens": 6, "prompt_logprobs": 2},
        {"temperature": 0.7, "seed": 7, "max_tokens": 80, "frequency_penalty": 0.5, "min_tokens": 20},
    ]
    found = []
    for index in range(18):
        prompt = shared[: rng.choice([0, 130, 150])] + [rng.randrange(250) for _ in range(rng.choice([1, 17, 64, 200]))]
        if index % 4 == 0:
            prompt += [9, 8, 7, 6] * 6  # what drafts guess from
        found.append((prompt, SamplingParams(ignore_eos=True, **ways[index % len(ways)])))
    return found


@pytest.fixture(scope="session")
def ask(questions: list[tuple[list[int], SamplingParams]]) -> Callable[..., Any]:
    """``ask(llm, on_step=None)``: everything that is told of all ``questions``, logits as bytes."""

    def ask(llm: LLM, on_step: Callable[[int], object] = lambda _: None) -> Any:
        pending = [llm.prepare(prompt, params) for prompt, params in questions]
        for index, each in enumerate(pending):
            if index < 12:
                llm.submit(each)
        steps = 0
        while not llm.core.is_done:
            on_step(steps)
            llm.step()
            steps += 1
            if steps == 10:  # some come later
                llm.submit(*pending[12:])
        told = []
        for each in pending:
            output = each.output(whole=True)
            answers = [(a.token_ids, a.text, a.finish_reason, a.logprobs, a.cumulative_logprob) for a in output.outputs]
            logits = sorted(row.tobytes() for row in each.logits)  # samples take turns as steps have it
            told.append((answers, output.prompt_logprobs, logits))
        return told

    return ask
