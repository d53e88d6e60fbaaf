"""This engine beside its peers on equal work: llama.cpp, OpenVINO GenAI and onnxruntime-genai, in one run.

    python -m benchmarks.peers --install build/peers-venv              once: a virtual environment with all peers
    python -m benchmarks.peers --venv build/peers-venv                 the 0.5B shape, random weights
    python -m benchmarks.peers --venv A --venv B --checkpoint qwen2.5-1.5b --rounds 7
    python -m benchmarks.peers --venv A --checkpoint demo --rows decode-512,prefill-512 --rounds 3
    python -m benchmarks.peers --before ../checkout-of-another-commit      what a change of this project costs

A checkpoint is a shape of ``benchmarks.random_checkpoint``, ``demo``, or a directory. What the programs read is made
of it in --work: our engines, anew each time; GGUF for llama.cpp and OpenVINO and the graph of onnxruntime-genai's
builder, once.
A peer that no environment has is left out. Each program is a process of its own (``peer_worker.py``) that is told
over a pipe what to do; within a row they take turns, after one round that is not counted. Figures are medians.
The table and a plot go to --output, with the machine, the date and all versions. --before is another checkout of this
project whose operators are compiled (``python -m qwen_plugin.compile``): it builds and runs an engine of its own.

The weights are int4 everywhere, groups of 32: Q4_0 and the builder's graph symmetric, ours as the default has them.
llama.cpp runs with flash attention, without it, and with it on a cache of q8_0; OpenVINO, with continuous batching, on
two caches: a program's best setting counts. The past of llama.cpp's decode steps is cached in parts of 512 tokens and
then joined, as a prompt of 16,384 takes it up to an hour. That all run the same model shows in what they answer with
--checkpoint demo.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

from benchmarks.command import run, say
from benchmarks.peer_environments import ROOT, find_pythons, install
from benchmarks.peer_match import BEFORE, Match, Models, Row
from benchmarks.peer_report import machine_notes, plot, report
from benchmarks.random_checkpoint import SHAPES, write_checkpoint
from qwen_build.checkpoint.locate import resolve_checkpoint

OURS = ("engine", BEFORE)
OURS_HEAD_4, OURS_CACHE_8 = (tuple(f"{one}, {how}" for one in OURS) for how in ("4-bit head", "int8 cache"))
OPENVINO = ("OpenVINO", "OpenVINO, u8 cache")
LLAMA_CPP = ("llama.cpp", "llama.cpp, no flash attention", "llama.cpp, q8_0 cache")
ALL = (*OURS, *LLAMA_CPP, *OPENVINO, "onnxruntime-genai")
HEAD_4_BITS = ("llama.cpp, 4-bit head", "llama.cpp, 4-bit head, no flash attention")

ROWS = {
    # first, while each process holds nothing else yet
    "load": Row("load to first token, s", {"do": "load", "longest": 1024}, None, "s", ALL, goal="0.5 s, stretch 0.2 s"),
    "memory": Row("peak memory beyond weights, cache and imports", {"do": "memory"}, None, "MB", ALL,
                  goal="120 MB, stretch 60 MB"),
    "decode-512": Row("decode at 512 past tokens, head at 8 bits", {"do": "decode", "past": 512, "count": 64}, 64,
                      "tok/s", ALL, LLAMA_CPP, "1.4 ×, stretch 1.8 ×", "memory"),
    "decode-512-head4": Row("decode at 512 past tokens, our head at 4 bits", {"do": "decode", "past": 512, "count": 64},
                            64, "tok/s", (*OURS_HEAD_4, *LLAMA_CPP, *HEAD_4_BITS), LLAMA_CPP,
                            "1.6 ×, stretch 2.2 ×", "memory"),
    "prefill-512": Row("prefill of 512 tokens", {"do": "prefill", "length": 512}, 512, "tok/s", ALL, OPENVINO,
                       "1.15 ×, stretch 1.4 ×", "compute"),
    "batch-16": Row("16 requests at once, prompt 128, 64 new", {"do": "batch", "requests": 16, "prompt_length": 128,
                    "new": 64}, 16 * 64, "output tok/s", ALL, OPENVINO, "1.5 ×, stretch 2 ×", "compute"),
    "decode-4k": Row("decode at 4,096 past tokens, int8 cache", {"do": "decode", "past": 4096, "count": 32}, 32,
                     "tok/s", (*OURS_CACHE_8, *LLAMA_CPP, *OPENVINO), ("llama.cpp, q8_0 cache",),
                     "2.5 ×, stretch 3.5 ×", "memory"),
    "overhead": Row("share of a decode step at 512 that is not its matrices", {"do": "overhead", "past": 512,
                    "count": 64}, None, "", OURS, goal="0.25, stretch 0.12"),
    "decode-16k": Row("decode at 16,384 past tokens, int8 cache", {"do": "decode", "past": 16384, "count": 16}, 16,
                      "tok/s", (*OURS_CACHE_8, *LLAMA_CPP, *OPENVINO), ("llama.cpp, q8_0 cache",),
                      "4 ×, stretch 7 ×", "memory"),
}  # fmt: skip


def common_arguments(description: str) -> argparse.ArgumentParser:
    """What every comparison with peers takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, action="append", default=[], help="where peers are; may be given again")
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout of this project, compiled")
    parser.add_argument("--checkpoint", default="qwen2.5-0.5b")
    parser.add_argument("--activations", default="int8", choices=("int8", "int8x2"), help="of our engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="where models are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="where the table goes")
    return parser


def set_up(arguments: argparse.Namespace) -> Match:
    """Checkpoint, models and programs as the command line has them."""
    work = arguments.work / work_name(arguments.checkpoint)
    pythons = find_pythons(arguments.venv)
    checkpoint = find_checkpoint(arguments.checkpoint, work)
    if arguments.before:
        pythons[BEFORE] = pythons["engine"]
    models = Models(checkpoint, work, arguments.activations, pythons.get("onnxruntime-genai"), arguments.before)
    return Match(pythons, models, arguments.threads, arguments.rounds)


def work_name(checkpoint: str) -> str:
    """A name for what is made of ``checkpoint``: of another directory, or when its files change, another."""
    path = Path(checkpoint)
    if checkpoint == "demo" or checkpoint in SHAPES or not path.is_dir():
        return path.name
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in path.iterdir())
    return f"{path.name}-{hashlib.sha256(repr((path.resolve(), files)).encode()).hexdigest()[:8]}"


def find_checkpoint(name: str, work: Path) -> Path:
    """A directory, the demo, or a random checkpoint of a published shape, written to ``work`` the first time."""
    if name == "demo":
        return resolve_checkpoint(None).path
    if name not in SHAPES:
        return resolve_checkpoint(name).path
    directory = work / "checkpoint"
    if not directory.exists():
        say(f"making {directory}")
        unfinished = work / "checkpoint.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_checkpoint(name, unfinished)
        unfinished.rename(directory)
    return directory


def main() -> None:
    parser = common_arguments(__doc__ or "")
    parser.add_argument("--install", type=Path, metavar="DIR", help="make an environment with all peers, and end")
    parser.add_argument("--rows", default=",".join(ROWS), help="which lines of the table, with commas (default: all)")
    arguments = parser.parse_args()
    if arguments.install:
        install(arguments.install)
        return
    names = arguments.rows.split(",")
    if unknown := sorted(set(names) - ROWS.keys()):
        parser.error(f"no rows {', '.join(unknown)}; there are {', '.join(ROWS)}")
    match = set_up(arguments)
    longest = match.manifest.limits.max_seq_len
    rows = {
        name: row for name, row in ROWS.items() if name in names and row.command.get("past", 0) + 64 < longest
    }  # a checkpoint for short texts has no long ones
    match.play(rows)
    report(arguments, match, rows, plot(rows, match.found, machine_notes(arguments.threads)), "peers")


if __name__ == "__main__":
    run(main)
