"""The options of :class:`~qwen_run.api.llm.LLM` by all names they go by: its own, vLLM's, and those of a build."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from qwen_engine.errors import EngineError
from qwen_run.api.build_on_demand import build_option_names
from qwen_run.runtime.core import CoreOptions

# The demo's summaries come 1.34 times as fast one at a time, 0.99 times eight at once: benchmarks/results/core.md.
MAX_DRAFTS = 8

PIPELINE = ("pipeline_parallel_size", "distributed_executor_backend")
OWN = ("threads", "num_blocks", "cache_bytes", "max_seq_len", "skip_tokenizer_init", "seed", *PIPELINE)
CORE = tuple(CoreOptions.__dataclass_fields__)
# vLLM's name -> ours
SYNONYMS = {
    "max_num_seqs": "max_batch_size",
    "max_num_batched_tokens": "max_batch_tokens",
    "enable_prefix_caching": "prefix_caching",
    "max_model_len": "max_seq_len",
}


class Idle(NamedTuple):
    """An option of vLLM's that changes nothing here: what it may be, and where to turn with another value."""

    expected: str
    allowed: Callable[[Any], bool]
    advice: str


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is each or (type(value) is type(each) and value == each) for each in values)


_SWITCH = Idle("True or False", lambda value: isinstance(value, bool), "leave it out")
IDLE = {
    "gpu_memory_utilization": Idle("a number", _is_number, "cache_bytes is the option for the cache's memory"),
    "dtype": Idle("'auto'", _one_of("auto"), "types are chosen when an engine is built, with quant and kv_cache_dtype"),
    "tensor_parallel_size": Idle(
        "1", _one_of(1), "a layer is computed in one process; pipeline_parallel_size divides layers, threads cores"
    ),
    "enforce_eager": _SWITCH,
    "trust_remote_code": _SWITCH,
    "disable_log_stats": _SWITCH,
    "tokenizer_mode": Idle("'auto'", _one_of("auto"), "the tokenizer is the engine's own"),
    "load_format": Idle("'auto'", _one_of("auto"), "an engine is loaded in one way"),
    "quantization": Idle(
        "None", _one_of(None), "give a checkpoint and quant; a packed checkpoint is recognised without"
    ),
    "swap_space": Idle("a number", _is_number, "leave it out"),
}


@dataclass(frozen=True)
class LLMOptions:
    """What the keywords of an LLM ask for.

    Attributes:
        core: how requests share the engine.
        seed: of the first request that has none of its own; the next has one more.
        max_seq_len: most tokens of a sequence.
        pipeline: stages and who runs them, where they are given.
        build: fields of ``qwen_build.plan.options.BuildOptions``.
    """

    core: CoreOptions
    seed: int | None
    max_seq_len: int | None
    pipeline: Mapping[str, Any]
    build: Mapping[str, Any]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Sort ``options``; one warning names those that have no effect.

        Raises:
            EngineError: an option is unknown, is there under two names, or has a value it cannot have.
        """
        named: dict[str, Any] = {}
        for name, value in options.items():
            if name in IDLE:
                _check_idle(name, value)
                continue
            own = SYNONYMS.get(name, name)
            if own in named:
                raise EngineError(f"{' and '.join(_names_of(own, options))} are one option; give one of them")
            named[own] = value
        if idle := [name for name in options if name in IDLE]:
            warnings.warn(f"without effect on an engine: {', '.join(idle)}", stacklevel=3)
        core = {name: named.pop(name) for name in CORE if name in named}
        seed = named.pop("seed", None)
        if seed is not None and not (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**64):
            raise EngineError(f"seed is {seed!r}, expected None or a whole number from 0 to 2^64 - 1")
        max_seq_len = named.pop("max_seq_len", None)
        pipeline = {name: named.pop(name) for name in PIPELINE if name in named}
        if named:
            check_known(named)
        return cls(_core_options(core), seed, max_seq_len, pipeline, named)


def check_known(names: Mapping[str, Any]) -> None:
    """
    Raises:
        EngineError: one of ``names`` is no option; the message has the nearest that is.
    """
    known = [*OWN, *CORE, *SYNONYMS, *IDLE, *build_option_names()]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            expected = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(known)}"
            raise EngineError(f"unknown option {name}; {expected}")


def _core_options(given: dict[str, Any]) -> CoreOptions:
    """Guessing costs little where it does not pay; a larger batch brings the tokens of its sequences with it."""
    size = given.get("max_batch_size")
    chosen = {"max_drafts": MAX_DRAFTS} | given
    if isinstance(size, int) and "max_batch_tokens" not in given:
        chosen["max_batch_tokens"] = max(size, CoreOptions.max_batch_tokens)
    return CoreOptions(**chosen)


def _check_idle(name: str, value: Any) -> None:
    rule = IDLE[name]
    if not rule.allowed(value):
        raise EngineError(f"{name} is {value!r}, expected {rule.expected}: {rule.advice}")


def _names_of(own: str, options: Mapping[str, Any]) -> list[str]:
    return [name for name in options if SYNONYMS.get(name, name) == own]
