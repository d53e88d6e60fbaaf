"""Random inputs of qwen::MoE, and sessions of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from cases.linear import ELEMENT_TYPES, draw_weight
from cases.plugin_session import make_model, make_session
from qwen_plugin.reference_moe import MoEAttributes, MoEOutputs

OPTIONAL = ("norm_weight", "residual", "shared", "shared_gate")
INPUTS = ("x", "router", "gate_up", "down", *OPTIONAL)
OUTPUTS = tuple(field.name for field in dataclasses.fields(MoEOutputs))
NO_SCHEME = dict.fromkeys(
    (f"{name}_{kind}" for name in ("gate_up", "down") for kind in ("group_size", "symmetric", "precision")), None
) | {"gate_up_activation_scales": None, "down_activation_scales": None}


def new_session(
    attributes: dict[str, object], types: dict[str, int], outputs: Sequence[str] = OUTPUTS, isa: str = "", n: int = 1
) -> ort.InferenceSession:
    """A session of one node with the inputs in ``types`` (element types); "" leaves an output out."""
    names = list(INPUTS)
    while names[-1] not in types:
        names.pop()
    kinds = {name: TensorProto.INT32 if name == "experts" else TensorProto.FLOAT for name in outputs if name}
    model = make_model(
        [helper.make_node("MoE", [n if n in types else "" for n in names], outputs, domain="qwen", **attributes)],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
    )
    return make_session(model, isa, n)


@cache
def cached_session(
    attributes: MoEAttributes, types: tuple[tuple[str, int], ...], isa: str, threads: int
) -> ort.InferenceSession:
    return new_session(attributes.of_node(), dict(types), OUTPUTS, isa, threads)


def run(a: MoEAttributes, feeds: dict[str, np.ndarray], isa: str = "", threads: int = 1) -> MoEOutputs:
    """All outputs."""
    types = tuple((name, ELEMENT_TYPES[x.dtype]) for name, x in feeds.items())
    return MoEOutputs(*cached_session(a, types, isa, threads).run(None, feeds))


def draw_experts(a: MoEAttributes, name: str, rng: np.random.Generator) -> np.ndarray:
    """The weights of all experts, as the operator reads them."""
    linear = a.linear(name)
    if linear is not None:
        return np.concatenate([draw_weight(linear, rng) for _ in range(a.num_experts)])
    rows, columns = 2 * a.intermediate_size, a.hidden_size
    if name == "down":
        rows, columns = a.hidden_size, a.intermediate_size
    return (rng.standard_normal((a.num_experts * rows, columns)) * 0.05).astype(np.float32)


def draw_feeds(a: MoEAttributes, tokens: int, optional: Sequence[str] = (), seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    every = {
        "x": rng.standard_normal((tokens, a.hidden_size)).astype(np.float32),
        "router": (rng.standard_normal((a.num_experts, a.hidden_size)) / a.hidden_size**0.5).astype(np.float32),
        "gate_up": draw_experts(a, "gate_up", rng),
        "down": draw_experts(a, "down", rng),
        "norm_weight": rng.standard_normal(a.hidden_size).astype(np.float32),
        "residual": rng.standard_normal((tokens, a.hidden_size)).astype(np.float32),
        "shared": rng.standard_normal((tokens, a.hidden_size)).astype(np.float32),
        "shared_gate": (rng.standard_normal(a.hidden_size) * 0.1).astype(np.float32),
    }
    wanted = {*optional, *(["shared"] if "shared_gate" in optional else [])}
    return {name: x for name, x in every.items() if name in wanted or name not in OPTIONAL}


def rows_of(feeds: dict[str, np.ndarray], chosen: np.ndarray | slice) -> dict[str, np.ndarray]:
    """The same weights with some of the tokens."""
    return feeds | {name: feeds[name][chosen] for name in ("x", "residual", "shared") if name in feeds}
