"""The runtime: engine directories, requests and text in, tokens and text out.

The names below are what a program needs; each is imported when it is first used, so that ``import qwen_run`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_run.async_llm import AsyncLLM
    from qwen_run.causal_lm import QwenForCausalLM
    from qwen_run.engine_config import EngineConfig
    from qwen_run.llm import LLM
    from qwen_run.outputs import CompletionOutput, Logprob, RequestOutput
    from qwen_run.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "QwenForCausalLM",
    "RequestOutput",
    "SamplingParams",
]

_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "CompletionOutput": "outputs",
    "EngineConfig": "engine_config",
    "Logprob": "outputs",
    "QwenForCausalLM": "causal_lm",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
