"""How long the requests of a multiple-choice task take in lm-evaluation-harness: an engine beside transformers.

    python -m benchmarks.random_checkpoint qwen2.5-0.5b DIRECTORY
    python -m benchmarks.likelihood DIRECTORY
    python -m benchmarks.likelihood DIRECTORY --requests 8 --rounds 1      a first look

The requests are log likelihoods of four answers to each question, after the same five examples. The engine is built
from the checkpoint, answers through the harness's model qwen-engine, and has an empty cache in each round;
transformers computes in bfloat16 through the harness's own HFLM. They take turns. Needs the extras hf and eval.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.command import run, say
from benchmarks.peer_report import machine_notes
from qwen_build import build

SHOTS, CHOICES, GOAL = 5, 4, 4.0
Request = tuple[str, str]


def make_requests(count: int) -> list[Request]:
    """(context, continuation) of questions whose contexts begin with the same examples."""
    rng = random.Random(0)
    examples = "\n\n".join(_question(rng, number) + _answers(rng)[0] for number in range(SHOTS))
    found: list[Request] = []
    while len(found) < count:
        context = f"{examples}\n\n{_question(rng, SHOTS + len(found) // CHOICES)}"
        found += [(context, answer) for answer in _answers(rng)]
    return found[:count]


def _question(rng: random.Random, number: int) -> str:
    first, second = rng.randrange(100, 1000), rng.randrange(10, 100)
    return f"Question {number}: a shop has {first} apples and sells {second} of them each day. What is left?\nAnswer:"


def _answers(rng: random.Random) -> list[str]:
    return [f" {number} apples" for number in rng.sample(range(100, 1000), CHOICES)]


class Transformers:
    """The checkpoint in bfloat16, as the harness runs it."""

    def __init__(self, checkpoint: Path, threads: int, batch_size: int) -> None:
        import torch
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

        torch.set_num_threads(threads)
        tokenizer: Any
        if (checkpoint / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        else:  # of random_checkpoint, where a byte is a token
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"), eos_token="!")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        self.model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.tokenizer = tokenizer

    def ready(self) -> Any:
        return self.model


class Engine:
    """An engine through the harness's model of this project, its cache empty."""

    def __init__(self, directory: Path, threads: int) -> None:
        self.directory, self.threads = directory, threads

    def ready(self) -> Any:
        from qwen_run.harness.engine_lm import EngineLM

        return EngineLM(self.directory, threads=self.threads)


def answer(model: Any, requests: list[Request]) -> tuple[float, list[float]]:
    """Seconds, and the log likelihoods."""
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, request, number) for number, request in enumerate(requests)]
    started = time.perf_counter()
    found = model.loglikelihood(asked, disable_tqdm=True)
    return time.perf_counter() - started, [float(value) for value, _ in found]


def play(contenders: dict[str, Any], requests: list[Request], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by the names of ``contenders``; the order turns from round to round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        order = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        values = {}
        for name in order:
            seconds, values[name] = answer(contenders[name].ready(), requests)
            times[name].append(seconds)
            say(f"round {number + 1}, {name}: {seconds:.1f} s")
        if number == 0:
            ours, theirs = values.values()
            mean = statistics.mean(abs(one - other) for one, other in zip(ours, theirs, strict=True))
            say(f"the mean difference of a log likelihood is {mean:.3f} of {-statistics.mean(theirs):.1f}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--batch-size", type=int, default=8, help="requests that transformers computes at once")
    arguments = parser.parse_args()
    requests = make_requests(arguments.requests)
    with tempfile.TemporaryDirectory() as folder:
        engine = build(arguments.checkpoint, Path(folder) / "engine", quant=arguments.quant)
        theirs = Transformers(arguments.checkpoint, arguments.threads, arguments.batch_size)
        sizes = [len(theirs.tokenizer.encode(text)) for text in requests[0]]
        names = f"engine, {arguments.quant}", f"transformers, bfloat16, {arguments.batch_size} at once"
        ours = Engine(engine, arguments.threads)
        times = play(dict(zip(names, (ours, theirs), strict=True)), requests, arguments.rounds)
    medians = [statistics.median(times[name]) for name in names]
    print(
        f"{arguments.checkpoint.name}, {machine_notes(arguments.threads)[0]}, median of {arguments.rounds} rounds; "
        f"{len(requests)} requests of {sizes[0]} and {sizes[1]} tokens\n"
    )
    print("| answered by | s | requests/s | over transformers | goal |\n|---|---|---|---|---|")
    for name, seconds in zip(names, medians, strict=True):
        over = f"{medians[1] / seconds:.1f} × | {GOAL:g} ×" if name == names[0] else " |"
        print(f"| {name} | {seconds:.1f} | {len(requests) / seconds:.2f} | {over} |")


if __name__ == "__main__":
    run(main)
