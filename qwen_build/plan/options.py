"""What a user may choose of a build."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qwen_build.checkpoint.adapters import LoraChoice
from qwen_build.plan.rules import Rule
from qwen_engine import choices
from qwen_engine.errors import BuildError
from qwen_engine.graph_io import KEY_TILE
from qwen_engine.tasks import TASKS

DEFAULT_GROUP_SIZE = 32

# the choices of --quant that calibrate -> the scheme they round to
CALIBRATED = {"smoothquant": "int8"}
DEFAULT_ALPHA: Literal["auto"] = "auto"


class Mix(NamedTuple):
    """A choice of --quant that gives some linears more bits than the others.

    Attributes:
        quant: of the linears that ``linears`` does not name.
        linears: the last part of a linear's name -> its scheme.
        head: of the head, and of an embedding that is the head as well.
        lookup: of an embedding that is looked up alone: its error reaches one token, and is one of many there.
    """

    quant: str
    linears: Mapping[str, str]
    head: str
    lookup: str


# A byte takes most of the KL away in v_proj, the smallest of all, and then in down_proj; q_proj and k_proj have the
# bits of v_proj so that the three stay one product. Beside int4 a head of 8 bits is more exact than all else, and what
# two of its bits weigh buys more elsewhere. Figures: docs/accuracy.md.
_QKV_6 = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "int6")
MIXES = {"int4-mixed": Mix("int4", _QKV_6 | {"down_proj": "int5"}, "int6", "int4")}


class OptionRule(NamedTuple):
    """What an option may be beside None where ``optional``."""

    expected: str
    allowed: Callable[[Any], bool]
    optional: bool = True


def _one_of(values: tuple[Any, ...], optional: bool = True) -> OptionRule:
    """One of ``values``, and of the same type: 64.0 and True are no sizes."""
    words = f"one of {', '.join(map(str, values))}"
    return OptionRule(words, lambda value: any(type(value) is type(one) and value == one for one in values), optional)


def _whole(expected: str, least: int) -> OptionRule:
    return OptionRule(expected, lambda value: type(value) is int and least <= value < 2**53)


def _tuple_of(kind: type, expected: str) -> OptionRule:
    return OptionRule(expected, lambda value: type(value) is tuple and all(isinstance(v, kind) for v in value), False)


def _is_block(value: Any) -> bool:
    return type(value) is int and KEY_TILE <= value <= 2**20 and value & (value - 1) == 0


def _is_alpha(value: Any) -> bool:
    if isinstance(value, str):
        return value == DEFAULT_ALPHA
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1


def _is_factor(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1 < value < 2**20


RULES = {
    "quant": _one_of((*choices.QUANTS, *MIXES, *CALIBRATED, choices.AUTO)),
    "group_size": _one_of(choices.GROUP_SIZES),
    "symmetric": _one_of((True, False)),
    "kernels": _one_of(choices.KERNELS, optional=False),
    "activations": _one_of(choices.ACTIVATIONS),
    "weight_scales": _one_of(choices.WEIGHT_SCALES),
    "activation_scales": _one_of(choices.ACTIVATION_SCALES),
    "embedding_quant": _one_of(choices.QUANTS),
    "kv_cache_dtype": _one_of(choices.CACHE_DTYPES),
    "max_seq_len": _whole("a number of tokens", 1),
    "yarn": OptionRule("a number more than 1", _is_factor),
    "task": _one_of(tuple(TASKS)),
    "rope_scaling": OptionRule("the JSON text of a rope object", lambda value: isinstance(value, str)),
    "block_size": OptionRule(f"a power of two from {KEY_TILE}", _is_block, optional=False),
    "inputs_embeds": _one_of((True, False), optional=False),
    "exclude": _tuple_of(str, "a pattern of names or several"),
    "ignore_tensors": _tuple_of(str, "a pattern of names or several"),
    "quant_config": _tuple_of(Rule, "the path of a file of rules"),
    "lora": _tuple_of(LoraChoice, "the folder of an adapter or several"),
    "alpha": OptionRule("a number from 0 to 1, or 'auto'", _is_alpha),
    "int4_method": _one_of(choices.INT4_METHODS),
    "calibration": OptionRule("the path of a text", lambda value: isinstance(value, Path) and "\0" not in str(value)),
    "calibration_tokens": _whole("a number of tokens", 1),
}


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; None means the default that goes with ``quant``. The values are those of :data:`RULES`.

    A float engine keeps embedding and cache in float32, so that it equals Hugging Face; a quantised one stores the
    embedding in int8 and the cache in float16, whose error is far below that of its linears. A mix says itself how it
    stores the embedding.

    Attributes:
        quant: None is int4, or what the checkpoint is stored in.
        activations: the default goes with ``kernels``, see ``KERNELS`` in ``quantization/scheme_table.py``.
        weight_scales, activation_scales: of the linears that ``quant`` speaks of; embedding, head and what
            ``quant_config`` names have the usual ones, see ``make_scheme`` there.
        yarn: by what YaRN stretches the length that the checkpoint was trained for.
        rope_scaling: the JSON text of a rope object in place of the checkpoint's.
        task: what the engine is for, a key of ``TASKS``; None: what the checkpoint's files say.
        block_size: tokens of a cache block. Attention over long contexts is a tenth slower with 32 and hardly faster
            with 128, see ``benchmarks/results/attention.md``.
        inputs_embeds: whether the engine takes embeddings in place of token ids as well.
        exclude: patterns of linears to keep float.
        ignore_tensors: patterns of tensors of the checkpoint to leave out.
        quant_config: the schemes of others, see :mod:`qwen_build.plan.rules`.
        lora: adapters that are merged into the checkpoint's weights, in this order.
        alpha: of "smoothquant", from 0 to 1, or "auto".
        int4_method: how weights of less than 8 bits are rounded.
        calibration: a file of text to calibrate with.
        calibration_tokens: how much of it to read.
    """

    quant: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    kernels: str = "native"
    activations: str | None = None
    weight_scales: str | None = None
    activation_scales: str | None = None
    embedding_quant: str | None = None
    kv_cache_dtype: str | None = None
    max_seq_len: int | None = None
    yarn: float | None = None
    rope_scaling: str | None = None
    task: str | None = None
    block_size: int = 64
    inputs_embeds: bool = False
    exclude: tuple[str, ...] = ()
    ignore_tensors: tuple[str, ...] = ()
    quant_config: tuple[Rule, ...] = ()
    lora: tuple[LoraChoice, ...] = ()
    alpha: float | Literal["auto"] | None = None
    int4_method: str | None = None
    calibration: Path | None = None
    calibration_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check every option by itself.

        Raises:
            BuildError: names the first that is out of range, and what it may be.
        """
        for name, rule in RULES.items():
            value = getattr(self, name)
            if not (rule.optional and value is None) and not rule.allowed(value):
                raise BuildError(f"{name} is {value!r}, expected {rule.expected}")

    def resolved(self) -> ResolvedOptions:
        """The options with every default filled in but those that the checkpoint decides.

        These are ``max_seq_len`` and ``group_size``, which is 32; but where the linears are int4, embedding and head in
        int8 have the largest groups that need no padding, see ``scheme_plan.py``.
        """
        exact = self.quant == "none"
        embedding = MIXES[self.quant].head if self.quant in MIXES else "none" if exact else "int8"
        fields = vars(self) | {
            "quant": self.quant or "int4",
            "weight_scales": self.weight_scales or "group",
            "alpha": DEFAULT_ALPHA if self.alpha is None and self.quant == "smoothquant" else self.alpha,
            "int4_method": self.int4_method or "rtn",
            "embedding_quant": self.embedding_quant or embedding,
            "kv_cache_dtype": self.kv_cache_dtype or ("float32" if exact else "float16"),
        }
        return ResolvedOptions(**fields)


@dataclass(frozen=True)
class ResolvedOptions(BuildOptions):
    """Options of a build, every default filled in but those that the checkpoint decides."""

    quant: str = "int4"
    weight_scales: str = "group"
    embedding_quant: str = "int8"
    kv_cache_dtype: str = "float16"
    int4_method: str = "rtn"
