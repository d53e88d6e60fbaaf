"""Requests for embeddings, scores and classes: OpenAI's names, and vLLM's and Cohere's where OpenAI has none."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qwen_serve.openai.fields import Body

MAX_INPUTS = 2048  # OpenAI's

Texts = str | list[str]
Inputs = Texts | list[int] | list[list[int]]


class PooledBody(Body):
    """What they have in common."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    # read by others, and without effect here
    user: str | None = None
    priority: int | None = None
    request_id: str | None = None


class Embeddings(PooledBody):
    """``POST /v1/embeddings``."""

    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    prompt_name: str | None = None
    instruction: str | None = None


class Classify(PooledBody):
    """``POST /classify``."""

    input: Inputs
    use_activation: bool | None = None


class Score(PooledBody):
    """``POST /score``: as many texts of each kind, or one for all."""

    text_1: Texts
    text_2: Texts
    instruction: str | None = None
    use_activation: bool | None = None


class DocumentObject(Body):
    """A document as an object."""

    text: str


class Rerank(PooledBody):
    """``POST /v1/rerank``, as Cohere and Jina have it."""

    query: str
    documents: list[str | DocumentObject]
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool | None = None
    instruction: str | None = None
