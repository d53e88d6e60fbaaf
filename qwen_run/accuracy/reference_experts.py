"""Mixtures of experts in transformers: weights, one expert at a time, and inputs rounded as an engine rounds them.

transformers has a linear of all experts of a layer as one parameter of three dimensions. Engines and checkpoints name
those of each expert. Everything here is of torch, which is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qwen_engine.manifest import Quantization
from qwen_run.accuracy.checkpoint_weights import STACKED
from qwen_run.accuracy.recipe import Recipe

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")

Round = Callable[[Any], Any]


def place_of(model: Any, name: str) -> tuple[str, Any]:
    """The parameter of ``model`` that holds the weight ``name``, and what of it that is."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name, model.get_parameter(name).data
    stacked = next(one for one, linears in STACKED.items() if match[3] in linears)
    owner, linears = f"{match[1]}.{stacked}", STACKED[stacked]
    expert = model.get_parameter(owner).data[int(match[2])]
    rows = len(expert) // len(linears)
    first = linears.index(match[3]) * rows
    return owner, expert[first : first + rows]


def expert_linears(name: str, parameter: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """The linears of each expert in a parameter of three dimensions: their names, and their shapes."""
    experts, _, stacked = name.rpartition(".")
    count, rows, columns = parameter.shape
    for expert in range(count):
        for linear in STACKED[stacked]:
            yield f"{experts}.{expert}.{linear}", (rows // len(STACKED[stacked]), columns)


def round_experts(torch: Any, model: Any, recipe: Recipe, rounding: Callable[[Quantization], Round]) -> None:
    """Have the experts of ``model`` round what they multiply as ``recipe`` says; ``rounding`` makes what rounds."""
    for name, module in model.named_modules():
        if (gate_up := recipe.quantizations.get(f"{name}.0.gate_proj")) is not None:
            down = recipe.quantizations[f"{name}.0.down_proj"]
            module.forward = _experts(torch, module, rounding(gate_up), rounding(down))


def _experts(torch: Any, module: Any, of_input: Round, of_gated: Round) -> Callable[[Any, Any, Any], Any]:
    """What computes the experts ``module``: the sum of each token's, in the order of their weights."""

    def forward(hidden: Any, chosen: Any, weights: Any) -> Any:
        rounded, products = of_input(hidden), torch.zeros(*chosen.shape, hidden.shape[-1])
        for expert in chosen.unique().tolist():
            tokens, slots = torch.where(chosen == expert)
            gate, up = torch.nn.functional.linear(rounded[tokens], module.gate_up_proj[expert]).chunk(2, -1)
            gated = of_gated(torch.nn.functional.silu(gate) * up)
            products[tokens, slots] = torch.nn.functional.linear(gated, module.down_proj[expert])
        return (products * weights[..., None]).sum(1)

    return forward


def routed_as(torch: Any, router: Any, output: tuple[Any, Any, Any], chosen: np.ndarray) -> tuple[Any, Any, Any]:
    """The ``output`` of a router that chose the experts ``chosen`` (T, k)."""
    logits, _, _ = output
    experts = torch.tensor(chosen.astype(np.int64))
    weights = torch.softmax(logits, -1, dtype=torch.float).gather(-1, experts)
    return logits, weights / weights.sum(-1, keepdim=True) if router.norm_topk_prob else weights, experts
