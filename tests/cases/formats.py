"""Tiny checkpoints whose linears are stored in any format, and the values that these stand for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cases.tiny import TINY, TinyCheckpoint

# name and weight (torch, float32) of a linear -> its tensors by suffix, and the weight that they stand for
Quantise = Callable[[str, Any], tuple[dict[str, Any], Any] | None]


@dataclass(frozen=True)
class QuantisedCheckpoint:
    """A checkpoint and the values it stands for: ``weights`` float32 by linear, ``model`` with them."""

    path: Path
    weights: dict[str, np.ndarray]
    model: Any

    def edit(self, **changes: Any) -> None:
        """Replace or remove (None) tensors of the checkpoint, of torch or NumPy, dots as double underscores."""
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(self.path / "model.safetensors")
        for name, value in changes.items():
            made = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            tensors[name.replace("__", ".")] = made
        save_file(
            {name: value for name, value in tensors.items() if value is not None}, self.path / "model.safetensors"
        )

    def configure(self, **changes: Any) -> None:
        path = self.path / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= changes
        path.write_text(json.dumps(config))


def in_groups(path: Path, model_type: str = "qwen2", **sizes: Any) -> TinyCheckpoint:
    """A random model in bfloat16 whose widths are whole groups of 32 and 64, saved in ``path``."""
    import torch
    import transformers

    torch.manual_seed(0)
    grouped = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
    config = transformers.AutoConfig.for_model(**TINY | {"model_type": model_type} | grouped | sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.bfloat16().save_pretrained(path)
    return TinyCheckpoint(path, transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def quantised(tiny: TinyCheckpoint, path: Path, config: dict[str, Any], quantise: Quantise) -> QuantisedCheckpoint:
    """The checkpoint ``tiny`` with its linears as ``quantise`` has them; where that is None they stay float."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors, model, weights = load_file(tiny.path / "model.safetensors"), copy.deepcopy(tiny.model), {}
    for name, module in model.named_modules():
        found = quantise(name, module.weight.data) if isinstance(module, torch.nn.Linear) else None
        if found is not None:
            parts, weight = found
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{suffix}": part.contiguous() for suffix, part in parts.items()}
            module.weight.data = weight.float()
            weights[name] = weight.float().numpy()
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    hf = json.loads((tiny.path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(hf | {"quantization_config": config}))
    return QuantisedCheckpoint(path, weights, model)


def assert_read_alike(path: Path, linears: dict[str, np.ndarray]) -> None:
    """The reader of ``qwen_run.accuracy``, which shares nothing with the builder, has the values of ``linears``."""
    from qwen_run.accuracy.builder_weights import BuilderWeights, open_weights

    weights = open_weights(path)
    assert not isinstance(weights, BuilderWeights)
    for name, expected in linears.items():
        for rows in (slice(0, len(expected)), slice(3, 13), slice(7, 8)):
            assert np.array_equal(weights.rows(name, rows), expected[rows]), name
