"""The runtime: engine directories, requests and text in, tokens and text out.

The names below are what a program needs; each is imported when it is first used, so that ``import qwen_run`` is quick.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qwen_engine import __version__
from qwen_engine.errors import (
    BuildError,
    CheckpointError,
    EngineError,
    EngineOptionError,
    OptionsError,
    QwenError,
    RequestError,
    UnsupportedModel,
    WeightMismatch,
)

if TYPE_CHECKING:
    from qwen_run.api.async_llm import AsyncLLM
    from qwen_run.api.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from qwen_run.api.engine_config import EngineConfig
    from qwen_run.api.llm import LLM
    from qwen_run.api.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from qwen_run.api.pooling import PoolingParams
    from qwen_run.sampling.params import SamplingParams
    from qwen_run.sampling.rules import RequestOutputKind
    from qwen_run.sampling.structured import StructuredOutputsParams
    from qwen_run.torch_model.model import QwenForCausalLM

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "BuildError",
    "CheckpointError",
    "CompletionOutput",
    "EngineConfig",
    "EngineError",
    "EngineOptionError",
    "Logprob",
    "OptionsError",
    "PoolingParams",
    "QwenError",
    "QwenForCausalLM",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "UnsupportedModel",
    "WeightMismatch",
    "__version__",
]

_MODULES = {
    "LLM": "api.llm",
    "AsyncLLM": "api.async_llm",
    "BeamSearchOutput": "api.beam_search",
    "BeamSearchParams": "api.beam_search",
    "BeamSearchSequence": "api.beam_search",
    "CompletionOutput": "api.outputs",
    "EngineConfig": "api.engine_config",
    "PoolingParams": "api.pooling",
    "Logprob": "api.outputs",
    "RequestMetrics": "api.outputs",
    "RequestOutput": "api.outputs",
    "RequestOutputKind": "sampling.rules",
    "SamplingParams": "sampling.params",
    "StructuredOutputsParams": "sampling.structured",
}


def _causal_lm() -> Any:
    """A model of transformers where it is installed, with torch; without them one of arrays."""
    if all(find_spec(name) for name in ("torch", "transformers")):
        return importlib.import_module(f"{__name__}.torch_model.model").QwenForCausalLM
    return importlib.import_module(f"{__name__}.api.causal_lm").EngineForCausalLM


def __getattr__(name: str) -> Any:
    if name == "QwenForCausalLM":
        return _causal_lm()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
