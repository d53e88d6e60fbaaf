"""The native operators: where their library is, and which versions of them it has."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_engine.errors import EngineError

if TYPE_CHECKING:  # the plugin is compiled before there is an ONNX Runtime
    import onnxruntime

LIBRARY_NAME = "libqwen_plugin.dylib" if sys.platform == "darwin" else "libqwen_plugin.so"

# The session's config entry that says among how many threads the operators divide their work, and the most that it may
# say. compile.py tells both to plugin.cc.
THREADS_ENTRY = "qwen.threads"
MOST_THREADS = 1024

# (domain, name) -> version of every operator in the library
OPERATORS = {
    ("qwen", "PagedAttention"): 1,
    ("qwen", "QuantLinear"): 4,
    ("qwen", "QuantEmbedding"): 2,
    ("qwen", "MoE"): 1,
}


def library_path() -> Path:
    """The compiled library, for ``SessionOptions.register_custom_ops_library``.

    Raises:
        EngineError: it has not been compiled.
    """
    path = Path(__file__).parent / LIBRARY_NAME
    if not path.is_file():
        raise EngineError(f"{path} has not been compiled; install the package again (in a clone: pip install -e .)")
    return path


def register(options: onnxruntime.SessionOptions, threads: int) -> None:
    """Give a session the operators, which divide their work among ``threads`` of their own, with the one that runs it.

    Those of ONNX Runtime are for its own operators; where there are none of these to speak of, one is enough.

    Raises:
        EngineError: the library has not been compiled.
    """
    options.add_session_config_entry(THREADS_ENTRY, str(threads))
    options.register_custom_ops_library(str(library_path()))
