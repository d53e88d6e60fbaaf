"""A checkpoint that computes the same function in other coordinates, for what rotations give a rounding.

    python -m benchmarks.rotate CHECKPOINT DIR [--residual] [--width 768] [--values] [--seed 0]

``--residual`` turns the residual stream by an orthogonal matrix (QuaRot, arXiv 2404.00456): norms are folded into what
reads them first, and a head that was the embedding becomes a matrix of its own. ``--width`` turns it into a space of
more dimensions, such as one that is a multiple of 256 as llama.cpp's types want it. ``--values`` turns what each head
hands from ``v_proj`` to ``o_proj`` (SpinQuant's R2, arXiv 2405.16406). Matrices are Hadamard's with random signs where
the size is a power of two, else random orthogonal ones. Everything is in float32; ``qwen-build`` and ``python -m
benchmarks.quality --checkpoint DIR`` take the result like any other.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from benchmarks.command import run
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.weights import Checkpoint

Weights = dict[str, np.ndarray]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def orthogonal(size: int, random: np.random.Generator) -> np.ndarray:
    """An orthogonal matrix, float64 (size, size).

    >>> turn = orthogonal(6, np.random.default_rng(0))
    >>> bool(np.allclose(turn @ turn.T, np.eye(6)))
    True
    """
    if size & (size - 1):
        q, r = np.linalg.qr(random.normal(size=(size, size)))
        return np.asarray(q * np.sign(r.diagonal()))
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix * random.choice([-1.0, 1.0], size)[:, None] / np.sqrt(size))


def rotate_residual(weights: Weights, config: ModelConfig, random: np.random.Generator, width: int) -> None:
    """Turn the residual stream into ``width`` dimensions, all norms before linears folded.

    A norm divides by the root of a mean over more columns: that is what its weight then is in place of 1.
    """
    turn = orthogonal(width, random)[: config.hidden_size]
    norm_weight = np.full(width, np.sqrt(config.hidden_size / width))
    head = weights[EMBEDDING if config.tie_word_embeddings else HEAD].astype(np.float64)
    weights[HEAD] = head * weights["model.norm.weight"] @ turn
    weights[EMBEDDING] = weights[EMBEDDING] @ turn
    weights["model.norm.weight"] = norm_weight
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            for reader in readers:
                name = f"{path}{reader}.weight"
                weights[name] = weights[name].astype(np.float64) * weights[f"{path}{norm}.weight"] @ turn
            weights[f"{path}{norm}.weight"] = norm_weight
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"{path}{writer}.weight"] = turn.T @ weights[f"{path}{writer}.weight"]


def rotate_values(weights: Weights, config: ModelConfig, random: np.random.Generator) -> None:
    """Turn what each head of keys and values hands on."""
    size, heads = config.head_dim, config.num_key_value_heads
    copies = config.num_attention_heads // heads
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}.self_attn."
        turns = np.stack([orthogonal(size, random) for _ in range(heads)])
        for name in (f"{path}v_proj.weight", f"{path}v_proj.bias"):
            if name in weights:
                rows = weights[name].reshape(heads, size, -1)
                weights[name] = np.einsum("hij,hik->hjk", turns, rows).reshape(weights[name].shape)
        columns = weights[f"{path}o_proj.weight"].reshape(-1, heads, copies, size)
        weights[f"{path}o_proj.weight"] = np.einsum("nhci,hij->nhcj", columns, turns).reshape(len(columns), -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--residual", action="store_true")
    parser.add_argument("--width", type=int, help="of the turned residual stream; the model's own if left out")
    parser.add_argument("--values", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from safetensors.numpy import save_file

    config = ModelConfig.from_hf(arguments.checkpoint)
    with Checkpoint.open(arguments.checkpoint) as checkpoint:
        weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    random, width = np.random.default_rng(arguments.seed), arguments.width or config.hidden_size
    if width < config.hidden_size or (width > config.hidden_size and not arguments.residual):
        parser.error(f"--width goes with --residual and is {config.hidden_size} or more, found {width}")
    if arguments.values:
        rotate_values(weights, config, random)
    if arguments.residual:
        rotate_residual(weights, config, random, width)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path in arguments.checkpoint.iterdir():
        if path.is_file() and not path.name.startswith("model"):
            shutil.copy(path, arguments.output)
    settings = json.loads((arguments.checkpoint / "config.json").read_text("utf-8"))
    settings["head_dim"], settings["hidden_size"] = config.head_dim, width
    settings["rms_norm_eps"] = config.rms_norm_eps * config.hidden_size / width
    settings["tie_word_embeddings"] = config.tie_word_embeddings and not arguments.residual
    (arguments.output / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    saved = {name: np.ascontiguousarray(weight, np.float32) for name, weight in weights.items()}
    save_file(saved, arguments.output / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    run(main)
