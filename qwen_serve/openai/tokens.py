"""``/tokenize``, ``/detokenize`` and ``/apply-template``: what the model would read, and nothing is answered."""

from __future__ import annotations

from typing import Any

from qwen_engine.errors import RequestError
from qwen_serve.common.errors import ServeError
from qwen_serve.engine.serving import Serving, refused
from qwen_serve.openai.chat import rendered
from qwen_serve.openai.fields import ApplyTemplate, Detokenize, Tokenize

_LONGEST = 1 << 20  # tokens that are looked up at once


async def tokenize(serving: Serving, body: Tokenize) -> dict[str, Any]:
    """The ids of a prompt or of a conversation.

    Raises:
        ServeError: there is neither, or both.
    """
    if (body.prompt is None) == (body.messages is None):
        raise ServeError("invalid_request", "expected one of prompt and messages", "prompt")
    tokenizer = serving.llm.llm.tokenizer
    try:
        if body.prompt is not None:
            ids = await serving.tokenizing(tokenizer.encode, body.prompt, body.add_special_tokens)
        else:
            prompt, _ = await rendered(serving, body, body.tools, body.chat_template_kwargs or {})
            ids = await serving.tokenizing(tokenizer.encode_pieces, prompt.pieces)
    except RequestError as error:
        raise refused(error) from None
    found: dict[str, Any] = {"count": len(ids), "max_model_len": serving.llm.llm.max_seq_len, "tokens": ids}
    if body.return_token_strs:
        found["token_strs"] = [tokenizer.token(token_id) for token_id in ids]
    return found


async def detokenize(serving: Serving, body: Detokenize) -> dict[str, Any]:
    """The text of ids.

    Raises:
        ServeError: there are too many, or one is no id.
    """
    tokenizer = serving.llm.llm.tokenizer
    if len(body.tokens) > _LONGEST or not all(0 <= token_id < 1 << 31 for token_id in body.tokens):
        raise ServeError("invalid_request", f"tokens: expected at most {_LONGEST} ids from 0 to 2^31 - 1", "tokens")
    return {"prompt": await serving.tokenizing(tokenizer.decode, body.tokens, False)}


async def apply_template(serving: Serving, body: ApplyTemplate) -> dict[str, Any]:
    """The text of a conversation as the model reads it.

    Raises:
        ServeError: the template refuses it.
    """
    prompt, _ = await rendered(serving, body, body.tools, body.chat_template_kwargs or {})
    return {"prompt": str(prompt)}
