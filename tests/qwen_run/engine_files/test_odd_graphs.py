"""Graphs whose bytes are damaged: every reader of ONNX answers or refuses in one line, and nothing else."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fuzz.mutations import mutate_bytes
from qwen_engine.errors import EngineError
from qwen_run.engine_files.float_activations import with_float_activations
from qwen_run.engine_files.onnx_file import read_graph
from qwen_run.engine_files.weights import EngineWeights

ROUNDS = 150


def mutations(content: bytes, seed: int) -> Iterator[tuple[bytes, str]]:
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        yield mutate_bytes(content, rng)


def all_weights(engine: Path) -> None:
    weights = EngineWeights(engine)
    for name in weights.parts:
        for _, values in weights.pieces(name):
            assert values.dtype == "float32"


READERS: dict[str, Callable[[Path], object]] = {
    "operators": lambda engine: read_graph(engine / "model.onnx"),
    "precision": lambda engine: with_float_activations((engine / "model.onnx").read_bytes()),
    "weights": all_weights,
}


@pytest.fixture(scope="module", params=["model.onnx", "layers.onnx"])
def engine(
    request: pytest.FixtureRequest, tiny_checkpoint: Any, build_engine: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An engine whose ``model.onnx`` is either of its graphs."""
    built = build_engine(tiny_checkpoint("qwen2").path, quant="int8")
    made = Path(shutil.copytree(built, tmp_path_factory.mktemp("odd") / "engine"))
    shutil.copyfile(built / request.param, made / "model.onnx")
    return made


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_graph_is_read_or_refused_in_one_line(engine: Path, reader: str) -> None:
    path, read = engine / "model.onnx", READERS[reader]
    sound = path.read_bytes()
    read(engine)
    refused, wrong = 0, []
    for content, what in mutations(sound, seed=33):
        path.write_bytes(content)
        try:
            read(engine)
        except EngineError as error:
            refused += 1
            wrong += [str(error)] if "\n" in str(error) else []
        except Exception as error:  # is what the test looks for
            wrong.append(f"{type(error).__name__} after {what}: {error}")
    path.write_bytes(sound)
    assert wrong == []
    assert refused > ROUNDS / 10
