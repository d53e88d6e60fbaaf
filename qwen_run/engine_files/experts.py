"""How much of an engine's weights a token reads: of experts, those alone that its router chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_engine.graph_io import EMBEDDING
from qwen_engine.manifest import LinearRecord
from qwen_engine.sizes import ModelSizes


@dataclass(frozen=True)
class ExpertTotals:
    """The experts of all layers.

    Attributes:
        layers: that have experts.
        stored_bytes: of all experts, without the shared one.
        read_bytes: of those that a token has.
    """

    layers: int
    num_experts: int
    num_experts_per_tok: int
    stored_bytes: int
    read_bytes: int

    @property
    def words(self) -> str:
        """How many there are, for people."""
        return f"{self.num_experts_per_tok} of {self.num_experts} a token in each of {self.layers} layers"


def expert_totals(linears: Sequence[LinearRecord], model: ModelSizes) -> ExpertTotals | None:
    """The experts among ``linears``; None where the model has none."""
    sizes, own = model.experts, [linear for linear in linears if _is_of_experts(linear)]
    if sizes is None or not own:
        return None
    layers = {linear.name.rpartition(".")[0] for linear in own}
    read = sum(read_bytes(linear, model) for linear in own)
    stored = sum(linear.stored_bytes for linear in own)
    return ExpertTotals(len(layers), sizes.num_experts, sizes.num_experts_per_tok, stored, read)


def read_bytes(linear: LinearRecord, model: ModelSizes) -> int:
    """Bytes of ``linear`` that one token reads: all, but a row of the embedding, and of experts those it has."""
    if linear.name == EMBEDDING:
        return linear.stored_bytes // linear.out_features
    return linear.stored_bytes * weights_read(linear, model) // linear.stack


def weights_read(linear: LinearRecord, model: ModelSizes) -> int:
    """Weights of the stack ``linear`` that one token reads: of experts those it has, else all."""
    return model.experts.num_experts_per_tok if model.experts is not None and _is_of_experts(linear) else linear.stack


def _is_of_experts(linear: LinearRecord) -> bool:
    return any("*" in part.name for part in linear.parts)
