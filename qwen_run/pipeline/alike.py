"""What stages that compute together must have in common, and how one that differs is refused."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import qwen_plugin
from qwen_engine import __version__
from qwen_engine.errors import EngineError
from qwen_engine.manifest import GRAPH_FILE, WEIGHTS_FILE, Manifest
from qwen_plugin.instruction_set import uses_amx
from qwen_run.runtime.stage import Stage

# what must be equal -> what it is called
_MUST_BE_EQUAL = {
    "engine": "engine",
    "version": "qwen-engine",
    "operators": "operators",
    "numerics": "numerics class",
}


def facts(stage: Stage) -> dict[str, Any]:
    """What has to be equal among stages that compute together, and what is worth knowing of one."""
    parts = stage.manifest.parts
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "layers": [stage.layers.start, stage.layers.stop],
        "weight_bytes": stage.weight_bytes,
        "engine": f"{stage.manifest.name} {parts[GRAPH_FILE].sha256[:16]} {parts[WEIGHTS_FILE].sha256[:16]}",
        "version": __version__,
        "operators": ", ".join(f"{name} {version}" for (_, name), version in sorted(qwen_plugin.OPERATORS.items())),
        "numerics": numerics_class(stage.manifest),
    }


def numerics_class(manifest: Manifest) -> str:
    """Whose bits the engine of ``manifest`` has here: those of this class have the same.

    Raises:
        EngineError: ``QWEN_PLUGIN_ISA`` names no instruction set of this machine.
    """
    if any(linear.quantization.kernels == "stock" for linear in manifest.linears):
        return f"ONNX Runtime on {platform.machine()} {_model_name()}"  # it chooses kernels by the processor
    return "amx" if manifest.cache.dtype == "float16" and manifest.operators and uses_amx() else "vectors"


def check_alike(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    """
    Raises:
        EngineError: a stage would give other bits than this process does; it names both machines.
    """
    for other in others:
        for name, words in _MUST_BE_EQUAL.items():
            if own[name] != other[name]:
                layers = f"layers {other['layers'][0]} to {other['layers'][1] - 1}"
                raise EngineError(
                    f"{other['host']} ({layers}) has {words} {other[name]}, {own['host']} has {own[name]}; install one "
                    "version and one engine everywhere, and set QWEN_PLUGIN_ISA where processors differ"
                )


def _model_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
