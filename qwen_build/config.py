"""What the builder has to know about a checkpoint, read from its ``config.json``.

What the config asks for and the graph does not have is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_build.checkpoint import read_json
from qwen_engine.errors import CheckpointError, UnsupportedModel
from qwen_engine.manifest import ModelSizes


@dataclass(frozen=True)
class Architecture:
    """What one family of checkpoints has and another has not."""

    attention_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # where config.json has none; None: hidden_size / heads


# Hugging Face model_type -> its features; a new family starts with a row here
ARCHITECTURES = {
    "qwen2": Architecture(attention_bias=True),  # Qwen1.5, Qwen2, Qwen2.5
    "qwen3": Architecture(qk_norm=True, head_dim=128),
}

# config key -> (values the graph computes with, what an absent key means)
SUPPORTED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "hidden_act": (("silu",), None),
    "use_sliding_window": ((False,), False),
    "mlp_bias": ((False,), False),
    "partial_rotary_factor": ((1, 1.0), 1),
}


@dataclass(frozen=True)
class ModelConfig(ModelSizes):
    """Sizes and features of one checkpoint. ``eos_token_ids`` are the config's own, maybe none."""

    architecture: Architecture
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...] = ()

    @property
    def sizes(self) -> ModelSizes:
        """The part that goes into the manifest."""
        return ModelSizes(**{name: getattr(self, name) for name in ModelSizes.__dataclass_fields__})

    @classmethod
    def from_hf(cls, checkpoint: Path) -> ModelConfig:
        """Read ``config.json`` of the directory ``checkpoint``.

        Raises:
            CheckpointError: the file is missing, unreadable, or lacks a field.
            UnsupportedModel: the checkpoint needs something the graph does not have.
        """
        return cls.from_json(read_json(checkpoint / "config.json"))

    @classmethod
    def from_json(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """As :meth:`from_hf`, from the parsed file."""
        model_type = hf.get("model_type")
        if model_type not in ARCHITECTURES:
            raise UnsupportedModel(f"model_type {model_type!r} is not one of {', '.join(ARCHITECTURES)}")
        architecture = ARCHITECTURES[model_type]
        check_supported(hf, architecture)
        rope = hf.get("rope_parameters") or {}  # transformers 5; before: top-level rope_theta
        hidden_size, heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
        config = cls(
            architecture=architecture,
            model_type=model_type,
            vocab_size=integer(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=integer(hf, "intermediate_size"),
            num_hidden_layers=integer(hf, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=integer(hf, "num_key_value_heads"),
            head_dim=integer(hf, "head_dim", architecture.head_dim or hidden_size // heads),
            rms_norm_eps=number(hf, "rms_norm_eps", 1e-6),
            rope_theta=number(rope if hf.get("rope_theta") is None else hf, "rope_theta", 10000.0),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            max_position_embeddings=integer(hf, "max_position_embeddings"),
            eos_token_ids=token_ids(hf.get("eos_token_id")),
        )
        check_sizes(config)
        return config


def check_supported(hf: Mapping[str, Any], architecture: Architecture) -> None:
    """Raise :class:`UnsupportedModel` naming the first thing ``hf`` asks for that the graph lacks."""
    if quantized := hf.get("quantization_config"):
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else quantized
        raise UnsupportedModel(
            f"the checkpoint is already quantised ({method}), which cannot be read yet; give the float checkpoint"
        )
    for key, (supported, default) in SUPPORTED.items():
        value = default if hf.get(key) is None else hf[key]
        if value not in supported:
            raise UnsupportedModel(f"config.json: {key} {value!r} is not supported, only {supported[0]!r} is")
    if "attention_bias" in hf and bool(hf["attention_bias"]) != architecture.attention_bias:
        raise UnsupportedModel(
            f"config.json: attention_bias {hf['attention_bias']!r} is not supported for model_type "
            f"{hf['model_type']!r}, only {architecture.attention_bias} is"
        )
    other_layers = {kind for kind in hf.get("layer_types") or () if kind != "full_attention"}
    if other_layers:
        raise UnsupportedModel(
            f"config.json: layer_types {sorted(other_layers)} are not supported, only full_attention is"
        )
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf.get(key) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise UnsupportedModel(f"config.json: {key} asks for rope type {rope_type!r}, only 'default' is supported")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise UnsupportedModel(
                f"config.json: {key} asks for partial_rotary_factor, only the whole head can be rotated"
            )


def check_sizes(config: ModelConfig) -> None:
    """Raise unless the sizes fit each other and the attention operator."""
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 8 or head_dim > 256:
        raise UnsupportedModel(f"head_dim {head_dim} is not a multiple of 8 up to 256")


def token_ids(value: Any) -> tuple[int, ...]:
    """``eos_token_id`` of a config: absent, one id, or a list of ids.

    >>> token_ids([151645, 151643]), token_ids(2), token_ids(None)
    ((151645, 151643), (2,), ())
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise CheckpointError(f"eos_token_id is {value!r}, expected an integer or a list of integers")
    return tuple(ids)


def integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer field; null counts as absent."""
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive integer")
    return value


def number(hf: Mapping[str, Any], key: str, default: float | None) -> float:
    """A positive number field; null counts as absent."""
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive number")
    return float(value)
