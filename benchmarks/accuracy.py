"""What each scheme costs: engine size, distance from Hugging Face, perplexity, speed.

    python -m benchmarks.accuracy [--checkpoint DIR] [--text FILE] [SCHEME ...]

The reference is transformers in float32. Every engine reads the same token ids (teacher-forced):
windows of 1,024 tokens from the start of a text, each in one prefill.

    KL        mean over positions of KL(reference || engine), natural logarithm, computed in float64
    top-1     share of positions where both put the same token first (or tie within 1e-4)
    ppl       exp of the mean negative log-likelihood of the next token over all windows
    prefill   tokens a second of a 512-token prompt; decode: of 64 tokens after it, one at a time. Medians, engines
              in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from qwen_build.build import BuildOptions, plan_build, write_engine
from qwen_build.checkpoint import Checkpoint
from qwen_build.locate import resolve_checkpoint
from qwen_run.accuracy import FullLogits, compare
from qwen_run.engine import Engine
from qwen_run.evaluate import engine_logits, following_tokens, one_sequence
from qwen_run.tokenizer import Tokenizer

SAMPLE = Path(__file__).parent.parent / "tests" / "data" / "wikitext2-sample.txt"
WINDOW = 1024

SCHEMES: dict[str, dict[str, Any]] = {
    "none": {"quant": "none"},
    "none, float16 cache": {"quant": "none", "kv_cache_dtype": "float16"},
    "none, int8 cache": {"quant": "none", "kv_cache_dtype": "int8"},
    "none, int8 embedding": {"quant": "none", "embedding_quant": "int8"},
    "none, int8 embedding, int8x2 activations": {
        "quant": "none",
        "embedding_quant": "int8",
        "activations": "int8x2",
    },
    "none, int4 embedding": {"quant": "none", "embedding_quant": "int4"},
    "int8 g32 symmetric": {"quant": "int8"},
    "int8 g32 asymmetric": {"quant": "int8", "symmetric": False},
    "int8 g64 symmetric": {"quant": "int8", "group_size": 64},
    "int8 g128 symmetric": {"quant": "int8", "group_size": 128},
    "int8 g32 symmetric, int8x2 activations": {"quant": "int8", "activations": "int8x2"},
    "int8 g32 symmetric, float32 activations": {"quant": "int8", "activations": "float32"},
    "int4 g32 asymmetric": {"quant": "int4"},
    "int4 g32 asymmetric, int8x2 activations": {"quant": "int4", "activations": "int8x2"},
    "int4 g32 asymmetric, float32 activations": {"quant": "int4", "activations": "float32"},
    "int4 g32 asymmetric, int8 cache": {"quant": "int4", "kv_cache_dtype": "int8"},
    "int4 g32 asymmetric, int4 embedding": {"quant": "int4", "embedding_quant": "int4"},
    "int4 g32 symmetric": {"quant": "int4", "symmetric": True},
    "int4 g64 asymmetric": {"quant": "int4", "group_size": 64},
    "int4 g64 asymmetric, int8x2 activations": {"quant": "int4", "group_size": 64, "activations": "int8x2"},
    "int4 g64 symmetric": {"quant": "int4", "symmetric": True, "group_size": 64},
    "int4 g128 asymmetric": {"quant": "int4", "group_size": 128},
    "int4 g128 symmetric": {"quant": "int4", "symmetric": True, "group_size": 128},
    "int8 g32 symmetric, stock kernels": {"quant": "int8", "kernels": "stock"},
    "int4 g32 asymmetric, stock kernels": {"quant": "int4", "kernels": "stock"},
    "int4 g64 asymmetric, stock kernels": {"quant": "int4", "group_size": 64, "kernels": "stock"},
}


def compare_window(reference: np.ndarray, engine: Engine, token_ids: np.ndarray) -> dict[str, float]:
    """Sums over the positions of a window; ``nll`` of the engine, ``reference_nll`` of the reference."""
    logits = np.concatenate(list(engine_logits(engine, token_ids)))
    found = compare(FullLogits(reference), logits, following_tokens(token_ids))
    return {
        "kl": found.kl.sum(),
        "top1": found.top1.sum(),
        "nll": -found.log_likelihood.sum(),
        "reference_nll": -found.reference_log_likelihood.sum(),
    }


def speeds(engine: Engine, token_ids: np.ndarray) -> tuple[float, float]:
    """Prefill and decode tokens a second: 512 tokens at once, then 64 one by one."""
    prompt, answer = token_ids[:512], token_ids[512:576]
    blocks = engine.cache.allocate(engine.cache.blocks_for(576))
    assert blocks is not None
    started = time.perf_counter()
    engine.run(one_sequence(prompt, 0, blocks, first_logits=511))
    middle = time.perf_counter()
    for i in range(64):
        engine.run(one_sequence(answer[i : i + 1], 512 + i, blocks))
    ended = time.perf_counter()
    engine.cache.free(blocks)
    return 512 / (middle - started), 64 / (ended - middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", metavar="SCHEME", help=f"some of: {'; '.join(SCHEMES)}")
    parser.add_argument("--checkpoint", help="directory or Hub id; the demo if left out")
    parser.add_argument("--text", type=Path, default=SAMPLE)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=4, help="of speed, the first of them not counted; 0 or 1: no speeds"
    )
    arguments = parser.parse_args()

    import torch
    import transformers

    located = resolve_checkpoint(arguments.checkpoint)
    torch.set_num_threads(arguments.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(located.path, dtype=torch.float32).eval()
    text = arguments.text.read_text(encoding="utf-8")
    token_ids = np.array(Tokenizer.load(located.path).encode(text)[: arguments.windows * WINDOW])
    windows = token_ids.reshape(arguments.windows, WINDOW)
    with torch.no_grad():
        reference = [model(torch.tensor(window[None])).logits[0].numpy() for window in windows]
    del model

    print(
        f"{located.name}, {arguments.windows} x {WINDOW} tokens of {arguments.text.name}, {arguments.threads} threads"
    )
    print(f"transformers {transformers.__version__} float32 (reference)\n")
    with tempfile.TemporaryDirectory() as scratch:
        engines, rows = {}, {}
        for number, name in enumerate(arguments.schemes or SCHEMES):
            directory = Path(scratch) / str(number)
            with Checkpoint.open(located.path) as weights:
                write_engine(plan_build(weights, located, BuildOptions(**SCHEMES[name])), weights, directory)
            engine = Engine.load(directory, threads=arguments.threads)
            if arguments.rounds:
                engines[name] = engine
            sums = [compare_window(r, engine, w) for r, w in zip(reference, windows, strict=True)]
            rows[name] = {key: sum(s[key] for s in sums) for key in sums[0]}
            rows[name]["bytes"] = sum(path.stat().st_size for path in directory.iterdir())
            print(f"{name}: KL {rows[name]['kl'] / arguments.windows / WINDOW:.3e}", file=sys.stderr)
        timings: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for _ in range(arguments.rounds):
            for name, engine in engines.items():
                timings[name].append(speeds(engine, token_ids))
    positions, predicted = arguments.windows * WINDOW, arguments.windows * (WINDOW - 1)
    baseline = np.exp(next(iter(rows.values()))["reference_nll"] / predicted)
    timed = arguments.rounds > 1
    header = ["scheme", "MB", "KL", "top-1", f"ppl (reference {baseline:.4f})"]
    header += ["prefill tok/s", "decode tok/s"] * timed
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for name, row in rows.items():
        cells = [name, f"{row['bytes'] / 1e6:.1f}", f"{row['kl'] / positions:.2e}", f"{row['top1'] / positions:.2%}"]
        cells.append(f"{np.exp(row['nll'] / predicted):.4f}")
        if timed:
            prefill, decode = (statistics.median(speed) for speed in zip(*timings[name][1:], strict=True))
            cells += [f"{prefill:.0f}", f"{decode:.1f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
