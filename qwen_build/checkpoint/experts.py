"""Mixtures of experts: what ``config.json`` says of them, and both ways in which files hold their weights.

Most checkpoints have the linears of each expert by themselves. Others have those of a layer in two tensors of three
dimensions; they are read as if each expert had its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qwen_build.architectures import Architecture
from qwen_build.checkpoint.config_keys import MOST_LAYERS
from qwen_build.checkpoint.fields import MOST, boolean, integer
from qwen_build.checkpoint.safetensors_file import ELEMENTS, TensorInfo
from qwen_engine.errors import CheckpointError, UnsupportedModel
from qwen_engine.sizes import ExpertSizes
from qwen_plugin.layout import PANEL

OTHER_COUNT = "num_local_experts"  # which transformers 5 writes for num_experts

# the last part of a tensor of three dimensions -> the linears of an expert that share its rows
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def read_experts(hf: Mapping[str, Any], architecture: Architecture) -> ExpertSizes | None:
    """The sizes of the experts; None where the family or this config has none.

    Args:
        hf: the config, with the defaults of its family.

    Raises:
        CheckpointError: a field is no number that it could be.
    """
    if architecture.sparse is None or not (count := count_experts(hf)):
        return None
    chosen = integer(hf, "num_experts_per_tok")
    if chosen > count:
        raise CheckpointError(f"config.json: num_experts_per_tok is {chosen}, expected at most the {count} experts")
    shared = "shared_expert_intermediate_size"
    return ExpertSizes(
        num_experts=count,
        num_experts_per_tok=chosen,
        moe_intermediate_size=integer(hf, "moe_intermediate_size"),
        shared_expert_intermediate_size=integer(hf, shared) if shared in architecture.defaults else 0,
        norm_topk_prob=boolean(hf, "norm_topk_prob"),
    )


def count_experts(hf: Mapping[str, Any]) -> int:
    """Experts of a layer; 0: all layers are dense."""
    count = hf.get("num_experts")
    if type(count) is not int or not 0 <= count <= MOST:
        raise CheckpointError(f"config.json: num_experts is {count!r}, expected a number of experts")
    return count


def with_one_count(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """``hf`` with its number of experts by the name ``num_experts``, whichever of the two it has.

    Raises:
        CheckpointError: it has both, and they differ.
    """
    count = hf.get(OTHER_COUNT)
    if count is None:
        return hf
    if hf.get("num_experts") not in (None, count):
        raise CheckpointError(
            f"config.json: num_experts is {hf['num_experts']!r} and {OTHER_COUNT} {count!r}; keep the right one"
        )
    return {key: value for key, value in hf.items() if key != OTHER_COUNT} | {"num_experts": count}


def sparse_layers(hf: Mapping[str, Any], sparse: str, kinds: Sequence[str], count: int) -> tuple[str, ...]:
    """The kinds of ``count`` layers, of which ``kinds`` by turns are those without experts, ``sparse`` those with.

    Raises:
        CheckpointError: ``mlp_only_layers`` is no list of numbers, or ``decoder_sparse_step`` no step.
    """
    step, dense = integer(hf, "decoder_sparse_step"), hf.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise CheckpointError(f"config.json: mlp_only_layers is {dense!r}, expected a list of numbers of layers")
    if not count_experts(hf):
        return tuple(kinds)
    if step == 1 and not dense:
        return (sparse,)
    if count > MOST_LAYERS:
        raise UnsupportedModel(f"config.json: num_hidden_layers is {count}, expected at most {MOST_LAYERS}")
    without = frozenset(dense)
    return tuple(
        kinds[layer % len(kinds)] if layer in without or (layer + 1) % step else sparse for layer in range(count)
    )


def check_experts(sizes: ExpertSizes, hidden_size: int) -> None:
    """Raise unless whole panels hold the rows of each expert, see ``qwen_plugin/layout.py``."""
    for key, rows, size in (
        ("hidden_size", hidden_size, PANEL),
        ("moe_intermediate_size", sizes.moe_intermediate_size, PANEL // 2),
    ):
        if rows % size:
            raise UnsupportedModel(f"{key} {rows} of a mixture of experts is not a multiple of {size}")


def split_experts(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """``tensors``, those of three dimensions with the weights of all experts as one for each linear of each expert.

    Raises:
        CheckpointError: its rows are not those of as many linears.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        match = _STACKED.fullmatch(name)
        if match is None or len(info.shape) != 3:
            found[name] = info
            continue
        linears = STACKED[match[2]]
        experts, rows, columns = info.shape
        if rows % len(linears):
            raise CheckpointError(f"{name} has {rows} rows for each expert, expected those of {' and '.join(linears)}")
        shape = (rows // len(linears), columns)
        size = math.prod(shape) * np.dtype(ELEMENTS[info.dtype]).itemsize if info.dtype in ELEMENTS else 0
        for number in range(experts * len(linears)):
            expert, linear = divmod(number, len(linears))
            own = f"{match[1]}.{expert}.{linears[linear]}.weight"
            if own in tensors:
                raise CheckpointError(f"the checkpoint has both {name} and {own}; remove one")
            found[own] = replace(info, name=own, shape=shape, offset=info.offset + number * size, size_bytes=size)
    return found
