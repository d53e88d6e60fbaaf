"""Log probabilities in the two forms that OpenAI's interfaces have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qwen_run.api.outputs import Logprobs
from qwen_run.text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no infinity


def chat_logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], found: Sequence[Logprobs], top: int) -> list[Any]:
    """Of each token: its text, bytes, and the ``top`` likeliest."""
    entries = []
    for token_id, logprobs in zip(token_ids, found, strict=True):
        likeliest = sorted(logprobs.items(), key=lambda item: item[1].rank)[:top]
        own = _entry(tokenizer, token_id, logprobs[token_id].logprob)
        own["top_logprobs"] = [_entry(tokenizer, other, each.logprob) for other, each in likeliest]
        entries.append(own)
    return entries


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], found: Sequence[Logprobs | None], top: int, offset: int
) -> dict[str, Any]:
    """The same in columns; ``offset`` is where the first token begins in the text. None: nothing is known."""
    tokens = [_text(tokenizer, token_id) for token_id in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    own = [None if each is None else finite(each[i].logprob) for i, each in zip(token_ids, found, strict=True)]
    likeliest = [
        None
        if each is None
        else {
            _text(tokenizer, other): finite(entry.logprob)
            for other, entry in sorted(each.items(), key=lambda item: item[1].rank)[: max(top, 1)]
        }
        for each in found
    ]
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": likeliest, "text_offset": offsets}


def finite(logprob: float) -> float:
    """``logprob`` as JSON can write it.

    >>> finite(float("-inf"))
    -9999.0
    """
    return max(LOWEST, logprob) if not math.isnan(logprob) else LOWEST


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.token_bytes(token_id)
    return {"token": text.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(text)}


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")
