"""Hostile engines: a file is damaged and its checksum forged, and commands answer or refuse in one line."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path

import click

from fuzz.checkpoint import write_checkpoint
from fuzz.mutations import mutate_bytes, mutate_tree
from fuzz.rounds import Attempt, in_child, main, preload, run_command
from qwen_run.commands.command import Command

PARTS = (
    "engine.json",
    "model.onnx",
    "layers.onnx",
    "weights.bin",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
WEIGHTS = (6, 3, 2, 1, 3, 2, 1)  # how often each is damaged


def prepare(directory: Path) -> dict[str, Path]:
    """A sound engine of each kind."""
    from qwen_build.cli import main as build

    preload("onnxruntime", "qwen_build.engine_build", "qwen_run.api.llm", "qwen_run.inspection.graph")
    checkpoint = write_checkpoint(directory / "checkpoint")
    engines = {}
    for quant in ("none", "int8", "int4"):
        engines[quant] = directory / quant
        said = in_child(partial(run_command, build, checkpoint, "--output", engines[quant], "--quant", quant))
        assert said == "answered", said
        said = in_child(partial(use, engines[quant], True))
        assert said == "answered", said
    return engines


def make(engines: dict[str, Path], rng: random.Random, folder: Path) -> Attempt:
    quant = rng.choice(list(engines))
    engine = shutil.copytree(engines[quant], folder / "engine")
    name = rng.choices(PARTS, WEIGHTS)[0]
    path = engine / name
    if path.suffix == ".json" and rng.random() < 0.8:
        tree = json.loads(path.read_text("utf-8"))
        note = "; ".join(mutate_tree(tree, rng) for _ in range(rng.choice([1, 1, 1, 2])))
        path.write_bytes(json.dumps(tree).encode("utf-8", "surrogatepass"))
    else:
        data, note = mutate_bytes(path.read_bytes(), rng)
        path.write_bytes(data)
    if name != "engine.json" and rng.random() < 0.9:
        forge(engine, name)
    return Attempt(f"{quant}, {name}: {note}", partial(use, engine, name == "layers.onnx" or rng.random() < 0.3))


def forge(engine: Path, name: str) -> None:
    """Let the manifest say of a file what it is like by now."""
    from qwen_run.engine_files.checksums import measure_part

    manifest = json.loads((engine / "engine.json").read_text("utf-8"))
    record = measure_part(engine / name)
    manifest["parts"][name] = {"size_bytes": record.size_bytes, "crc32": record.crc32, "sha256": record.sha256}
    (engine / "engine.json").write_text(json.dumps(manifest))


def use(engine: Path, checks: bool) -> str:
    """Ask the engine something; look into it as well where ``checks``."""
    from qwen_run.commands.inspect import main as inspect
    from qwen_run.commands.run import main as run

    looks: list[tuple[object, ...]] = []
    if checks:
        looks = [(inspect, engine, "--json"), (inspect, engine, "--graph"), (inspect, engine, "--verify")]
        looks += [(compare_layers, engine)]
    asks = [
        run,
        "--engine",
        engine,
        "--threads",
        1,
        "--kv-cache-memory",
        4,
        "--input-text",
        "Hi",
        "--max-new-tokens",
        3,
    ]
    said = [run_command(*words) for words in (*looks, asks)]
    wrong = [text for text in said if not text.startswith(("answered", "refused: "))]
    return wrong[0] if wrong else said[-1]


@click.command(cls=Command)
@click.argument("engine", type=click.Path(path_type=Path))
def compare_layers(engine: Path) -> None:
    """Read what qwen-summarize reads of an engine: every sub-block's output, and every weight."""
    from qwen_engine.manifest import LAYERS_GRAPH_FILE
    from qwen_run.accuracy.both_sides import engine_layers
    from qwen_run.engine_files.weights import EngineWeights
    from qwen_run.runtime.engine import Engine

    loaded = Engine.load(engine, 1, graph=LAYERS_GRAPH_FILE, cache_bytes=4 << 20, float_activations=True)
    engine_layers(loaded, [1, 2, 3])
    weights = EngineWeights(engine)
    for name in weights.parts:
        for _ in weights.pieces(name):
            pass


if __name__ == "__main__":
    main(__doc__, prepare, make)
