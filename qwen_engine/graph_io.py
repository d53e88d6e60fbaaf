"""The names, types and shapes of the graph's inputs and outputs.

One graph serves prefill, chunked prefill, decode and any mixture of them: the new tokens of all
sequences stand one after the other, without a batch axis and without padding.

Symbolic dimensions: ``T`` new tokens, ``S`` sequences, ``L`` tokens that get logits,
``max_blocks`` width of the block table, ``num_blocks`` size of the cache pool, ``num_slots`` sequences that have a
state of their own, ``E`` tokens that are given as embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["token", "sequence", "selection", "embedding", "paged_state", "sequence_state"]
Dimension = int | str

INPUT_IDS = "input_ids"
CUMULATIVE_LENGTHS = "cumulative_lengths"
PAST_LENGTHS = "past_lengths"
BLOCK_TABLE = "block_table"
LOGITS_INDICES = "logits_indices"
EMBEDS = "inputs_embeds"
EMBEDS_INDICES = "embeds_indices"
LOGITS = "logits"

# The modules that have the vocabulary, as Hugging Face names them.
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

# What the names of a decoder layer's modules, weights and operators' inputs begin with.
LAYERS = "model.layers"
_LAYER = re.compile(rf"{re.escape(LAYERS)}\.(\d+)(?:\.|$)")

# The domain of the plugin's operators.
PLUGIN_DOMAIN = "qwen"

# Tokens that share one tile of the key cache, in which keys lie transposed. A constant of the operator.
KEY_TILE = 32


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the graph.

    ``kind`` says what the runtime has to do with it:

    - ``token``: one row a new token;
    - ``sequence``: one row a sequence;
    - ``selection``: one row a token that gets logits;
    - ``embedding``: one row a token that is given as an embedding, mostly none;
    - ``paged_state``: a pool of cache blocks (num_blocks, ...) that the graph updates in place;
    - ``sequence_state``: one row a sequence (num_slots, ...) that the graph updates in place, whatever its length.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[Dimension, ...]
    layer: int | None = None


# The kinds that hold something from one run to the next -> the first dimension of such an input.
STATE_KINDS: dict[str, str] = {"paged_state": "num_blocks", "sequence_state": "num_slots"}

BATCH_INPUTS = (
    TensorSpec(INPUT_IDS, "token", "int64", ("T",)),
    TensorSpec(CUMULATIVE_LENGTHS, "sequence", "int32", ("S+1",)),
    TensorSpec(PAST_LENGTHS, "sequence", "int32", ("S",)),
    TensorSpec(BLOCK_TABLE, "sequence", "int32", ("S", "max_blocks")),
    TensorSpec(LOGITS_INDICES, "selection", "int64", ("L",)),
)


def layer_of(name: str) -> int | None:
    """The decoder layer that a module or weight of this name belongs to.

    >>> layer_of("model.layers.12.mlp.down_proj.panels"), layer_of("model.norm.weight")
    (12, None)
    """
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def embeds_inputs(hidden_size: int) -> tuple[TensorSpec, ...]:
    """What a batch of an engine built with ``--inputs-embeds`` has besides: rows in place of those looked up.

    ``embeds_indices`` says which of the ``T`` tokens they are; the ids of these count for nothing.
    """
    return (
        TensorSpec(EMBEDS, "embedding", "float32", ("E", hidden_size)),
        TensorSpec(EMBEDS_INDICES, "embedding", "int64", ("E",)),
    )


def find_batch_fault(inputs: Sequence[TensorSpec], hidden_size: int) -> str | None:
    """The first input of a batch that no runtime feeds, or half of a pair; to be read after a file's name."""
    embeds = embeds_inputs(hidden_size)
    given = {spec.name for spec in inputs}
    if INPUT_IDS not in given:
        return f" has no input {INPUT_IDS}"
    fed = (*BATCH_INPUTS, *(embeds if given & {spec.name for spec in embeds} else ()))
    if other := next((spec for spec in inputs if spec not in fed), None):
        return f": input {other.name} is not as expected, a batch has {', '.join(spec.name for spec in fed)}"
    missing = next((spec.name for spec in fed[len(BATCH_INPUTS) :] if spec.name not in given), None)
    return None if missing is None else f" has no input {missing}"


# What the names of an attention layer's states begin with; the number of the layer follows.
KEY_VALUE_POOLS = ("key_cache.", "value_cache.", "key_scale.", "value_scale.")


def key_cache_name(layer: int) -> str:
    return f"key_cache.{layer}"


def value_cache_name(layer: int) -> str:
    return f"value_cache.{layer}"


def key_scale_name(layer: int) -> str:
    return f"key_scale.{layer}"


def value_scale_name(layer: int) -> str:
    return f"value_scale.{layer}"


def cache_inputs(
    layers: Sequence[int], kv_heads: int, head_dim: int, block_size: int, dtype: str
) -> tuple[TensorSpec, ...]:
    """The cache pools as the CPU operator reads them, for each of ``layers``.

    A key block is (kv_heads, block_size / 32, head_dim, 32): transposed within tiles of 32 tokens, so
    that scores need no horizontal sums. A value block is (kv_heads, block_size, head_dim). An int8 cache has a
    float32 scale for each key and value, (kv_heads, block_size) a block: the number cached is scale * element.
    """
    key = ("num_blocks", kv_heads, block_size // KEY_TILE, head_dim, KEY_TILE)
    value = ("num_blocks", kv_heads, block_size, head_dim)
    pools: list[tuple[Callable[[int], str], str, tuple[Dimension, ...]]] = [
        (key_cache_name, dtype, key),
        (value_cache_name, dtype, value),
    ]
    if dtype == "int8":
        scale = ("num_blocks", kv_heads, block_size)
        pools += [(key_scale_name, "float32", scale), (value_scale_name, "float32", scale)]
    return tuple(
        TensorSpec(name(layer), "paged_state", pool_dtype, shape, layer)
        for layer in layers
        for name, pool_dtype, shape in pools
    )
