"""Hostile checkpoints: what qwen-build makes of damaged headers and configs is an engine that runs, or one line."""

from __future__ import annotations

import json
import random
import shutil
import struct
from functools import partial
from pathlib import Path

from fuzz.checkpoint import write_checkpoint
from fuzz.mutations import mutate_bytes, mutate_tree
from fuzz.rounds import Attempt, main, preload, run_command

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
WEIGHTS = (5, 5, 2, 1, 1)  # how often each is damaged


def prepare(directory: Path) -> Path:
    """A sound checkpoint."""
    preload("onnxruntime", "qwen_build.engine_build", "qwen_run.api.llm")
    return write_checkpoint(directory / "checkpoint")


def make(checkpoint: Path, rng: random.Random, folder: Path) -> Attempt:
    damaged = shutil.copytree(checkpoint, folder / "checkpoint")
    name = rng.choices(FILES, WEIGHTS)[0]
    path = damaged / name
    data = path.read_bytes()
    if rng.random() < 0.2:
        data, note = mutate_bytes(data, rng)
    elif path.suffix == ".json":
        data, note = mutated_json(data, rng)
    else:
        data, note = mutated_header(data, rng)
    path.write_bytes(data)
    return Attempt(f"{name}: {note}", partial(build_and_run, damaged, folder / "engine", rng.choice(["none", "int4"])))


def mutated_json(text: bytes, rng: random.Random) -> tuple[bytes, str]:
    tree = json.loads(text)
    note = "; ".join(mutate_tree(tree, rng) for _ in range(rng.choice([1, 1, 1, 2])))
    return json.dumps(tree).encode("utf-8", "surrogatepass"), note


def mutated_header(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file with another header, or another length of it."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.15:
        length = rng.choice([0, 1, 7, end - 9, end, 10**8, 2**32, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + data[8:], f"a header of {length} bytes"
    text, note = mutated_json(data[8:end], rng)
    if rng.random() < 0.1:
        text, note = text.replace(b"{", b'{"__metadata__": {"a": 1}, ', 1), f"{note}; metadata twice"
    return struct.pack("<Q", len(text)) + text + data[end:], note


def build_and_run(checkpoint: Path, engine: Path, quant: str) -> str:
    from qwen_build.cli import main as build
    from qwen_run.commands.run import main as run

    said = run_command(build, checkpoint, "--output", engine, "--quant", quant)
    if said != "answered":
        left = [path.name for path in engine.parent.iterdir() if path != checkpoint]
        return f"left {left} behind after: {said}" if left and said.startswith("refused") else said
    ask = ["--engine", engine, "--threads", 1, "--kv-cache-memory", 4, "--input-text", "Hi", "--max-new-tokens", 3]
    return run_command(run, *ask)


if __name__ == "__main__":
    main(__doc__, prepare, make)
