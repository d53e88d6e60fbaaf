"""Building blocks of the graph, one class per Hugging Face module, written in ONNX operators.

Shape letters: T new tokens, H hidden_size, N heads, K key/value heads, D head_dim, I
intermediate_size, V vocab_size, L tokens that get logits. Weights are (out_features, in_features).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from qwen_build.config import ModelConfig
from qwen_build.quantize import Scheme
from qwen_engine.graph_io import (
    BLOCK_TABLE,
    CUMULATIVE_LENGTHS,
    PAST_LENGTHS,
    PLUGIN_DOMAIN,
    key_cache_name,
    value_cache_name,
)


@dataclass(frozen=True)
class Step:
    """What all layers of one run share: the graph's inputs, the rotary tables, and the exposed values."""

    inputs: Mapping[str, ir.Value]
    cos: ir.Value  # (max_seq_len, D/2)
    sin: ir.Value
    exposed: dict[str, ir.Value] = field(default_factory=dict)

    def expose(self, name: str, value: ir.Value) -> ir.Value:
        """Make ``value`` an output of the layers graph, under the Hugging Face name of what computes it."""
        self.exposed[name] = value
        return value


class Stored(nn.Module):
    """A weight (out_features, in_features) as its scheme stores it."""

    def __init__(self, out_features: int, in_features: int, scheme: Scheme):
        super().__init__()
        self.out_features, self.in_features, self.scheme = out_features, in_features, scheme
        for name, part in scheme.parts(out_features, in_features).items():
            setattr(self, name, nn.Parameter(self.declared_shape(part.shape), part.dtype))

    def declared_shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which the operator of this module wants a part."""
        return stored

    @property
    def parts(self) -> dict[str, ir.Value]:
        return {name: getattr(self, name) for name in self.scheme.parts(self.out_features, self.in_features)}


class Linear(Stored):
    """``x @ weight.T + bias``."""

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, bias: bool = False):
        super().__init__(out_features, in_features, scheme)
        self.bias = nn.Parameter((out_features,)) if bias else None

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self.scheme.linear(op, x, self.parts, self.bias, self.in_features)


class Embedding(Stored):
    """Rows of a (vocab_size, hidden_size) weight; each row is contiguous, so a part is declared as a matrix."""

    def declared_shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return stored[0], math.prod(stored[1:])

    def forward(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        return self.scheme.lookup(op, input_ids, self.parts, self.in_features)


class RMSNorm(nn.Module):
    """Zhang & Sennrich, arXiv 1910.07467, eq. 4."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter((size,))
        self.eps = eps

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.eps)


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (Shazeer, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig, layer: int, scheme: Scheme):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.path = f"model.layers.{layer}.mlp"
        self.gate_up_proj = Linear(hidden, 2 * inner, scheme)
        self.down_proj = Linear(inner, hidden, scheme)

    def forward(self, op: OpBuilder, x: ir.Value, step: Step) -> ir.Value:
        gate, up = op.Split(self.gate_up_proj(op, x), axis=-1, num_outputs=2, _outputs=2)  # (T, I) each
        product = op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)
        step.expose(f"{self.path}.down_proj.input", product)
        return step.expose(self.path, self.down_proj(op, product))


class HeadNorm(nn.Module):
    """The weight of an RMS norm over each head, applied inside the attention operator."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter((head_dim,))

    def forward(self, op: OpBuilder) -> ir.Value:
        return self.weight


class Attention(nn.Module):
    """Grouped-query attention over the paged cache; rotary embedding and q/k norm inside the operator."""

    def __init__(self, config: ModelConfig, layer: int, scheme: Scheme):
        super().__init__()
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.layer, self.path = config, layer, f"model.layers.{layer}.self_attn"
        self.qkv_proj = Linear(
            config.hidden_size, (heads + 2 * kv_heads) * head_dim, scheme, bias=config.architecture.attention_bias
        )
        self.o_proj = Linear(heads * head_dim, config.hidden_size, scheme)
        self.q_norm = HeadNorm(head_dim) if config.architecture.qk_norm else None
        self.k_norm = HeadNorm(head_dim) if config.architecture.qk_norm else None

    def forward(self, op: OpBuilder, x: ir.Value, step: Step) -> ir.Value:
        inputs, config = step.inputs, self.config
        output = op.PagedAttention(
            self.qkv_proj(op, x), None, None,  # packed: no separate key and value
            inputs[key_cache_name(self.layer)], inputs[value_cache_name(self.layer)],
            inputs[CUMULATIVE_LENGTHS], inputs[PAST_LENGTHS], inputs[BLOCK_TABLE], step.cos, step.sin,
            None, None,  # slot_mapping, head_sink
            self.q_norm(op) if self.q_norm else None, self.k_norm(op) if self.k_norm else None,
            num_heads=config.num_attention_heads, kv_num_heads=config.num_key_value_heads,
            do_rotary=1, scale=config.head_dim**-0.5, qk_norm_epsilon=config.rms_norm_eps, _domain=PLUGIN_DOMAIN,
        )  # fmt: skip
        step.expose(f"{self.path}.o_proj.input", output)
        return step.expose(self.path, self.o_proj(op, output))
