"""The native operators: where their library is, and which versions of them it has."""

from __future__ import annotations

import sys
from pathlib import Path

from qwen_engine.errors import EngineError

LIBRARY_NAME = "libqwen_plugin.dylib" if sys.platform == "darwin" else "libqwen_plugin.so"

# (domain, name) -> version of every operator in the library
OPERATORS = {("qwen", "PagedAttention"): 1, ("qwen", "QuantLinear"): 4, ("qwen", "QuantEmbedding"): 2}


def library_path() -> Path:
    """The compiled library, for ``SessionOptions.register_custom_ops_library``.

    Raises:
        EngineError: it has not been compiled.
    """
    path = Path(__file__).parent / LIBRARY_NAME
    if not path.is_file():
        raise EngineError(f"{path} has not been compiled; install the package again (in a clone: pip install -e .)")
    return path
