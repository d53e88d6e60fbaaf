"""LoRA adapters that peft trained for a few steps, and the models that peft merges of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, RATE = 4, 0.5
ATTENTION = ["q_proj", "v_proj"]

# what peft is asked for; every name is a case
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ATTENTION},
    "rslora": {"target_modules": ["o_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"layers.1.*.q_proj": 4, "down_proj": 2},
        "alpha_pattern": {"down_proj": 32},
    },
    "fan_in_fan_out": {"target_modules": ATTENTION, "fan_in_fan_out": True},
    "some layers": {"target_modules": ["up_proj"], "layers_to_transform": [0, 2]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 77]},
    "bias": {"target_modules": ATTENTION, "bias": "lora_only"},
    "lora bias": {"target_modules": ATTENTION, "lora_bias": True},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
}


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter in ``path``; ``model`` is peft's, before it is merged."""

    path: Path
    model: Any

    def merged(self, path: Path) -> Path:
        """The model that peft merges, saved in float32 in ``path``."""
        self.model.merge_and_unload().save_pretrained(path)
        return path


def train(base: Any, path: Path, options: dict[str, Any], seed: int = 0) -> TrainedAdapter:
    """An adapter of the transformers model ``base``, which stays as it is, saved in ``path``."""
    import peft
    import torch

    torch.manual_seed(seed)
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | options)
    )
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=RATE)
    for _ in range(STEPS):
        tokens = torch.randint(0, 128, (2, 24))
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return TrainedAdapter(path, model.eval())
