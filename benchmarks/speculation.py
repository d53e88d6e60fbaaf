"""What guessing the next tokens gains when documents are summarised: greedy, with and without.

    qwen-build --output build/engine
    python -m benchmarks.speculation build/engine --documents 50

The abstracts of the built-in SciTLDR sample through the chat template, 64 new tokens at most: those of the half for
evaluation, then those of the half for calibration, which has nothing to do with speed. Both ways take turns over groups
of as many documents as the batch size, so that a noisy minute meets both; seconds are those of the steps after the
prompts. Refuses to print where one answer differs by one token.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import onnxruntime

from qwen_run.accuracy.both_sides import make_prompt
from qwen_run.accuracy.datasets import built_in_documents
from qwen_run.api.llm import LLM
from qwen_run.runtime.core import CoreStatistics
from qwen_run.runtime.engine import Engine
from qwen_run.sampling.sample import SamplingParams
from qwen_run.text.text_model import TextModel

NEW_TOKENS = 64


def answer(
    model: TextModel, prompts: list[tuple[int, ...]], max_drafts: int
) -> tuple[list[list[int]], float, CoreStatistics]:
    """The answers, seconds of decoding, and what the core did."""
    llm = LLM(model, max_batch_size=len(prompts), max_batch_tokens=8192, prefix_caching=False, max_drafts=max_drafts)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    requests = [llm.prepare(prompt, params) for prompt in prompts]
    answers = llm.run(requests)
    next(answers)  # the prompts are fed
    started = time.perf_counter()
    for _ in answers:
        pass
    seconds = time.perf_counter() - started
    return [pending.request.sequences[0].output for pending in requests], seconds, llm.core.statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max-drafts", type=int, default=8)
    arguments = parser.parse_args()
    engine = Engine.load(arguments.engine, threads=arguments.threads)
    model = TextModel.of(engine)
    documents = [*built_in_documents("scitldr"), *built_in_documents("scitldr", "calibration")]
    prompts = [make_prompt(model, each, NEW_TOKENS).token_ids for each in documents[: arguments.documents]]
    print(
        f"{arguments.engine.name}, {len(prompts)} documents, {arguments.threads} threads, "
        f"onnxruntime {onnxruntime.__version__}, at most {arguments.max_drafts} guesses\n"
    )
    print("| batch | plain, tok/s | guessing, tok/s | gain | runs | guessed | right |\n|---|---|---|---|---|---|---|")
    for batch in arguments.batch:
        num_tokens, seconds, steps, drafts, accepted = 0, [0.0, 0.0], [0, 0], 0, 0
        for start in range(0, len(prompts), batch):
            group = prompts[start : start + batch]
            plain, plain_s, plain_did = answer(model, group, 0)
            guessed, guessed_s, did = answer(model, group, arguments.max_drafts)
            if plain != guessed:
                raise SystemExit(f"documents {start + 1} to {start + len(group)}: the answers differ")
            num_tokens += sum(len(output) - 1 for output in plain)
            seconds = [seconds[0] + plain_s, seconds[1] + guessed_s]
            steps = [steps[0] + plain_did.num_steps, steps[1] + did.num_steps]
            drafts, accepted = drafts + did.num_drafts, accepted + did.num_accepted
        print(
            f"| {batch} | {num_tokens / seconds[0]:.1f} | {num_tokens / seconds[1]:.1f} | "
            f"{seconds[0] / seconds[1]:.2f} | {steps[1] / steps[0]:.0%} | {drafts} | {accepted / max(drafts, 1):.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
