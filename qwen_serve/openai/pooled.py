"""``/v1/embeddings``, ``/v1/rerank``, ``/score`` and ``/classify``: texts in, numbers out, none of them streamed."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_engine.errors import RequestError
from qwen_engine.tasks import check_task
from qwen_run.api.async_llm import RequestStream
from qwen_run.api.pooled import as_pairs
from qwen_run.api.pooling import PoolingParams, check_dimensions, classification, embedding, prompted
from qwen_serve.common.errors import ServeError
from qwen_serve.engine.job import RequestJob
from qwen_serve.engine.serving import refused
from qwen_serve.openai.pooled_fields import MAX_INPUTS, Classify, DocumentObject, Embeddings, PooledBody, Rerank, Score

# fields of a request that are fields of PoolingParams
_PARAMS = ("dimensions", "normalize", "use_activation", "truncate_prompt_tokens", "cache_salt")


async def embed(job: RequestJob, body: Embeddings, salt: str | None) -> dict[str, Any]:
    """The embeddings of texts, as numbers or as base64 of little-endian float32.

    Raises:
        ServeError: the engine makes none, or something in the request is wrong.
    """
    llm = job.serving.llm.llm
    try:
        check_task(llm.task, "embed")
        params = _params(body, salt)
        check_dimensions(params, llm.core.engine.manifest.model.hidden_size)
        texts = [prompted(each, llm.pooling, body.prompt_name, body.instruction) for each in _inputs(body.input)]
    except RequestError as error:
        raise refused(error) from None
    rows = [embedding(output, llm.pooling, params) for output in await _outputs(job, body, texts, params)]
    as_text = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(row) if as_text else row.tolist()}
        for index, row in enumerate(rows)
    ]
    return {**job.head("embd", "list"), "data": data, "usage": _usage(job), **_warnings(body)}


async def classify(job: RequestJob, body: Classify, salt: str | None) -> dict[str, Any]:
    """The classes of texts.

    Raises:
        ServeError: the engine knows none, or something in the request is wrong.
    """
    llm = job.serving.llm.llm
    try:
        check_task(llm.task, "classify")
        params = _params(body, salt)
    except RequestError as error:
        raise refused(error) from None
    outputs = await _outputs(job, body, _inputs(body.input), params)
    found = [classification(output, llm.pooling, params) for output in outputs]
    data = [
        {"index": index, "label": each.label, "probs": each.probs, "num_classes": each.num_classes}
        for index, each in enumerate(found)
    ]
    return {**job.head("classify", "list"), "data": data, "usage": _usage(job), **_warnings(body)}


async def score(job: RequestJob, body: Score, salt: str | None) -> dict[str, Any]:
    """How well texts of the second kind answer those of the first.

    Raises:
        ServeError: the engine compares none, or something in the request is wrong.
    """
    for name, texts in (("text_1", body.text_1), ("text_2", body.text_2)):
        _check_count(name, texts)
    scores = await _scores(job, body, body.text_1, body.text_2, body.instruction, salt)
    data = [{"index": index, "object": "score", "score": each} for index, each in enumerate(scores)]
    return {**job.head("score", "list"), "data": data, "usage": _usage(job), **_warnings(body)}


async def rerank(job: RequestJob, body: Rerank, salt: str | None) -> dict[str, Any]:
    """The documents that answer the query best come first; equal ones in their order.

    Raises:
        ServeError: as :func:`score`.
    """
    _check_count("documents", body.documents)
    documents = [each.text if isinstance(each, DocumentObject) else each for each in body.documents]
    scores = await _scores(job, body, body.query, documents, body.instruction, salt)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    results = [
        {"index": index, "relevance_score": scores[index]}
        | ({} if body.return_documents is False else {"document": {"text": documents[index]}})
        for index in order[: body.top_n or None]
    ]
    head = {name: value for name, value in job.head("rerank", "list").items() if name in ("id", "model")}
    return {**head, "results": results, "usage": _usage(job), **_warnings(body)}


async def _scores(
    job: RequestJob,
    body: PooledBody,
    first: str | list[str],
    second: str | list[str],
    instruction: str | None,
    salt: str | None,
) -> list[float]:
    llm = job.serving.llm.llm
    try:
        params = _params(body, salt)
        couples = as_pairs(first, second)
        pairs = await job.serving.tokenizing(llm.pairs, couples, params, instruction)
    except RequestError as error:
        raise refused(error) from None
    return pairs.scores(await _outputs(job, body, pairs.prompts, params))


async def _outputs(
    job: RequestJob, body: PooledBody, prompts: Sequence[str | Sequence[int]], params: PoolingParams
) -> list[np.ndarray]:
    """What the last token of each prompt puts out; as many run at once as a batch has places."""
    serving = job.serving
    serving.check_model(body.model)
    llm = serving.llm.llm
    places = min(len(prompts), llm.core.options.max_batch_size)
    job.enter(places)
    running: deque[RequestStream] = deque()
    found: list[np.ndarray] = []
    for index, prompt in enumerate(prompts):
        if len(running) == places:
            found.append(await _ended(job, running.popleft()))
        name = f"input {index + 1}" if len(prompts) > 1 else "the input"
        try:
            pending = await serving.tokenizing(llm.prepare_pooled, prompt, params, name, name)
        except RequestError as error:
            raise refused(error) from None
        running.append(await job.begin(pending.request.prompt, params))
    found += [await _ended(job, stream) for stream in running]
    return found


async def _ended(job: RequestJob, stream: RequestStream) -> np.ndarray:
    async for _ in job.outputs(stream):
        pass
    output = stream.pending.request.pooled
    assert output is not None
    return output


def _inputs(given: Any) -> list[str | list[int]]:
    """The texts or token ids of a request, one or many.

    Raises:
        ServeError: there are none, or too many.
    """
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    _check_count("input", given)
    return list(given)


def _check_count(name: str, texts: str | Sequence[Any]) -> None:
    """
    Raises:
        ServeError: the field ``name`` has no ``texts``, or too many.
    """
    if not isinstance(texts, str) and not 1 <= len(texts) <= MAX_INPUTS:
        raise ServeError("invalid_request", f"{name} has {len(texts)} texts, expected 1 to {MAX_INPUTS}", name)


def _params(body: PooledBody, salt: str | None) -> PoolingParams:
    fields = {name: getattr(body, name) for name in _PARAMS if getattr(body, name, None) is not None}
    if salt is not None:
        fields["cache_salt"] = salt + (body.cache_salt or "")
    return PoolingParams(**fields)


def _base64(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def _usage(job: RequestJob) -> dict[str, Any]:
    counted = job.counted
    details = {"cached_tokens": counted.cached_tokens}
    return {
        "prompt_tokens": counted.prompt_tokens,
        "total_tokens": counted.prompt_tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": details,
    }


def _warnings(body: PooledBody) -> dict[str, Any]:
    return {"warnings": body.warnings} if body.warnings else {}
