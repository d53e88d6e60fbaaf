"""What ``qwen::MoE`` computes, in NumPy: the readable definition for tests, step by step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_plugin.layout import PANEL, gated_places
from qwen_plugin.reference_linear import QuantLinearAttributes, dequantize, quantize_rows

Array = NDArray[Any]


@dataclass(frozen=True)
class MoEAttributes:
    """Attributes of the operator, by its own names.

    Those of ``gate_up_`` and ``down_`` are of the weights of that name, as those of ``qwen::QuantLinear``. With 32 bits
    rows are float32, and the node has none of the others.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    norm_topk_prob: int = 0
    gate_up_bits: int = 4
    gate_up_group_size: int | None = 32
    gate_up_symmetric: int | None = 1
    gate_up_precision: str | None = "int8"
    gate_up_activation_scales: str | None = "group"
    down_bits: int = 4
    down_group_size: int | None = 32
    down_symmetric: int | None = 1
    down_precision: str | None = "int8"
    down_activation_scales: str | None = "group"
    epsilon: float = 1e-6

    def of_node(self) -> dict[str, Any]:
        """What the node says."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def linear(self, name: str) -> QuantLinearAttributes | None:
        """One expert's product, ``gate_up`` or ``down``, as ``qwen::QuantLinear`` has it; None if it is of float32."""
        sizes: dict[str, Any] = {"N": 2 * self.intermediate_size, "K": self.hidden_size}
        if name == "down":
            sizes = {"N": self.hidden_size, "K": self.intermediate_size}
        stored = asdict(self)
        if stored[f"{name}_bits"] == 32:
            return None
        kinds = ("bits", "group_size", "symmetric", "precision", "activation_scales")
        return QuantLinearAttributes(**sizes, **{kind: stored[f"{name}_{kind}"] for kind in kinds})


@dataclass(frozen=True)
class MoEOutputs:
    """Outputs of the operator: y float64 (T, H), input float32 (T, H), experts int32 (T, k), weights float64 (T, k),
    gated float64 (T, k, I)."""

    y: Array
    input: Array
    experts: Array
    weights: Array
    gated: Array


def moe(
    attributes: MoEAttributes,
    x: Array,
    router: Array,
    gate_up: Array,
    down: Array,
    norm_weight: Array | None = None,
    residual: Array | None = None,
    shared: Array | None = None,
    shared_gate: Array | None = None,
) -> MoEOutputs:
    """A mixture of experts: each token's ``top_k`` likeliest of ``num_experts`` gated products, weighted.

    Args:
        x: float32 (T, H), finite.
        router: float32 (E, H).
        gate_up: uint8, the panels of E weights (2 I, H), expert after expert; of each 32 outputs of an expert the first
            16 are gates of the 16 behind them (``panels32-gated``). With 32 bits float32 (E * 2 I, H), of each expert
            first the rows of the gate.
        down: uint8, the panels of E weights (H, I), or float32 (E * H, I).
        norm_weight: (H), RMS norm of x before everything.
        residual: (T, H), added last.
        shared: (T, H), what an expert of all tokens has computed; the last term of the sum.
        shared_gate: (H), with ``shared`` alone: its weight is the sigmoid of the product with x.
    """
    a = attributes
    source = x.astype(np.float64)
    if norm_weight is not None:
        source = source / np.sqrt(np.mean(source**2, axis=-1, keepdims=True) + a.epsilon) * norm_weight
    product_input = source.astype(np.float32)
    experts, weights = route(a, product_input, router)
    gated = gated_products(a, product_input, experts, gate_up)
    y = weighted_sum(a, gated, experts, weights, down)
    if shared is not None:
        y = y + shared * (1 if shared_gate is None else shared_weight(product_input, shared_gate))
    return MoEOutputs(y if residual is None else y + residual, product_input, experts, weights, gated)


def route(attributes: MoEAttributes, x: Array, router: Array) -> tuple[Array, Array]:
    """The experts of every token int32 (T, k), the likeliest first and of equal ones the first, and their weights."""
    scores = x.astype(np.float64) @ router.T.astype(np.float64)
    odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities = odds / odds.sum(axis=-1, keepdims=True)
    experts = np.argsort(-probabilities, axis=-1, kind="stable")[:, : attributes.top_k]
    weights = np.take_along_axis(probabilities, experts, axis=-1)
    if attributes.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return experts.astype(np.int32), weights


def gated_products(attributes: MoEAttributes, x: Array, experts: Array, gate_up: Array) -> Array:
    """silu(gate x) * up x of every token and slot, float64 (T, k, I)."""
    a = attributes
    y = _products(a, "gate_up", x[:, None].repeat(a.top_k, axis=1), experts, gate_up)
    width = 2 * a.intermediate_size
    places = np.arange(width) if a.gate_up_bits == 32 else gated_places(0, width, width)
    gate, up = np.split(y[..., places], 2, axis=-1)
    gate = gate.clip(min=-88)
    return np.asarray(gate / (1 + np.exp(-gate)) * up)


def weighted_sum(attributes: MoEAttributes, gated: Array, experts: Array, weights: Array, down: Array) -> Array:
    """The products of ``gated`` (T, k, I) with their experts' weights, summed over the slots: float64 (T, H)."""
    products = _products(attributes, "down", gated.astype(np.float32), experts, down)
    return np.asarray(np.sum(products * weights[..., None], axis=1))


def shared_weight(x: Array, shared_gate: Array) -> Array:
    """The weight of the shared expert, float64 (T, 1)."""
    return np.asarray(1 / (1 + np.exp(-(x.astype(np.float64) @ shared_gate.astype(np.float64)))))[:, None]


def expert_weight(attributes: MoEAttributes, name: str, expert: int, stored: Array) -> Array:
    """One expert's weight, float32 (out_features, in_features), its outputs in the order they are stored in."""
    linear = attributes.linear(name)
    rows = len(stored) // attributes.num_experts
    own = stored[expert * rows : (expert + 1) * rows]
    if linear is None:
        return own
    assert rows * PANEL == linear.N
    return dequantize(own, linear)


def _products(attributes: MoEAttributes, name: str, x: Array, experts: Array, stored: Array) -> Array:
    """Each row of ``x`` (T, k, in_features) times the weight of its expert, float64 (T, k, out_features)."""
    linear = attributes.linear(name)
    rows = x.reshape(-1, x.shape[-1])
    seen = rows.astype(np.float64) if linear is None else quantize_rows(linear, rows)
    chosen = experts.reshape(-1)
    width = 2 * attributes.intermediate_size if name == "gate_up" else attributes.hidden_size
    y = np.zeros((len(rows), width))
    for expert in np.unique(chosen):
        own = chosen == expert
        y[own] = seen[own] @ expert_weight(attributes, name, int(expert), stored).T.astype(np.float64)
    return y.reshape(*experts.shape, width)
