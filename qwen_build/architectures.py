"""The families of models, a row each: what one has and another has not.

A family is what Hugging Face calls a ``model_type``. Everything that is said of it here is what transformers 5 computes
with its class. What a layer of each kind consists of is in ``graph/architecture.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WindowKeys:
    """How a family's ``config.json`` says which layers attend to the last ``sliding_window`` tokens alone.

    Attributes:
        switch: the key that must be true for any to do; None: no key is needed.
        first_layer: the key with the number of the first that does; None: all do. A list of ``layer_types`` wins.
    """

    switch: str | None = None
    first_layer: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are read."""
        return tuple(key for key in ("sliding_window", self.switch, self.first_layer) if key)


@dataclass(frozen=True)
class Architecture:
    """What one family of checkpoints has and another has not.

    Attributes:
        models: as people call them; README's table of what is supported is made of these.
        qkv_bias: whether q, k and v have biases, whatever ``config.json`` says.
        qkv_bias_key: the key of ``config.json`` that gives biases to q, k and v; None: none does.
        bias_key: the key of ``config.json`` that gives biases to q, k, v and o; None: none does.
        qk_norm: whether queries and keys of each head are normalised.
        head_dim: where ``config.json`` has none; None: hidden_size / heads.
        defaults: what else its class has where ``config.json`` has no such key.
        rope_theta: likewise, for which transformers has several places.
        trained: max_position_embeddings of a config -> the tokens that its authors say to stretch with YaRN, where that
            is another number: Qwen3's 40,960 leave 8,192 for the answer.
        window: how layers with a window are named; None: there are none.
        beyond: what it needs beyond its longest text and engines have not; None: nothing.
        layer_kinds: of its layers, by turns where ``config.json`` has no layer_types; see ``graph/architecture.py``.
        sparse: the kind of its layers that are mixtures of experts, which ``EXPERT_KEYS`` count; None: there are none.
        only: keys that its class reads and the graph computes for one value only, as ``ONLY`` of
            ``checkpoint/config_keys.py``; with that value, ``idle`` ones change nothing.
    """

    models: tuple[str, ...]
    qkv_bias: bool = False
    qkv_bias_key: str | None = None
    bias_key: str | None = None
    qk_norm: bool = False
    head_dim: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rope_theta: float = 10000.0
    trained: Mapping[int, int] = field(default_factory=dict, hash=False)
    window: WindowKeys | None = None
    layer_kinds: tuple[str, ...] = ("full_attention",)
    sparse: str | None = None
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, hash=False)
    idle: tuple[str, ...] = ()
    beyond: str | None = None


_QWEN_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN_WINDOW = WindowKeys(switch="use_sliding_window", first_layer="max_window_layers")

# a window of mixtures of experts has rules of its own, and no published one has it
_NO_WINDOW: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False,)}
_IDLE_WINDOW = ("sliding_window", "max_window_layers")
_MOE_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
}

_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_MISTRAL_DEFAULTS = _LLAMA_DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}

# Hugging Face model_type -> its features; a new family starts with a row here
ARCHITECTURES = {
    "qwen2": Architecture(
        ("Qwen1.5", "Qwen2", "Qwen2.5"), qkv_bias=True, defaults=_QWEN_DEFAULTS, window=_QWEN_WINDOW,
    ),
    "qwen3": Architecture(
        ("Qwen3 (dense)",), bias_key="attention_bias", qk_norm=True, head_dim=128, defaults=_QWEN_DEFAULTS,
        trained={40960: 32768}, window=_QWEN_WINDOW,
    ),
    "qwen2_moe": Architecture(
        ("Qwen1.5-MoE", "Qwen2-MoE"), qkv_bias_key="qkv_bias", only=_NO_WINDOW, idle=_IDLE_WINDOW,
        sparse="shared_experts",
        defaults=_MOE_DEFAULTS
        | {"intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16, "qkv_bias": True,
           "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60,
           "num_experts_per_tok": 4},
    ),
    "qwen3_moe": Architecture(
        ("Qwen3-MoE",), bias_key="attention_bias", qk_norm=True,
        only=_NO_WINDOW, idle=_IDLE_WINDOW, trained={40960: 32768}, sparse="experts",
        defaults=_MOE_DEFAULTS
        | {"intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
           "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    ),
    "qwen": Architecture(
        ("Qwen (2023)",), qkv_bias=True, defaults={"tie_word_embeddings": False},
        beyond="dynamic NTK and log-n attention",
    ),
    "llama": Architecture(
        ("Llama 2", "Llama 3", "TinyLlama", "SmolLM2", "Yi", "DeepSeek-R1-Distill"), bias_key="attention_bias",
        defaults=_LLAMA_DEFAULTS,
    ),
    "mistral": Architecture(("Mistral",), defaults=_MISTRAL_DEFAULTS, window=WindowKeys()),
}  # fmt: skip

# model_type that people have and no row computes -> what it is
REFUSED = {
    "mixtral": "a mixture of experts",
    "llama4": "a mixture of experts",
    "llama4_text": "a mixture of experts",
    "phimoe": "a mixture of experts",
    "qwen4_exp": "a mixture of experts with hyper-connections",
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "deepseek_v32": "multi-head latent attention",
    "mistral4": "multi-head latent attention",
    "ministral": "sliding and full attention by turns",
    "mllama": "a model of images",
    "pixtral": "a model of images",
    "mistral3": "a model of images",
}
