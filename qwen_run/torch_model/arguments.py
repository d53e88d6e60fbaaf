"""What :meth:`QwenForCausalLM.forward` is given, checked."""

from __future__ import annotations

from typing import Any

import torch

from qwen_engine.manifest import Manifest
from qwen_run.torch_model.paged_cache import PagedCache


def refuse_others(**others: Any) -> None:
    """Refuse what an engine does not compute; what is absent or False is not asked for.

    Raises:
        ValueError: something is asked for; the message names it.
    """
    reasons = {
        "output_hidden_states": "an engine returns logits alone; leave it out",
        "output_attentions": "an engine returns logits alone; leave it out",
    }
    for name, value in others.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} is given, {reasons.get(name, 'an engine has no such input; leave it out')}")


def check_cache(past_key_values: Any) -> PagedCache:
    """``past_key_values``, of a kind that the model returns.

    Raises:
        ValueError: it is another.
    """
    if not isinstance(past_key_values, PagedCache):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}, expected a PagedCache; leave it out, or take "
            "new_cache()"
        )
    return past_key_values


def check_ids(input_ids: Any, vocab_size: int) -> torch.Tensor:
    """``input_ids`` on the processor, (rows, columns) int64.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        shape = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids is {shape}, expected a tensor of integers (rows, columns)")
    ids = input_ids.cpu().long()
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"input_ids holds {int(ids.min())} to {int(ids.max())}, expected 0 to {vocab_size - 1}")
    return ids


def check_embeds(inputs_embeds: Any, manifest: Manifest) -> torch.Tensor:
    """``inputs_embeds`` on the processor, (rows, columns, hidden_size) float32.

    Raises:
        ValueError: they are something else, ask for gradients, or the engine takes none.
    """
    if not manifest.takes_embeds:
        raise ValueError(
            "inputs_embeds is given, the engine was built without; give input_ids, or build it with --inputs-embeds "
            "(engine_use_inputs_embeds=True)"
        )
    is_float = isinstance(inputs_embeds, torch.Tensor) and inputs_embeds.is_floating_point()
    if not is_float or inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != manifest.model.hidden_size:
        shape = tuple(inputs_embeds.shape) if isinstance(inputs_embeds, torch.Tensor) else type(inputs_embeds).__name__
        raise ValueError(
            f"inputs_embeds is {shape}, expected a tensor of floats (rows, columns, {manifest.model.hidden_size})"
        )
    if inputs_embeds.requires_grad and torch.is_grad_enabled():
        raise ValueError("inputs_embeds ask for gradients, an engine has none; give inputs_embeds.detach()")
    embeds = inputs_embeds.detach().cpu().float()
    if not bool(torch.isfinite(embeds).all()):
        raise ValueError("inputs_embeds holds numbers that are not finite, expected finite ones")
    return embeds


def new_columns(ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: PagedCache) -> torch.Tensor:
    """(rows, columns) bool, where the columns ``ids`` are tokens.

    Raises:
        ValueError: the mask has another shape, or says of columns that were read what they were not.
    """
    past, (rows, width) = cache.get_seq_length(), ids.shape
    if rows != cache.batch_size:
        raise ValueError(f"the input has {rows} rows, expected {cache.batch_size} as past_key_values")
    if attention_mask is None:
        return torch.ones(rows, width, dtype=torch.bool)
    mask = attention_mask.cpu().bool()
    if mask.shape != (rows, past + width):
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, expected {(rows, past + width)}: all columns so far")
    if not torch.equal(mask[:, :past], cache.shown):
        raise ValueError("attention_mask hides columns that past_key_values has read, expected what it was then")
    return mask[:, past:]


def check_positions(position_ids: torch.Tensor | None, cache: PagedCache, new: torch.Tensor) -> None:
    """Refuse positions other than those of the tokens of each row, counted from 0.

    Raises:
        ValueError: some differ.
    """
    if position_ids is None:
        return
    counted = torch.tensor(cache.rows.lengths)[:, None] + new.long().cumsum(1) - 1
    given = position_ids.cpu().expand_as(counted)
    if bool((given != counted)[new].any()):
        raise ValueError("position_ids do not count the tokens of each row from 0, expected those; leave them out")


def next_labels(labels: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The label of the next token of the row, (rows, columns) int64; -100 of padding and of a row's last token.

    Raises:
        ValueError: ``labels`` have another shape than the columns ``new``.
    """
    if labels.shape != new.shape:
        raise ValueError(f"labels is {tuple(labels.shape)}, expected {tuple(new.shape)}, a label for each column")
    following = torch.full(new.shape, -100)
    for row, tokens in enumerate(new):
        at = torch.nonzero(tokens)[:, 0]
        following[row, at[:-1]] = labels[row, at[1:]].cpu().long()
    return following
