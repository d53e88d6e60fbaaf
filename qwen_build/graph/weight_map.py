"""From the names in a Hugging Face checkpoint to the weights of the graph.

A graph weight has the name it has in the checkpoint. The only exceptions are the fused weights that
``architecture.py`` describes, and the tied head. Where the parts of a fused weight are not stored alike, the
graph has the parts, by their own names.
"""

from __future__ import annotations

import shlex
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.shards import some
from qwen_build.checkpoint.stored import Shape
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.graph.architecture import LAYER, module_parts
from qwen_build.graph.leftovers import pass_over
from qwen_build.quantization.grid import Rounded, joined
from qwen_engine.errors import CheckpointError, WeightMismatch
from qwen_engine.graph_io import EMBEDDING, HEAD
from qwen_engine.tasks import GENERATE

# Rows of a tied head that are compared with the embedding at a time.
_COMPARED_ROWS = 4096
_NAMED = 100  # names that a message has: those of experts may be thousands


@dataclass(frozen=True)
class Source:
    """The weights of the checkpoint whose rows, one weight after the other, are the rows of a graph weight.

    Attributes:
        packed: whether all of them are on their grid already, see :class:`PackedWeight`.
    """

    shapes: tuple[tuple[str, Shape], ...]
    packed: bool = False

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray | Rounded:
        """Rows [start, stop) of the graph weight: on the grid where ``packed``, else float32."""
        ranges = row_ranges(self.shapes, start, stop)
        if self.packed:
            return joined([checkpoint.packed[name].rounded(*rows) for name, *rows in ranges], np.concatenate)
        pieces = [checkpoint.read(*rows) for rows in ranges]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class ChosenRows:
    """Some ``rows`` of one weight of the checkpoint."""

    shapes: tuple[tuple[str, Shape], ...]
    rows: tuple[int, ...]
    packed: bool = False

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the graph weight, float32."""
        ((name, _),) = self.shapes
        return np.concatenate([checkpoint.read(name, row, row + 1) for row in self.rows[start:stop]])


AnySource = Source | ChosenRows


def row_ranges(shapes: Iterable[tuple[str, Shape]], start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """Which rows of which of the tensors ``shapes``, one after the other, are rows [start, stop) of them all.

    >>> list(row_ranges([("q", (4,)), ("k", (2,)), ("v", (2,))], 3, 6))
    [('q', 3, 4), ('k', 0, 2)]
    """
    shapes = tuple(shapes)
    firsts = _firsts(shapes)
    for number in range(bisect_right(firsts, start) - 1, len(shapes)):
        first, (name, (rows, *_)) = firsts[number], shapes[number]
        if first >= stop:
            return
        yield name, max(start - first, 0), min(stop - first, rows)


@lru_cache(maxsize=64)
def _firsts(shapes: tuple[tuple[str, Shape], ...]) -> list[int]:
    """The first row of each of the tensors ``shapes`` among those of them all."""
    return list(accumulate((rows for _, (rows, *_) in shapes), initial=0))


def source(name: str, shape: Shape, config: ModelConfig) -> AnySource:
    """Where the graph weight ``name`` of ``shape`` comes from: ``qkv_proj.bias`` from three biases, and so on."""
    module, _, kind = name.rpartition(".")
    if module == HEAD and config.tie_word_embeddings:
        module = EMBEDDING
    if name == f"{HEAD}.weight" and (rows := config.ending.rows):
        return ChosenRows(((f"{module}.{kind}", (config.vocab_size, *shape[1:])),), rows)
    parts = module_parts(module, shape[0], config)
    return Source(tuple((f"{part.name}.{kind}", (part.rows, *shape[1:])) for part in parts.all))


class MappedWeights(NamedTuple):
    """The source of each graph weight, and a sentence about each kind of tensor that is left out."""

    sources: dict[str, AnySource]
    notes: tuple[str, ...]


def map_weights(
    shapes: Mapping[str, Shape], checkpoint: Checkpoint, config: ModelConfig, ignored: Iterable[str] = ()
) -> MappedWeights:
    """Find the source of each graph weight; graph and checkpoint must agree both ways.

    Args:
        shapes: graph weight name -> the (out_features, in_features) or (size,) the graph declares for it.
        ignored: patterns of tensors that are left out.

    Raises:
        WeightMismatch: tensors are missing, unused, or of another shape; all of them in one message.
        CheckpointError: a tensor is stored in a way that cannot be read.
        BuildError: a pattern matches nothing, or what is needed.
    """
    floats = {name: source(name, shape, config) for name, shape in shapes.items()}
    plan = {
        name: mapped
        if isinstance(mapped, ChosenRows)
        else replace(mapped, packed=all(part in checkpoint.packed for part, _ in mapped.shapes))
        for name, mapped in floats.items()
    }
    needed = dict(pair for mapped in plan.values() for pair in mapped.shapes)
    passed, notes = pass_over(needed, checkpoint, ignored, without_head=config.task not in (GENERATE, "score"))
    present = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if name not in passed}
    stored_head = present.pop(f"{HEAD}.weight", None) if config.tie_word_embeddings else None
    checkpoint.check_readable(needed)
    check_agreement(needed, present, config.missing)
    if stored_head is not None:
        if checkpoint.is_packed(HEAD):
            raise CheckpointError(
                "config.json ties the head to the embedding, but the checkpoint has a packed lm_head of its own; "
                "set tie_word_embeddings to false"
            )
        checkpoint.check_readable([f"{HEAD}.weight"])
        check_tied(checkpoint)
    return MappedWeights(plan, notes)


def described_weights(
    shapes: Mapping[str, Shape], checkpoint: Checkpoint, config: ModelConfig, ignored: Iterable[str] = ()
) -> MappedWeights:
    """As :func:`map_weights`, where config.json alone is there: the sources that the weights would have."""
    if missing := config.missing:
        raise CheckpointError(missing)
    note = "config.json alone was read: what the weights would be was not compared with it."
    return MappedWeights({name: source(name, shape, config) for name, shape in shapes.items()}, (note,))


def check_layers(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Refuse a config with more layers than the checkpoint: before a graph of what may be any number is made.

    Raises:
        WeightMismatch: names the first layer that is missing.
    """
    present = {int(match[1]) for name in checkpoint.tensors if (match := LAYER.match(name))}
    missing = next(layer for layer in range(len(present) + 1) if layer not in present)
    if missing < config.num_hidden_layers:
        found = f"num_hidden_layers is {config.num_hidden_layers}, the checkpoint lacks model.layers.{missing}"
        raise WeightMismatch(f"{found}; {config.missing}" if config.missing else f"config.json: {found}")


def check_agreement(needed: Mapping[str, Shape], present: Mapping[str, Shape], why: str = "") -> None:
    """Raise :class:`WeightMismatch` unless names and shapes are the same on both sides; ``why`` ends the message."""
    complaints = []
    if missing := sorted(needed.keys() - present.keys()):
        complaints.append(f"the checkpoint lacks {some(missing, _NAMED)}")
    if unused := sorted(present.keys() - needed.keys()):
        complaints.append(f"the graph has no place for {some(unused, _NAMED)}")
    unlike = [
        f"{name}: graph expects {needed[name]}, checkpoint has {present[name]}"
        for name in sorted(needed.keys() & present.keys())
        if needed[name] != present[name]
    ]
    complaints += unlike[:_NAMED]
    if not complaints:
        return
    if unused and not missing:
        complaints.append(
            f"what the model does without can be left out, as with --ignore-tensors {shlex.quote(unused[0])}"
        )
    raise WeightMismatch("; ".join([*complaints, *([why] if why else [])]))


def check_tied(checkpoint: Checkpoint) -> None:
    """A checkpoint that is tied by its config may store the head again, but not another one."""
    names = f"{EMBEDDING}.weight", f"{HEAD}.weight"
    embedding, head = (checkpoint.tensors[name] for name in names)
    equal = embedding.shape == head.shape and all(
        np.array_equal(checkpoint.read(names[0], row, stop), checkpoint.read(names[1], row, stop))
        for row in range(0, head.shape[0], _COMPARED_ROWS)
        for stop in [min(row + _COMPARED_ROWS, head.shape[0])]
    )
    if not equal:
        raise CheckpointError(
            "config.json ties the head to the embedding (tie_word_embeddings true), but its lm_head.weight "
            "differs from model.embed_tokens.weight; set tie_word_embeddings to false if the head is its own"
        )
