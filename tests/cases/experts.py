"""Checkpoints of mixtures of experts in the other form, and with routers that choose as they are told."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from cases.tiny import TinyCheckpoint

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``tensors`` with those of a layer's experts in two of three dimensions, as transformers has them in memory."""
    found: dict[str, np.ndarray] = {}
    own: dict[str, dict[tuple[int, str], np.ndarray]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            own.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            found[name] = tensor
    for module, weights in own.items():
        count = 1 + max(number for number, _ in weights)
        both = [np.concatenate([weights[number, "gate"], weights[number, "up"]]) for number in range(count)]
        found[f"{module}.gate_up_proj"] = np.stack(both)
        found[f"{module}.down_proj"] = np.stack([weights[number, "down"] for number in range(count)])
    return found


def rewritten(checkpoint: Path, directory: Path, change: Any) -> Path:
    """``checkpoint`` with what ``change`` makes of its tensors, in the new ``directory``."""
    shutil.copytree(checkpoint, directory)
    save_file(change(load_file(checkpoint / "model.safetensors")), directory / "model.safetensors")
    return directory


def lopsided(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``tensors``, whose routers send every token to the first expert and none to the last."""
    changed = dict(tensors)
    embedding = changed["model.embed_tokens.weight"].copy()
    embedding[:, 0] = 20  # the residual keeps a large first channel
    changed["model.embed_tokens.weight"] = embedding
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            router = tensor.copy()
            router[0, 0], router[-1, 0] = 8, -8
            changed[name] = router
    return changed


def loaded(directory: Path) -> TinyCheckpoint:
    """The checkpoint in ``directory`` beside its model of transformers."""
    import torch
    import transformers

    return TinyCheckpoint(directory, transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


def with_config(directory: Path, **changes: Any) -> None:
    """Change keys of the config.json in ``directory``; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
