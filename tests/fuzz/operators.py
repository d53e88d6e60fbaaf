"""Random calls of the operators: wrong shapes, lengths and attributes are refused, and none ends the process.

Without a sanitizer a read beyond an array may pass unseen: ``make sanitize`` runs this under one.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from cases.plugin_session import ISAS, make_model, make_session
from fuzz.rounds import Attempt, main
from qwen_plugin.layout import panel_bytes

INPUTS = {
    "QuantLinear": ("x", "weight", "bias", "norm_weight", "residual", "permutation", "input_scale"),
    "QuantEmbedding": ("token_ids", "weight"),
    "MoE": ("x", "router", "gate_up", "down", "norm_weight", "residual", "shared", "shared_gate"),
    "PagedAttention": (
        *("query", "key", "value", "key_cache", "value_cache", "cumulative_lengths", "past_lengths", "block_table"),
        *("cos_cache", "sin_cache", "slot_mapping", "head_sink", "q_norm_weight", "k_norm_weight"),
        *("key_scale", "value_scale"),
    ),
}  # fmt: skip
TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}
EDGES = (0, 1, -1, 31, 32, 33, 255, 256, 2**15, 2**30, 2**31 - 1, -(2**31))
CALLS = 25  # a round: a child process costs more than a call
Call = tuple[str, dict[str, Any], dict[str, np.ndarray]]


def floats(rng: random.Random, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    numbers = np.random.default_rng(rng.randrange(2**32))
    if dtype == "int8":
        return numbers.integers(-128, 128, shape).astype(np.int8)
    array = (numbers.standard_normal(shape) * rng.choice([1e-30, 1e-3, 1, 1, 50, 1e4])).astype(dtype)
    if rng.random() < 0.1 and array.size:
        array.reshape(-1)[numbers.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf])
    return array


def random_weight(rng: random.Random, a: dict[str, Any], blocks: bool) -> np.ndarray:
    """Panels of any bytes."""
    size = panel_bytes(a["K"], a["bits"], a["group_size"], bool(a["symmetric"]), blocks)
    return np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (-(-a["N"] // 32), size)).astype(np.uint8)


def random_linear(rng: random.Random) -> Call:
    a: dict[str, Any] = {"N": rng.choice([1, 31, 32, 33, 96, 320]), "K": rng.choice([1, 4, 31, 32, 96, 128, 129, 300])}
    a |= {"bits": rng.choice([4, 5, 6, 8]), "group_size": rng.choice([32, 64, 128]), "symmetric": rng.choice([0, 1])}
    a |= {"precision": rng.choice(["int8", "int8x2", "float32"]), "activation_scales": rng.choice(["group", "token"])}
    if a["bits"] < 8 and a["group_size"] < 128 and rng.random() < 0.5:
        a["activation_scales"] = "block"
    rows = rng.choice([0, 1, 2, 3, 5, 8, 9, 17, 40])
    if a["N"] % 32 == 0 and rng.random() < 0.3:
        a["swiglu"] = 1
    feeds = {
        "x": floats(rng, (rows, a["K"])),
        "weight": random_weight(rng, a, a["activation_scales"] == "block"),
        "bias": floats(rng, (a["N"],)),
        "norm_weight": floats(rng, (a["K"],)),
        "residual": floats(rng, (rows, a["N"])),
        "permutation": np.random.default_rng(rng.randrange(99)).permutation(a["K"]).astype(np.int32),
    }
    kept = {name for name in feeds if name in ("x", "weight") or rng.random() < 0.3}
    return "QuantLinear", a, {name: array for name, array in feeds.items() if name in kept}


def random_embedding(rng: random.Random) -> Call:
    a = {"N": rng.choice([1, 33, 96]), "K": rng.choice([32, 64, 128]), "bits": rng.choice([4, 5, 6, 8])}
    a |= {"group_size": rng.choice([32, 64]), "symmetric": rng.choice([0, 1])}
    ids = [rng.randrange(a["N"]) for _ in range(rng.choice([0, 1, 5, 40]))]
    return "QuantEmbedding", a, {"token_ids": np.array(ids, np.int64), "weight": random_weight(rng, a, False)}


def random_scheme(rng: random.Random) -> dict[str, Any]:
    """How one weight of a mixture of experts is stored and multiplied."""
    if rng.random() < 0.2:
        return {"bits": 32}
    scheme: dict[str, Any] = {"bits": rng.choice([4, 5, 6, 8]), "group_size": rng.choice([32, 64, 128])}
    scheme |= {"symmetric": rng.choice([0, 1]), "precision": rng.choice(["int8", "int8x2", "float32"])}
    has_blocks = scheme["bits"] < 8 and scheme["group_size"] < 128
    return scheme | {"activation_scales": rng.choice(["group", "token", *(["block"] if has_blocks else [])])}


def random_experts(rng: random.Random, scheme: dict[str, Any], experts: int, rows: int, columns: int) -> np.ndarray:
    """The weights of all experts: any bytes, or any float rows."""
    if scheme["bits"] == 32:
        return floats(rng, (experts * rows, columns))
    return random_weight(rng, scheme | {"N": experts * rows, "K": columns}, scheme["activation_scales"] == "block")


def random_mixture(rng: random.Random) -> Call:
    experts, hidden, inner = rng.choice([1, 2, 5, 33]), rng.choice([32, 96, 160]), rng.choice([16, 48, 128])
    tokens = rng.choice([0, 1, 2, 5, 8, 17, 40])
    gate_up, down = random_scheme(rng), random_scheme(rng)
    a: dict[str, Any] = {"num_experts": experts, "top_k": rng.randint(1, experts), "norm_topk_prob": rng.choice([0, 1])}
    a |= {"hidden_size": hidden, "intermediate_size": inner}
    a |= {f"gate_up_{name}": value for name, value in gate_up.items()}
    a |= {f"down_{name}": value for name, value in down.items()}
    feeds = {
        "x": floats(rng, (tokens, hidden)),
        "router": floats(rng, (experts, hidden)),
        "gate_up": random_experts(rng, gate_up, experts, 2 * inner, hidden),
        "down": random_experts(rng, down, experts, hidden, inner),
        "norm_weight": floats(rng, (hidden,)),
        "residual": floats(rng, (tokens, hidden)),
        "shared": floats(rng, (tokens, hidden)),
        "shared_gate": floats(rng, (hidden,)),
    }
    kept = {name for i, name in enumerate(feeds) if i < 4 or rng.random() < 0.3}
    return "MoE", a, {name: array for name, array in feeds.items() if name in kept}


def random_attention(rng: random.Random) -> Call:
    kv_heads, dim, block = rng.choice([1, 2, 3]), rng.choice([8, 24, 64, 128]), rng.choice([32, 64])
    heads, dtype = kv_heads * rng.choice([1, 2, 7]), rng.choice(["float32", "float16", "int8"])
    sequences = rng.choice([0, 1, 1, 2, 5])
    past = [rng.choice([0, 1, 31, 32, 300]) for _ in range(sequences)]
    new = [rng.choice([0, 1, 1, 2, 33]) for _ in range(sequences)]
    needed = [-(-(p + n) // block) for p, n in zip(past, new, strict=True)]
    blocks = sum(needed) + rng.choice([0, 1])
    table = np.full((sequences, max(needed, default=0)), rng.choice([-1, 0, 2**31 - 1]), np.int32)
    ids = iter(np.random.default_rng(rng.randrange(99)).permutation(blocks))
    for row, count in enumerate(needed):
        table[row, :count] = [next(ids) for _ in range(count)]
    longest, rotary = max(map(sum, zip(past, new, strict=True)), default=0), rng.choice([0, dim // 2])
    feeds = {
        "query": floats(rng, (sum(new), (heads + 2 * kv_heads) * dim)),
        "key_cache": floats(rng, (blocks, kv_heads, block // 32, dim, 32), dtype),
        "value_cache": floats(rng, (blocks, kv_heads, block, dim), dtype),
        "cumulative_lengths": np.array([0, *np.cumsum(new)], np.int32),
        "past_lengths": np.array(past, np.int32),
        "block_table": table,
    }
    if rotary:
        feeds |= {name: floats(rng, (longest + 1, rotary)) for name in ("cos_cache", "sin_cache")}
    if rng.random() < 0.4:
        feeds |= {name: floats(rng, (dim,)) for name in ("q_norm_weight", "k_norm_weight")}
    if dtype == "int8":
        feeds |= {name: floats(rng, (blocks, kv_heads, block)) for name in ("key_scale", "value_scale")}
    a: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": int(rotary > 0)}
    if rng.random() < 0.3:
        a["local_window_size"] = rng.choice([1, 31, 33, 257, 2**63 - 1])
    return "PagedAttention", a, feeds


def damage(call: Call, rng: random.Random) -> str:
    """Change an attribute, a shape, a type or an integer of ``call``; what was done."""
    _, attributes, feeds = call
    name = rng.choice(list(feeds))
    array = feeds[name]
    kind = rng.choice(["shape", "value", "value", "type", "leave out", "attribute"])
    if kind == "attribute":
        changed = rng.choice(list(attributes))
        attributes[changed] = rng.choice(EDGES) if isinstance(attributes[changed], int) else rng.choice(["", "int4"])
        return f"{changed} is {attributes[changed]}"
    if kind == "shape":
        shape = [max(0, size + rng.choice([-1, 0, 0, 1, 32])) for size in array.shape]
        feeds[name] = np.resize(array, shape) if array.size else np.zeros(shape, array.dtype)
    elif kind == "value" and array.dtype in (np.int32, np.int64) and array.size:
        feeds[name] = array.copy()
        feeds[name].reshape(-1)[rng.randrange(array.size)] = rng.choice(EDGES)
    elif kind == "type":
        with np.errstate(invalid="ignore"):
            feeds[name] = array.astype(rng.choice(list(TYPES)))
    elif kind == "leave out" and len(feeds) > 1:
        del feeds[name]
    return f"{kind} of {name}"


def make(_: None, rng: random.Random, folder: Path) -> Attempt:
    makers = (random_linear, random_linear, random_attention, random_attention, random_embedding, random_mixture)
    calls = [rng.choice(makers)(rng) for _ in range(CALLS)]
    damages = [[damage(call, rng) for _ in range(rng.choice([0, 1, 1, 2]))] for call in calls]
    settings = [(rng.choice(ISAS), rng.choice([1, 2, 64])) for _ in calls]
    note = "; ".join(f"{call[0]} ({', '.join(damage)})" for call, damage in zip(calls, damages, strict=True))
    return Attempt(note, partial(run_all, calls, settings))


def run_all(calls: list[Call], settings: list[tuple[str, int]]) -> str:
    ends = [run(*call, *setting) for call, setting in zip(calls, settings, strict=True)]
    wrong = [end for end in ends if not end.startswith(("answered", "refused"))]
    return wrong[0] if wrong else f"answered: {ends.count('answered')} of {len(ends)}"


def run(operator: str, attributes: dict[str, Any], feeds: dict[str, np.ndarray], isa: str, threads: int) -> str:
    names = [name if name in feeds else "" for name in INPUTS[operator]]
    while names and not names[-1]:
        names.pop()
    node = helper.make_node(operator, names, ["y"], domain="qwen", **attributes)
    inputs = [helper.make_tensor_value_info(name, TYPES[array.dtype], None) for name, array in feeds.items()]
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    with np.errstate(all="ignore"):
        try:
            session = make_session(make_model([node], inputs, output), isa, threads)
            session.run(None, feeds)
        except Exception as error:  # ONNX Runtime's have no common class of their own
            is_refusal = type(error).__module__.startswith("onnxruntime")
            return f"refused: {error!s:.200}" if is_refusal else f"{type(error).__name__}: {error!s:.200}"
    return "answered"


if __name__ == "__main__":
    main(__doc__, lambda directory: None, make)
