"""What programs give as a prompt: a text, the token ids of one, or a conversation that a template wrote."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Mapping
from collections.abc import Sequence as List
from typing import Any

from qwen_engine.errors import RequestError

Prompt = str | List[int] | Mapping[str, Any]


class ChatPrompt(str):
    """A conversation as the chat template wrote it, to which the tokenizer adds nothing.

    Attributes:
        pieces: what is encoded one by one, so that a control token which a message spells stays text.
    """

    pieces: tuple[str, ...]

    def __new__(cls, *pieces: str) -> ChatPrompt:
        prompt = super().__new__(cls, "".join(pieces))
        prompt.pieces = pieces
        return prompt


def as_list(prompts: Prompt | List[Prompt]) -> List[Prompt]:
    """``prompts`` as a list: a text is one prompt, and so is a list that begins with a token id."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, List) or isinstance(prompts, bytes):
        raise RequestError(f"prompts is {reprlib.repr(prompts)}, expected a text, token ids, or a list of them")
    is_one = len(prompts) > 0 and not isinstance(prompts[0], str | List | Mapping)
    return [prompts] if is_one else prompts  # type: ignore[list-item, return-value]


def plain(prompt: Prompt, name: str) -> str | List[int]:
    """``prompt`` without the object that vLLM puts around a text or token ids."""
    if not isinstance(prompt, Mapping):
        return prompt
    given = {key: value for key, value in prompt.items() if value is not None}
    ids, text = given.pop("prompt_token_ids", None), given.pop("prompt", None)
    if given or (ids is None and not isinstance(text, str)):
        raise RequestError(f"{name} is {reprlib.repr(prompt)}, expected an object with prompt or prompt_token_ids")
    return str(text) if ids is None else ids


def token_ids(prompt: List[int], name: str) -> list[int]:
    try:
        return [operator.index(token_id) for token_id in prompt]
    except TypeError:
        raise RequestError(f"{name} is {reprlib.repr(prompt)}, expected a text or token ids") from None
