"""Building blocks of the graph, one class per Hugging Face module, written in ONNX operators.

Shape letters: T new tokens, H hidden_size, N heads, K key/value heads, D head_dim, I
intermediate_size, V vocab_size, L tokens that get logits. Weights are (out_features, in_features).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from qwen_build.checkpoint.config import ModelConfig
from qwen_build.graph.architecture import BlockSpec, LinearSpec, layer_kind
from qwen_build.quantization.schemes import Fusion, Norm, Scheme
from qwen_engine.graph_io import (
    BLOCK_TABLE,
    CUMULATIVE_LENGTHS,
    EMBEDDING,
    HEAD,
    PAST_LENGTHS,
    PLUGIN_DOMAIN,
    key_cache_name,
    key_scale_name,
    value_cache_name,
    value_scale_name,
)
from qwen_engine.manifest import Quantization
from qwen_plugin.layout import GATED_PANELS, PANEL
from qwen_run.engine_files.stored_rows import WeightShape


@dataclass(frozen=True, eq=False)
class SchemeChoice:
    """How one linear of the checkpoint is stored.

    Attributes:
        permutation: int32 (in_features), stored column k multiplies input column permutation[k]; None: in order.
        packed: whether the checkpoint has it on this grid already, see ``checkpoint/stored.py``.
    """

    scheme: Scheme
    permutation: np.ndarray | None = None
    packed: bool = False

    def agrees(self, other: SchemeChoice) -> bool:
        """Whether both can lie in one weight."""
        if (self.scheme, self.packed) != (other.scheme, other.packed):
            return False
        if self.permutation is None or other.permutation is None:
            return self.permutation is other.permutation
        return np.array_equal(self.permutation, other.permutation)


@dataclass(frozen=True)
class Schemes:
    """How every linear is stored: those of the decoder layers, embedding and head, and exceptions by their name.

    Names are Hugging Face's, such as ``model.layers.0.mlp.up_proj``: never those of fused linears. Without ``fuse``,
    there are none.
    """

    linear: Scheme
    embedding: Scheme
    exceptions: Mapping[str, SchemeChoice] = field(default_factory=dict)
    fuse: bool = True

    def choice_of(self, name: str) -> SchemeChoice:
        default = self.embedding if name in (EMBEDDING, HEAD) else self.linear
        return self.exceptions.get(name) or SchemeChoice(default)


@dataclass(frozen=True)
class StepTensors:
    """What all layers of one run share: the graph's inputs, the rotary tables, and the exposed values.

    Attributes:
        exposing: whether this is the layers graph, so that every sub-block has to have a value of its own.
        exposed: these values, by the Hugging Face name of what computes them.
        inside: what calibration alone reads besides, inputs of linears inside an operator.
    """

    inputs: Mapping[str, ir.Value]
    cos: ir.Value  # (max_seq_len, D/2)
    sin: ir.Value
    exposing: bool
    exposed: dict[str, ir.Value] = field(default_factory=dict)
    inside: dict[str, ir.Value] = field(default_factory=dict)

    def expose(self, name: str | None, value: ir.Value) -> ir.Value:
        """Make ``value`` an output of the layers graph, under the Hugging Face name of what computes it."""
        if self.exposing and name is not None:
            self.exposed[name] = value
        return value


class StoredModule(nn.Module):
    """A weight (out_features, in_features) as its scheme stores it."""

    gated_panels = False  # whether rows of two halves take turns, see qwen_plugin/layout.py
    stack = 1  # weights in it that are stored one after the other

    def __init__(self, shape: WeightShape, scheme: Scheme):
        super().__init__()
        self.shape, self.scheme = shape, scheme
        for name, part in scheme.parts(self.shape).items():
            setattr(self, name, nn.Parameter(self.declared_shape(part.shape), part.dtype))

    def declared_shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which the operator of this module wants a part."""
        return stored

    @property
    def record(self) -> Quantization:
        """The weight as the manifest describes it."""
        record = self.scheme.record
        return replace(record, layout=GATED_PANELS) if self.gated_panels else record

    @property
    def parts(self) -> dict[str, ir.Value]:
        return {name: getattr(self, name) for name in self.scheme.parts(self.shape)}


class Linear(StoredModule):
    """``x @ weight.T + bias``, and what stands right before and after it.

    This is the only place that knows which schemes compute the surroundings in the operator of the product.

    Args:
        shape: (out_features, in_features)
        input_name: the name under which the layers graph exposes the product's input; None: not at all.
        output_name: the same of the product.
        gated: whether outputs are silu of the product's first half times its second.
    """

    def __init__(
        self,
        shape: WeightShape,
        choice: SchemeChoice,
        bias: bool = False,
        input_name: str | None = None,
        output_name: str | None = None,
        gated: bool = False,
    ):
        super().__init__(shape, choice.scheme)
        out_features = shape[0]
        self.permutation, self.gated = choice.permutation, gated
        self.gated_panels = gated and choice.scheme.fuses and out_features % PANEL == 0
        self.bias = nn.Parameter((out_features,)) if bias else None
        self.input_scale = nn.Parameter((1,)) if choice.scheme.record.activation_scales == "static" else None
        self.input_name, self.output_name = input_name, output_name

    def forward(
        self,
        op: OpBuilder,
        x: ir.Value,
        step: StepTensors,
        norm: Norm | None = None,
        residual: ir.Value | None = None,
    ) -> ir.Value:
        """``residual + linear(norm(x))``"""
        permutation = None if self.permutation is None else op.initializer(ir.tensor(self.permutation), "permutation")
        if not self.scheme.fuses:
            if norm is not None:
                x = op.RMSNormalization(x, norm.weight, axis=-1, epsilon=norm.eps)
            step.expose(self.input_name, x)
            if permutation is not None:
                x = op.Gather(x, permutation, axis=1)
            product, _ = self.scheme.linear(op, x, self.parts, self.bias, self.shape, Fusion())
            product = self._gate(op, product)
            step.expose(self.output_name, product)
            return product if residual is None else op.Add(residual, product)

        # A layers graph shows what the operator has inside; only the residual is added outside, to the same bits.
        added = None if step.exposing else residual
        fusion = Fusion(
            norm, self.gated_panels, added, permutation, self.input_scale, with_input=step.exposing and norm is not None
        )
        product, changed = self.scheme.linear(op, x, self.parts, self.bias, self.shape, fusion)
        product = self._gate(op, product)
        step.expose(self.input_name, changed or x)
        step.expose(self.output_name, product)
        return op.Add(residual, product) if step.exposing and residual is not None else product

    def _gate(self, op: OpBuilder, product: ir.Value) -> ir.Value:
        if not self.gated or self.gated_panels:  # where the operator does it
            return product
        return swiglu(op, *op.Split(product, axis=-1, num_outputs=2, _outputs=2))


def swiglu(op: OpBuilder, gate: ir.Value, up: ir.Value) -> ir.Value:
    """``silu(gate) * up`` (Shazeer, arXiv 2002.05202, eq. 6)"""
    return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)


def linears_reading(
    config: ModelConfig,
    layer: int,
    schemes: Schemes,
    input_name: str,
    output_name: str | None = None,
    fused: str | None = None,
) -> dict[str, Linear]:
    """The linears of a layer that multiply one input, as ``architecture.py`` describes them, by their graph names.

    Those that may stand in one weight do where they are stored alike; the first reader of the input exposes it.

    Args:
        input_name, output_name: what the layers graph calls the input and the products, inside the layer.
        fused: those alone that may stand in this weight.
    """
    path = f"model.layers.{layer}"
    readers = layer_kind(config, layer).readers(input_name)
    groups: dict[str, list[LinearSpec]] = {}  # what may be one weight
    for spec in readers:
        if fused is None or (spec.fused and spec.fused.name == fused):
            groups.setdefault(spec.fused.name if spec.fused else spec.name, []).append(spec)
    found: dict[str, Linear] = {}

    def add(name: str, rows: int, spec: LinearSpec, choice: SchemeChoice, gated: bool) -> None:
        exposed = f"{path}.{input_name}" if spec is readers[0] else None
        output = output_name and f"{path}.{output_name}"
        linear = Linear((rows, spec.reads.size(config)), choice, spec.bias(config), exposed, output, gated)
        found[name.rpartition(".")[2]] = linear

    for name, specs in groups.items():
        choices = [schemes.choice_of(f"{path}.{spec.name}") for spec in specs]
        if schemes.fuse and all(choices[0].agrees(choice) for choice in choices):
            gated = bool(specs[0].fused and specs[0].fused.gated)
            add(name, sum(spec.rows(config) for spec in specs), specs[0], choices[0], gated)
        else:
            for spec, choice in zip(specs, choices, strict=True):
                add(spec.name, spec.rows(config), spec, choice, gated=False)
    return found


def concatenated(op: OpBuilder, linears: Iterable[Linear], x: ir.Value, step: StepTensors, norm: Norm) -> ir.Value:
    """``linear(norm(x))`` of each of ``linears``, their outputs next to each other."""
    outputs = [linear(op, x, step, norm=norm) for linear in linears]
    return outputs[0] if len(outputs) == 1 else op.Concat(*outputs, axis=-1)


def gated(op: OpBuilder, linears: Iterable[Linear], x: ir.Value, step: StepTensors, norm: Norm) -> ir.Value:
    """``silu(gate(norm(x))) * up(norm(x))``, of two linears or of one that has the rows of both."""
    outputs = [linear(op, x, step, norm=norm) for linear in linears]
    return outputs[0] if len(outputs) == 1 else swiglu(op, *outputs)  # (T, I)


class Embedding(StoredModule):
    """Rows of a (vocab_size, hidden_size) weight; each row is contiguous, so a part is declared as a matrix."""

    def declared_shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return stored[0], math.prod(stored[1:])

    def forward(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        return self.scheme.lookup(op, input_ids, self.parts, self.shape)


class Matrix(nn.Module):
    """A float32 matrix that no scheme stores; what reads it multiplies."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.weight = nn.Parameter(shape)

    def forward(self, op: OpBuilder) -> ir.Value:
        return self.weight


class RMSNorm(nn.Module):
    """Zhang & Sennrich, arXiv 1910.07467, eq. 4: its weight; what reads the result applies it."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter((size,))
        self.eps = eps

    def forward(self, op: OpBuilder) -> Norm:
        return Norm(self.weight, self.eps)


class SubBlock(nn.Module):
    """A sub-block of a decoder layer, see :class:`~qwen_build.graph.architecture.BlockSpec`.

    Its linears, inner norms and float matrices are attributes, by the last part of the names they have in the graph; a
    norm that the model does without is None.
    """

    def __init__(self, config: ModelConfig, layer: int, schemes: Schemes, block: BlockSpec):
        super().__init__()
        self.config, self.layer, self.schemes, self.block = config, layer, schemes, block
        for norm in block.inner_norms:
            module = RMSNorm(norm.size(config), config.rms_norm_eps) if norm.present(config) else None
            setattr(self, norm.name.rpartition(".")[2], module)
        for matrix in block.floats:
            setattr(self, matrix.name.rpartition(".")[2], Matrix(matrix.shape(config)))

    def add_linears(self, input_name: str, output_name: str | None = None, fused: str | None = None) -> list[Linear]:
        """Make the linears of :func:`linears_reading` attributes."""
        linears = linears_reading(self.config, self.layer, self.schemes, input_name, output_name, fused)
        for name, linear in linears.items():
            setattr(self, name, linear)
        return list(linears.values())

    def forward(self, op: OpBuilder, x: ir.Value, norm: Norm, step: StepTensors) -> ir.Value:
        """``x + block(norm(x))``"""
        raise NotImplementedError


class MLP(SubBlock):
    """``down(silu(gate(x)) * up(x))``"""

    down_proj: Linear

    def __init__(self, config: ModelConfig, layer: int, schemes: Schemes, block: BlockSpec):
        super().__init__(config, layer, schemes, block)
        self.gate_up = self.add_linears("post_attention_layernorm", fused="mlp.gate_up_proj")
        self.add_linears("mlp.down_proj.input", "mlp")

    def forward(self, op: OpBuilder, x: ir.Value, norm: Norm, step: StepTensors) -> ir.Value:
        """``x + mlp(norm(x))``"""
        return self.down_proj(op, gated(op, self.gate_up, x, step, norm), step, residual=x)


class Attention(SubBlock):
    """Grouped-query attention over the paged cache; rotary embedding and q/k norm inside the operator."""

    window: int | None = None  # the last tokens that it attends to, itself included; None: all
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    def __init__(self, config: ModelConfig, layer: int, schemes: Schemes, block: BlockSpec):
        super().__init__(config, layer, schemes, block)
        self.qkv = self.add_linears("input_layernorm", fused="self_attn.qkv_proj")
        self.add_linears("self_attn.o_proj.input", "self_attn")

    def forward(self, op: OpBuilder, x: ir.Value, norm: Norm, step: StepTensors) -> ir.Value:
        """``x + attention(norm(x))``"""
        inputs, config = step.inputs, self.config
        attended = op.PagedAttention(
            concatenated(op, self.qkv, x, step, norm), None, None,  # packed: no separate key and value
            inputs[key_cache_name(self.layer)], inputs[value_cache_name(self.layer)],
            inputs[CUMULATIVE_LENGTHS], inputs[PAST_LENGTHS], inputs[BLOCK_TABLE], step.cos, step.sin,
            None, None,  # slot_mapping, head_sink
            self.q_norm(op).weight if self.q_norm else None, self.k_norm(op).weight if self.k_norm else None,
            inputs.get(key_scale_name(self.layer)), inputs.get(value_scale_name(self.layer)),
            num_heads=config.num_attention_heads, kv_num_heads=config.num_key_value_heads,
            **({"local_window_size": self.window} if self.window else {}),
            do_rotary=1, scale=config.head_dim**-0.5, qk_norm_epsilon=config.rms_norm_eps, _domain=PLUGIN_DOMAIN,
        )  # fmt: skip
        return self.o_proj(op, attended, step, residual=x)


class SlidingAttention(Attention):
    """The same over the last ``config.sliding_window`` tokens."""

    def __init__(self, config: ModelConfig, layer: int, schemes: Schemes, block: BlockSpec):
        super().__init__(config, layer, schemes, block)
        self.window = config.sliding_window
