"""Mixtures of experts: the modules of the graph around ``qwen::MoE``.

Shape letters: T tokens, H hidden_size, E experts, k of them a token, I moe_intermediate_size.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from qwen_build.checkpoint.config import ModelConfig
from qwen_build.graph.architecture import BlockSpec, LinearSpec
from qwen_build.graph.layers import (
    Linear,
    Matrix,
    SchemeChoice,
    Schemes,
    StepTensors,
    StoredModule,
    SubBlock,
    gated,
    linears_reading,
)
from qwen_build.quantization.schemes import Norm
from qwen_engine.graph_io import CHOSEN, PLUGIN_DOMAIN


class ExpertStack(StoredModule):
    """One linear of all experts: their weights, one after the other, each stored by itself."""

    def __init__(self, spec: LinearSpec, config: ModelConfig, choice: SchemeChoice):
        super().__init__(spec.shape(config), choice.scheme)
        assert spec.stack is not None, spec.name
        assert choice.permutation is None, "an operator of experts reads its inputs in their order"
        self.stack = spec.stack.count(config)
        self.gated_panels = spec.stack.gated and choice.scheme.fuses

    def forward(self, op: OpBuilder) -> list[ir.Value]:
        """What the operator reads of it."""
        return list(self.parts.values())


class ExpertWeights(nn.Module):
    """The linears of all experts of a layer."""

    gate_up_proj: ExpertStack
    down_proj: ExpertStack

    def __init__(self, config: ModelConfig, layer: int, schemes: Schemes, block: BlockSpec):
        super().__init__()
        for spec in block.linears:
            if spec.stack:
                choice = schemes.choice_of(f"model.layers.{layer}.{spec.name}")
                setattr(self, spec.name.rpartition(".")[2], ExpertStack(spec, config, choice))

    def forward(self, op: OpBuilder) -> list[ir.Value]:
        """What the operator reads of both, ``gate_up_proj`` first."""
        return [*self.gate_up_proj(op), *self.down_proj(op)]

    @property
    def attributes(self) -> dict[str, int | str]:
        """How both are stored, by the names of the operator's attributes."""
        stacks = {"gate_up": self.gate_up_proj, "down": self.down_proj}
        return {
            f"{name}_{key}": value for name, stack in stacks.items() for key, value in stack.scheme.in_experts.items()
        }


class Experts(SubBlock):
    """The weighted sum of the gated MLPs that the router chooses for a token, its k likeliest."""

    gate: Matrix  # the router

    def __init__(self, config: ModelConfig, layer: int, schemes: Schemes, block: BlockSpec):
        super().__init__(config, layer, schemes, block)
        self.experts = ExpertWeights(config, layer, schemes, block)

    def forward(self, op: OpBuilder, x: ir.Value, norm: Norm, step: StepTensors) -> ir.Value:
        """``x + experts(norm(x))``"""
        return self._mixed(op, x, norm, step)

    def _mixed(
        self,
        op: OpBuilder,
        x: ir.Value,
        norm: Norm,
        step: StepTensors,
        shared: ir.Value | None = None,
        shared_gate: ir.Value | None = None,
    ) -> ir.Value:
        """The residual ``x``, the experts of its norm, and ``shared`` (T, H) behind its gate (H)."""
        sizes, path = self.config.mixture, f"model.layers.{self.layer}"
        outputs = op.MoE(
            x, self.gate(op), *self.experts(op), norm.weight, None if step.exposing else x, shared, shared_gate,
            num_experts=sizes.num_experts, top_k=sizes.num_experts_per_tok, hidden_size=self.config.hidden_size,
            intermediate_size=sizes.moe_intermediate_size, norm_topk_prob=int(sizes.norm_topk_prob), epsilon=norm.eps,
            **self.experts.attributes, _domain=PLUGIN_DOMAIN, _outputs=5 if step.exposing else 1,
        )  # fmt: skip
        if not step.exposing:
            found: ir.Value = outputs
            return found
        y, product_input, chosen, _, inner = outputs
        step.expose(f"{path}.{self.block.norm}", product_input)
        step.expose(f"{path}.mlp.gate{CHOSEN}", chosen)
        step.inside[f"{path}.mlp.experts.down_proj.input"] = inner
        step.expose(f"{path}.mlp", y)
        return op.Add(x, y)


class SharedExpert(nn.Module):
    """A gated MLP that every token has beside its experts."""

    down_proj: Linear

    def __init__(self, config: ModelConfig, layer: int, schemes: Schemes):
        super().__init__()
        own = "mlp.shared_expert"
        gate_up = linears_reading(config, layer, schemes, "post_attention_layernorm", fused=f"{own}.gate_up_proj")
        down = linears_reading(config, layer, schemes, f"{own}.down_proj.input", own)
        self.gate_up = list(gate_up.values())
        for name, linear in (gate_up | down).items():
            setattr(self, name, linear)

    def forward(self, op: OpBuilder, x: ir.Value, norm: Norm, step: StepTensors) -> ir.Value:
        """``down(silu(gate(norm(x))) * up(norm(x)))``"""
        return self.down_proj(op, gated(op, self.gate_up, x, step, norm), step)


class SharedExperts(Experts):
    """The same, and what the shared expert makes of a token, times the sigmoid of its gate."""

    shared_expert_gate: Matrix

    def __init__(self, config: ModelConfig, layer: int, schemes: Schemes, block: BlockSpec):
        super().__init__(config, layer, schemes, block)
        self.shared_expert = SharedExpert(config, layer, schemes)

    def forward(self, op: OpBuilder, x: ir.Value, norm: Norm, step: StepTensors) -> ir.Value:
        """``x + experts(norm(x)) + sigmoid(gate(norm(x))) * shared_expert(norm(x))``"""
        shared = self.shared_expert(op, x, norm, step)
        return self._mixed(op, x, norm, step, shared, op.Squeeze(self.shared_expert_gate(op), [0]))
