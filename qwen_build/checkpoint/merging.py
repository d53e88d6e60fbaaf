"""Weights with LoRA adapters merged into them, in float32 and a slice of rows at a time.

A linear becomes W + s B A (arXiv 2106.09685, section 4.1). With DoRA each of its rows has the length that the adapter
says (arXiv 2402.09353, eq. 5); its direction is that of the base's weight with this adapter alone, as in peft.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_build.checkpoint.adapters import BIAS, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, TOKENS, A, Adapter, B
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.safetensors_file import Float32
from qwen_build.checkpoint.stored import FloatWeight, PackedWeight, Shape, StoredWeight
from qwen_engine.errors import CheckpointError, WeightMismatch
from qwen_engine.graph_io import EMBEDDING, HEAD

EMBEDDING_WEIGHT, HEAD_WEIGHT = f"{EMBEDDING}.weight", f"{HEAD}.weight"
RESIZED = (EMBEDDING_WEIGHT, HEAD_WEIGHT)  # of which an adapter may have more rows


@dataclass(frozen=True)
class LowRank:
    """What one adapter adds to one matrix: scale times B A.

    Attributes:
        a, b: names of the tensors (r, in_features) and (out_features, r).
        embedding: whether they are (r, tokens) and (features, r), and the matrix is (B A) transposed.
        magnitude: of DoRA, the length of each row; None: there is none.
    """

    adapter: Adapter
    a: str
    b: str
    scale: float
    embedding: bool
    magnitude: str | None = None

    def delta(self, start: int, stop: int) -> Float32:
        """Rows [start, stop)."""
        files = self.adapter.files
        if self.embedding:
            left, right = files.read_columns(self.a, start, stop).T, files.read(self.b).T
        else:
            left, right = files.read(self.b, start, stop), files.read(self.a)
        if len(left) == 1:  # a product of a vector is summed in another order
            left = np.repeat(left, 2, axis=0)
        return np.asarray((left @ right)[: stop - start] * np.float32(self.scale))


@dataclass(frozen=True)
class MergedWeight(StoredWeight):
    """``base`` with what adapters add, one after the other."""

    name: str
    shape: Shape
    dtype: str
    base: StoredWeight
    changes: tuple[LowRank, ...]

    def read(self, start: int, stop: int) -> Float32:
        weight = base = self.base.read(start, stop)
        for change in self.changes:
            delta = change.delta(start, stop)
            merged = weight + delta
            if change.magnitude is not None:
                lengths = np.linalg.norm(merged if weight is base else base + delta, axis=1)
                merged = (change.adapter.files.read(change.magnitude, start, stop) / lengths)[:, None] * merged
            weight = merged
        if not np.isfinite(weight).all():
            raise CheckpointError(f"{self.name}: with its adapters it has values that are not finite")
        return weight


@dataclass(frozen=True)
class MergedBias(StoredWeight):
    """A bias, and scale times what an adapter adds."""

    name: str
    shape: Shape
    dtype: str
    base: StoredWeight
    adapter: Adapter
    added: str
    scale: float

    def read(self, start: int, stop: int) -> Float32:
        return self.base.read(start, stop) + self.adapter.files.read(self.added, start, stop) * np.float32(self.scale)


@dataclass(frozen=True)
class TokensWeight(StoredWeight):
    """An embedding or head of which an adapter has some rows anew."""

    name: str
    shape: Shape
    dtype: str
    base: StoredWeight
    adapter: Adapter
    rows: str
    tokens: tuple[int, ...]

    def read(self, start: int, stop: int) -> Float32:
        weight, rows = self.base.read(start, stop), self.adapter.files.read(self.rows)
        for row, token in zip(rows, self.tokens, strict=True):
            if start <= token < stop:
                weight[token - start] = row
        return weight


def merged(
    tensors: Mapping[str, StoredWeight], adapters: Sequence[Adapter], tied: bool
) -> tuple[dict[str, StoredWeight], tuple[str, ...]]:
    """``tensors`` with all ``adapters``, and a sentence on what is otherwise than it looks.

    Args:
        tied: whether the base's head is its embedding. Where an adapter changes one of them, they are two.

    Raises:
        WeightMismatch: an adapter does not fit; all that is wrong with it in one message.
    """
    found, notes = dict(tensors), []
    if tied and any(_parts_tied(adapter) for adapter in adapters):
        found[HEAD_WEIGHT] = found[EMBEDDING_WEIGHT]
        notes.append("an adapter changes embedding or head alone, which the base model has as one: they become two.")
    for adapter in adapters:
        faults = [*_faults(found, adapter), *_missing_targets(found, adapter)]
        if not faults:
            found, faults = _applied(found, adapter)
        if faults:
            raise WeightMismatch(
                f"the adapter {adapter.directory} does not fit: {'; '.join(faults)}; it was trained on {adapter.base}, "
                "give that one as the checkpoint, in floats"
            )
    if EMBEDDING_WEIGHT in tensors and (rows := found[EMBEDDING_WEIGHT].shape[0]) != tensors[EMBEDDING_WEIGHT].shape[0]:
        notes.append(
            f"an adapter resizes the vocabulary to {rows} tokens, and the tokenizer stays the checkpoint's; build from "
            "a copy of the checkpoint with the tokenizer's files of the adapter where it has new tokens."
        )
    return found, tuple(notes)


def adapted(config: ModelConfig, tensors: Mapping[str, StoredWeight], adapters: Sequence[Adapter]) -> ModelConfig:
    """``config`` of the merged model: adapters may resize the vocabulary, or untie the head."""
    if not adapters or EMBEDDING_WEIGHT not in tensors:
        return config
    tied = config.tie_word_embeddings and not any(_parts_tied(adapter) for adapter in adapters)
    return dataclasses.replace(config, vocab_size=tensors[EMBEDDING_WEIGHT].shape[0], tie_word_embeddings=tied)


def _parts_tied(adapter: Adapter) -> bool:
    """Whether embedding and head differ after ``adapter``, if they were one before."""
    modules = (EMBEDDING, HEAD)
    changed = {name for name in modules if {A, EMBEDDING_A} & adapter.parts.get(name, {}).keys()}
    changed |= {name for name in modules if f"{name}.weight" in adapter.replaced}
    return bool(changed) and not (bool(adapter.config.get("ensure_weight_tying")) and len(changed) == 1)


def _faults(tensors: Mapping[str, StoredWeight], adapter: Adapter) -> Iterator[str]:
    """What of the adapter has no place among ``tensors``, or another shape."""
    for name, stored in adapter.replaced.items():
        shape = adapter.files.tensors[stored].shape
        if name not in tensors:
            yield f"the model has no {name}"
        elif shape[1:] != tensors[name].shape[1:] or (
            shape != tensors[name].shape and name not in (EMBEDDING_WEIGHT, HEAD_WEIGHT)
        ):
            yield f"{name} is {shape}, the model's is {tensors[name].shape}"
        if adapter.weight != 1:
            yield f"{name} is a whole weight, which --lora DIR=WEIGHT cannot weigh"
    for module, parts in adapter.parts.items():
        weight = tensors.get(f"{module}.weight")
        if weight is None or len(weight.shape) != 2:
            yield f"the model has no linear {module}"
        elif isinstance(weight, PackedWeight):
            yield f"{module} is quantised already ({weight.dtype}), and nothing can be merged into it"
        else:
            yield from _part_faults(tensors, adapter, module, parts)


def _part_faults(
    tensors: Mapping[str, StoredWeight], adapter: Adapter, module: str, parts: Mapping[str, str]
) -> Iterator[str]:
    shapes = {part: adapter.files.tensors[name].shape for part, name in parts.items()}
    rows, columns = tensors[f"{module}.weight"].shape
    if replaced := adapter.replaced.get(f"{module}.weight"):
        rows = adapter.files.tensors[replaced].shape[0]
    rank = adapter.rank(module)
    expected = {
        A: (rank, columns),
        B: (rows, rank),
        EMBEDDING_A: (rank, rows),
        EMBEDDING_B: (columns, rank),
        MAGNITUDE: (rows,),
        BIAS: (rows,),
        TOKENS: (len(_tokens(adapter, module)), columns),
    }
    for part, shape in shapes.items():
        if shape != expected[part]:
            yield f"{part} of {module} is {shape}, expected {expected[part]}"
    for one, other in ((A, B), (EMBEDDING_A, EMBEDDING_B)):
        if (one in parts) != (other in parts):
            yield f"{module} has {one if one in parts else other} and no {other if one in parts else one}"
    if BIAS in parts and f"{module}.bias" not in tensors:
        yield f"{module} has no bias in the model"
    if MAGNITUDE in parts and A not in parts:
        yield f"{module} has a magnitude (DoRA) without a linear"
    if any(not 0 <= token < rows for token in _tokens(adapter, module)) and TOKENS in parts:
        yield f"trainable_token_indices of {module} are beyond its {rows} tokens"


def _applied(tensors: Mapping[str, StoredWeight], adapter: Adapter) -> tuple[dict[str, StoredWeight], list[str]]:
    """``tensors`` with what ``adapter``, which fits, makes of them."""
    found = dict(tensors)
    for name, stored in adapter.replaced.items():
        info = adapter.files.tensors[stored]
        found[name] = FloatWeight(stored, info.shape, info.dtype, adapter.files)
    for module, parts in adapter.parts.items():
        name = f"{module}.weight"
        base, scale = found[name], adapter.scale(module)
        if TOKENS in parts:
            tokens = _tokens(adapter, module)
            base = TokensWeight(name, base.shape, base.dtype, base, adapter, parts[TOKENS], tokens)
        if A in parts or EMBEDDING_A in parts:
            embedding = EMBEDDING_A in parts
            a, b = (parts[EMBEDDING_A], parts[EMBEDDING_B]) if embedding else (parts[A], parts[B])
            change = LowRank(adapter, a, b, scale, embedding, parts.get(MAGNITUDE))
            before = base.changes if isinstance(base, MergedWeight) else ()
            inner = base.base if isinstance(base, MergedWeight) else base
            base = MergedWeight(name, base.shape, base.dtype, inner, (*before, change))
        found[name] = base
        if BIAS in parts:
            bias = found[f"{module}.bias"]
            found[bias.name] = MergedBias(bias.name, bias.shape, bias.dtype, bias, adapter, parts[BIAS], scale)
    sizes = {name: found[name].shape[0] for name in (EMBEDDING_WEIGHT, HEAD_WEIGHT) if name in found}
    if len(set(sizes.values())) > 1:
        return found, [f"embedding and head have {' and '.join(map(str, sizes.values()))} tokens"]
    return found, []


def _tokens(adapter: Adapter, module: str) -> tuple[int, ...]:
    """The tokens whose rows ``adapter`` has anew, in the order that it has them."""
    found: Any = adapter.config.get("trainable_token_indices") or []
    if isinstance(found, dict):
        found = next((found[key] for key in found if module == key or module.endswith(f".{key}")), [])
    if not isinstance(found, list) or not all(type(token) is int for token in found):
        raise CheckpointError(f"{adapter.paths[0]}: trainable_token_indices is {found!r}, expected lists of token ids")
    return tuple(found)


def _missing_targets(tensors: Mapping[str, StoredWeight], adapter: Adapter) -> Iterator[str]:
    """Targets of the config that the model lacks, or that the adapter has nothing of."""
    targets = adapter.config.get("target_modules") or []
    if isinstance(targets, str):
        return  # a pattern, which may match what it was not meant for
    modules = [name.removesuffix(".weight") for name, weight in tensors.items() if len(weight.shape) == 2]
    layers = adapter.config.get("layers_to_transform")
    for target in targets:
        named = [module for module in modules if module == target or module.endswith(f".{target}")]
        if not named:
            yield f"the model has no module {target}, which target_modules names"
        elif layers is None and not adapter.config.get("exclude_modules"):
            lacking = [module for module in named if module not in adapter.parts]
            if lacking:
                yield f"{adapter.paths[1].name} has nothing of {lacking[0]}" + (
                    f" and {len(lacking) - 1} others" if lacking[1:] else ""
                )
