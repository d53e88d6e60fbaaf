"""The sizes of a model, as its manifest has them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertSizes:
    """The sizes of a mixture of experts, in Hugging Face's own field names.

    Attributes:
        num_experts_per_tok: experts that a token has.
        moe_intermediate_size: of one expert.
        shared_expert_intermediate_size: of the expert that every token has beside those; 0: there is none.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of the model, in Hugging Face's own field names.

    Attributes:
        experts: of the layers that are mixtures of experts; None: there are none.
        rope_type, rope_factor: ``rope_type`` and ``factor`` of the rope object; "default" and 1 where there is none.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_type: str
    rope_factor: float
    tie_word_embeddings: bool
    experts: ExpertSizes | None

    @property
    def mixture(self) -> ExpertSizes:
        """:attr:`experts` of a model that has some."""
        assert self.experts is not None, "no layer of this model is a mixture of experts"
        return self.experts

    @property
    def rope_words(self) -> str | None:
        """What to know of the rotation of positions; None: nothing."""
        if self.rope_type != "yarn":
            return None
        return (
            f"positions are stretched by YaRN, {self.rope_factor:g} times: one rotation for every length, "
            "which changes the answers to short texts a little"
        )
