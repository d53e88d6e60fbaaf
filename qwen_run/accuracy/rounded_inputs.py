"""Inputs of products rounded as an engine rounds them, in torch, which is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qwen_engine.manifest import Quantization
from qwen_plugin.layout import BLOCK_COLUMNS
from qwen_run.engine_files.weights import StoredLinear

# precision of a product's input -> the largest of the integers it is rounded to: one byte, two bytes
ROUNDING_STEPS = {"int8": 127, "int8x2": 127 * 256}


def rounding(torch: Any, quantization: Quantization, linear: StoredLinear | None = None) -> Callable[[Any], Any]:
    """What rounds an input as ``quantization`` says, whose static scale ``linear`` has."""
    most = ROUNDING_STEPS[quantization.activations]

    def rounded(x: Any) -> Any:
        if quantization.activation_scales == "static":
            assert linear is not None
            return round_statically(x, torch.tensor(linear.tensors["input_scale"]), most)
        sizes = {"block": BLOCK_COLUMNS, "token": x.shape[-1]}
        group_size = sizes.get(quantization.activation_scales, quantization.group_size)
        return round_activations(torch, x, group_size, most)

    return rounded


def rounding_hook(torch: Any, quantization: Quantization, linear: StoredLinear) -> Any:
    """What gives a module of transformers its input rounded, its columns in the order that ``linear`` stores."""
    rounded = rounding(torch, quantization, linear)
    if linear.permutation is None:
        return lambda module, arguments: (rounded(arguments[0]),)
    stored, restored = (torch.tensor(order) for order in (linear.permutation, np.argsort(linear.permutation)))
    return lambda module, arguments: (rounded(arguments[0][..., stored])[..., restored],)


def round_activations(torch: Any, x: Any, group_size: int, most: int) -> Any:
    """``x`` as ``QuantLinear`` and ``MatMulNBits`` (``accuracy_level`` 4) read it: a scale for each group of a row.

    ``q = round(x * (most / max|x|))`` with ties to even, in float32; the value is ``q * (max|x| / most)``. That gives
    the operators' numbers for every tie; dividing by the scale, or rounding ties away from 0, does not.

    Args:
        x: tensor (..., features) float32; the last group may be shorter.
        most: the largest q, see ``ROUNDING_STEPS``.
    """
    features = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, -features % group_size)).unflatten(-1, (-1, group_size))
    largest = groups.abs().amax(-1, keepdim=True)
    steps = torch.tensor(float(most))  # a tensor: torch would multiply the number with a rounded reciprocal
    inverse = torch.where(largest > 1e-36, steps / largest, 0)  # nothing, or too little for a reciprocal, is 0
    return ((groups * inverse).round() * (largest / steps)).flatten(-2)[..., :features]


def round_statically(x: Any, input_scale: Any, most: int) -> Any:
    """``x`` as ``QuantLinear`` reads it with static activation scales: 127 times ``input_scale`` becomes ``most``."""
    steps = most / 127
    return (x * (steps / input_scale)).clamp(-most, most).round() * (input_scale / steps)
