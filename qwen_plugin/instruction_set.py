"""Whose bits this processor computes: every instruction set gives the same, but for AMX over a float16 cache."""

from __future__ import annotations

import ctypes

import qwen_plugin
from qwen_engine.errors import EngineError


def uses_amx() -> bool:
    """Whether the operators use AMX tiles here.

    Raises:
        EngineError: the library is not compiled or older than this, or ``QWEN_PLUGIN_ISA`` is none of its sets.
    """
    path = qwen_plugin.library_path()
    try:
        found = ctypes.CDLL(str(path)).QwenUsesAmx()
    except AttributeError:
        raise EngineError(f"{path} is older than this package; compile it: python -m qwen_plugin.compile") from None
    if found < 0:
        raise EngineError("QWEN_PLUGIN_ISA names no instruction set of this machine; unset it")
    return bool(found)
