"""The builder: a Hugging Face checkpoint in, an engine directory out.

:func:`build` is ``qwen-build`` for programs; what it needs is imported when it is called.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from qwen_engine import __version__

__all__ = ["BuildChoices", "__version__", "build"]


class BuildChoices(TypedDict, total=False):
    """Options of ``qwen-build`` by their own names, which its ``--help`` explains; what is left out has its default."""

    quant: str | None
    group_size: int | None
    symmetric: bool | None
    embedding_quant: str | None
    exclude: str | Sequence[str]
    ignore_tensors: str | Sequence[str]
    quant_config: str | Path | None
    lora: str | Path | Sequence[str | Path]
    kernels: str
    activations: str | None
    weight_scales: str | None
    activation_scales: str | None
    alpha: float | Literal["auto"] | None
    int4_method: str | None
    calibration: str | Path | None
    calibration_tokens: int | None
    kv_cache_dtype: str | None
    max_seq_len: int | None
    yarn: float | None
    rope_scaling: str | Mapping[str, Any] | None
    task: str | None
    inputs_embeds: bool


def build(
    checkpoint: str | Path | None,
    directory: str | Path,
    *,
    force: bool = False,
    max_kl: float | None = None,
    max_size: int | None = None,
    **options: Unpack[BuildChoices],
) -> Path:
    """Build an engine, which appears in ``directory`` whole or not at all.

    >>> engine = build("Qwen/Qwen2.5-0.5B-Instruct", "engines/qwen", quant="int8")  # doctest: +SKIP

    Args:
        checkpoint: a directory or a Hub id; None is the demo model.
        directory: must not exist, unless ``force`` and it is an engine: then it is replaced.
        max_kl: with ``quant="auto"``, the smallest engine whose mean KL(float || engine) is at most this, in nats.
        max_size: or the most accurate engine of at most so many bytes.

    Returns:
        ``directory``, for ``qwen_run.LLM``.

    Raises:
        BuildError: an option is unknown or contradicts others, or the engine cannot be built.
    """
    from qwen_build.auto.search import build_auto
    from qwen_build.checkpoint.locate import resolve_checkpoint
    from qwen_build.checkpoint.weights import Checkpoint
    from qwen_build.engine_build import plan_build, write_engine
    from qwen_build.writing.output import check_output, resolved
    from qwen_engine.errors import BuildError
    from qwen_run.api.build_on_demand import build_options

    is_auto = options.get("quant") == "auto"
    for name, budget in (("max_kl", max_kl), ("max_size", max_size)):
        if budget is not None and not is_auto:
            raise BuildError(f'{name} is a budget for quant="auto" to choose within; add that, or leave it out')
    chosen, target = build_options(options), resolved(Path(directory))
    check_output(target, force)  # before anything is downloaded
    located = resolve_checkpoint(None if checkpoint is None else str(checkpoint))
    call = _written(checkpoint, directory, {"force": force, "max_kl": max_kl, "max_size": max_size} | options)
    with Checkpoint.open(located.path, chosen.lora) as weights:
        if is_auto:
            build_auto(weights, located, chosen, target, max_kl, max_size, force, call)
        else:
            plan = plan_build(weights, located, chosen)
            for note in plan.notes:
                warnings.warn(note, stacklevel=2)
            write_engine(plan, weights, target, force, call, tell=lambda note: warnings.warn(note, stacklevel=2))
    return Path(directory)


def _written(checkpoint: object, directory: object, options: dict[str, Any]) -> str:
    """The call as the manifest keeps it: without what is left out."""
    given = [f"{name}={value!r}" for name, value in options.items() if value is not None and value is not False]
    return f"qwen_build.build({', '.join([repr(checkpoint), repr(str(directory)), *given])})"
