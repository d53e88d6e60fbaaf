"""An architecture that nobody has: every other layer is a mixer, which keeps nothing and has linears of its own."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import onnx_ir as ir
import pytest
from onnxscript import OpBuilder

from qwen_build.architectures import ARCHITECTURES
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.graph.architecture import LAYER_KINDS, BlockSpec, InputSpec, LayerKind, LinearSpec
from qwen_build.graph.layers import Linear, Schemes, StepTensors, SubBlock
from qwen_build.graph.model import BLOCK_MODULES
from qwen_build.quantization.schemes import Norm


def _hidden(config: ModelConfig) -> int:
    return config.hidden_size


def _inner(config: ModelConfig) -> int:
    return 3 * config.head_dim


_TO_MIXER = InputSpec("mixer_norm", _hidden, producer="mixer_norm")
_MIXED = InputSpec("mixer.out_proj.input", _inner)  # behind a curve: no factor goes through it
MIXER = BlockSpec(
    "mixer",
    computes="mixer",
    norm="mixer_norm",
    linears=(
        LinearSpec("mixer.in_proj", _inner, _TO_MIXER, bias=lambda config: True),
        LinearSpec("mixer.out_proj", _hidden, _MIXED),
    ),
)


class Mixer(SubBlock):
    """``out(silu(in(x)))``"""

    in_proj: Linear
    out_proj: Linear

    def __init__(self, config: ModelConfig, layer: int, schemes: Schemes, block: BlockSpec):
        super().__init__(config, layer, schemes, block)
        self.add_linears("mixer_norm")
        self.add_linears("mixer.out_proj.input", "mixer")

    def forward(self, op: OpBuilder, x: ir.Value, norm: Norm, step: StepTensors) -> ir.Value:
        inner = self.in_proj(op, x, step, norm=norm)
        return self.out_proj(op, op.Mul(inner, op.Sigmoid(inner)), step, residual=x)


def add_made_up(patch: pytest.MonkeyPatch) -> None:
    """Teach the builder the kind and an architecture with it: Qwen3's but for its layers."""
    patch.setitem(LAYER_KINDS, "mixer", LayerKind((MIXER,)))
    patch.setitem(BLOCK_MODULES, "mixer", Mixer)
    architecture = replace(ARCHITECTURES["qwen3"], layer_kinds=("full_attention", "mixer"))
    patch.setitem(ARCHITECTURES, "made_up", architecture)


@cache
def transformers_model() -> Any:
    """The same in transformers, which then knows it as ``made_up``; the class of its model."""
    import torch
    import transformers
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    class MadeUpConfig(transformers.Qwen3Config):
        model_type = "made_up"

    class TorchMixer(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.in_proj = torch.nn.Linear(config.hidden_size, 3 * config.head_dim, bias=True)
            self.out_proj = torch.nn.Linear(3 * config.head_dim, config.hidden_size, bias=False)

        def forward(self, x: Any) -> Any:
            return self.out_proj(torch.nn.functional.silu(self.in_proj(x)))

    class MixerLayer(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.mixer_norm = qwen3.Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mixer = TorchMixer(config)

        def forward(self, x: Any, **_: Any) -> Any:
            return x + self.mixer(self.mixer_norm(x))

    class MadeUpForCausalLM(transformers.Qwen3ForCausalLM):
        config_class = MadeUpConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in range(1, config.num_hidden_layers, 2):
                self.model.layers[layer] = MixerLayer(config)
            self.post_init()

    transformers.AutoConfig.register("made_up", MadeUpConfig)
    transformers.AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM)
    return MadeUpForCausalLM
