"""Engines beside transformers with the engine's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qwen_build.plan.rules import Rule
from qwen_engine.manifest import LAYERS_GRAPH_FILE
from qwen_run.accuracy.recipe import Recipe
from qwen_run.accuracy.reference import HuggingFace
from qwen_run.runtime.engine import Batch, Engine


def as_built(checkpoint, directory: Path) -> HuggingFace:
    return HuggingFace(checkpoint.path, 1, Recipe.read(directory))


# How engines differ that are not all of one scheme.
MIXED: dict[str, dict[str, object]] = {
    "stock": {"quant": "int4", "kernels": "stock", "embedding_quant": "int4"},
    "by linear": {
        "quant": "int4",
        "exclude": ("*.1.self_attn.k_proj", "*.up_proj"),
        "quant_config": (Rule("rules", "*.2.mlp.down_proj", "int8", group_size=64, symmetric=False),),
    },
    "head": {"quant": "int8", "quant_config": (Rule("rules", "lm_head", "int4"),)},
    "float head": {"quant": "int8", "exclude": ("lm_head",)},
}


def layer_outputs(directory: Path, token_ids: list[int]) -> dict[str, np.ndarray]:
    engine = Engine.load(directory, threads=1, graph=LAYERS_GRAPH_FILE)
    blocks = engine.cache.allocate(engine.cache.blocks_for(len(token_ids)))
    length = len(token_ids)
    batch = Batch(
        np.array(token_ids, np.int64),
        np.array([0, length], np.int32),
        np.zeros(1, np.int32),
        np.array([blocks], np.int32),
        np.arange(length),
    )
    return engine.run_layers(batch)


def relative_errors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {
        name: float(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name])) for name in expected
    }
