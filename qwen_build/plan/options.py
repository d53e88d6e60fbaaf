"""What a user may choose of a build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_build.plan.rules import Rule

DEFAULT_GROUP_SIZE = 32

# the choices of --quant that calibrate -> the scheme they round to
CALIBRATED = {"smoothquant": "int8"}
DEFAULT_ALPHA: Literal["auto"] = "auto"


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; None means the default that goes with ``quant``.

    A float engine keeps embedding and cache in float32, so that it equals Hugging Face; a quantised one stores the
    embedding in int8 and the cache in float16, whose error is far below that of its linears.

    Attributes:
        quant: None is int4, or what the checkpoint is stored in.
        activations: the default goes with ``kernels``, see ``KERNELS`` in ``quantization/schemes.py``.
        weight_scales, activation_scales: of the linears that ``quant`` speaks of; embedding, head and what
            ``quant_config`` names have the usual ones, see ``make_scheme`` there.
        block_size: tokens of a cache block. Attention over long contexts is a tenth slower with 32 and hardly faster
            with 128, see ``benchmarks/results/attention.md``.
        exclude: patterns of linears to keep float.
        ignore_tensors: patterns of tensors of the checkpoint to leave out.
        quant_config: the schemes of others, see :mod:`qwen_build.plan.rules`.
        alpha: of "smoothquant", from 0 to 1, or "auto".
        int4_method: how int4 weights are rounded.
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
    block_size: int = 64
    exclude: tuple[str, ...] = ()
    ignore_tensors: tuple[str, ...] = ()
    quant_config: tuple[Rule, ...] = ()
    alpha: float | Literal["auto"] | None = None
    int4_method: str | None = None
    calibration: Path | None = None
    calibration_tokens: int | None = None

    def resolved(self) -> ResolvedOptions:
        """The options with every default filled in but those that the checkpoint decides.

        These are ``max_seq_len`` and ``group_size``, which is 32; but where the linears are int4, embedding and head in
        int8 have the largest groups that need no padding, see ``scheme_plan.py``.
        """
        exact = self.quant == "none"
        fields = vars(self) | {
            "quant": self.quant or "int4",
            "weight_scales": self.weight_scales or "group",
            "alpha": DEFAULT_ALPHA if self.alpha is None and self.quant == "smoothquant" else self.alpha,
            "int4_method": self.int4_method or "rtn",
            "embedding_quant": self.embedding_quant or ("none" if exact else "int8"),
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
