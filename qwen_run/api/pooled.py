"""What engines without a vocabulary answer: :class:`PooledLLM`, which every ``LLM`` is."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as List
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from qwen_engine.errors import EngineError, RequestError
from qwen_engine.tasks import Pooling, check_task
from qwen_run.api.pending_request import PendingRequest
from qwen_run.api.pooling import (
    ClassificationOutput,
    EmbeddingOutput,
    Pairs,
    PoolingParams,
    PoolingRequestOutput,
    ScoringOutput,
    check_dimensions,
    classification,
    compared,
    embedding,
    prompted,
    reranked,
)
from qwen_run.api.prompts import Prompt, as_list, plain, token_ids
from qwen_run.api.request_loop import RequestLoop
from qwen_run.runtime.request import Request
from qwen_run.sampling.params import SamplingParams
from qwen_run.text.text_model import TextModel

Made = TypeVar("Made")


class PooledLLM(RequestLoop, ABC):
    """Embeddings, classes and scores of texts, many at once, each as it would be alone."""

    _text: TextModel | None

    @property
    def task(self) -> str:
        """What the engine is for: ``generate``, ``embed``, ``classify`` or ``score``."""
        return self.core.engine.manifest.task

    @cached_property
    def pooling(self) -> Pooling:
        """What the checkpoint says of what becomes of an output.

        Raises:
            EngineError: the engine's ``pooling.json`` is damaged.
        """
        return Pooling.read(self.core.engine.directory)

    def embed(
        self,
        prompts: Prompt | List[Prompt],
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        *,
        prompt_name: str | None = None,
        instruction: str | None = None,
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """The embeddings of texts.

        Args:
            prompts: a text or the token ids of one, or a list of either.
            prompt_name: what of the checkpoint's prompts is put before each text, such as ``query``.
            instruction: what a query is for; ``Instruct: …`` and ``Query:`` are put before each text.
            use_tqdm: show progress where standard error is a terminal.

        Returns:
            One result a text, in their order; ``outputs.embedding`` holds the numbers.

        Raises:
            RequestError: the engine makes no embeddings; a text is empty or too long, or an argument out of range.
            EngineError: the engine cannot run.
        """
        check_task(self.task, "embed")
        params = _checked(pooling_params)
        check_dimensions(params, self.core.engine.manifest.model.hidden_size)
        plain_ones = [plain(each, "a prompt") for each in as_list(prompts)]
        texts = [prompted(each, self.pooling, prompt_name, instruction) for each in plain_ones]

        def made(output: np.ndarray) -> EmbeddingOutput:
            return EmbeddingOutput(embedding(output, self.pooling, params).tolist())

        return self._made(texts, params, use_tqdm, made)

    def classify(
        self, prompts: Prompt | List[Prompt], pooling_params: PoolingParams | None = None, use_tqdm: bool = True
    ) -> list[PoolingRequestOutput[ClassificationOutput]]:
        """The classes of texts; arguments as for :meth:`embed`.

        Returns:
            One result a text, in their order; ``outputs.probs`` holds a number for each label.

        Raises:
            RequestError, EngineError: as :meth:`embed`.
        """
        check_task(self.task, "classify")
        params = _checked(pooling_params)
        return self._made(as_list(prompts), params, use_tqdm, lambda out: classification(out, self.pooling, params))

    def score(
        self,
        queries: str | List[str],
        documents: str | List[str],
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        *,
        instruction: str | None = None,
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        """How well documents answer queries: by a reranker from 0 to 1, by embeddings their cosine.

        Args:
            queries, documents: a text each, one query for several documents, or as many of both.
            instruction: what is looked for.

        Returns:
            One result a document, in their order; ``outputs.score`` is the number.

        Raises:
            RequestError, EngineError: as :meth:`embed`.
        """
        params = _checked(pooling_params)
        pairs = self.pairs(as_pairs(queries, documents), params, instruction)
        pending = self._run_pooled(pairs.prompts, params, use_tqdm)
        scores = pairs.scores([_output(each) for each in pending])
        each = zip(pairs.documents, scores, strict=True)
        return [_result(pending[index], ScoringOutput(score)) for index, score in each]

    def pairs(self, pairs: List[tuple[str, str]], params: PoolingParams, instruction: str | None = None) -> Pairs:
        """What :meth:`score` runs for ``pairs`` of query and document.

        Raises:
            RequestError: the engine compares no texts.
        """
        check_task(self.task, "score", "embed")
        if self.task == "embed":
            check_dimensions(params, self.core.engine.manifest.model.hidden_size)
            return compared(pairs, self.pooling, params, instruction)
        return reranked(self._require_text().tokenizer, pairs, params, instruction, self.max_seq_len)

    def prepare_pooled(
        self, prompt: Prompt, params: PoolingParams, request_id: str, name: str = "the prompt"
    ) -> PendingRequest:
        """A request for the output of the last token; may be called by any thread.

        Raises:
            RequestError: the prompt is empty, too long, or holds ids the model does not have.
        """
        prompt = plain(prompt, name)
        text = str(prompt) if isinstance(prompt, str) else None
        sampling = SamplingParams(temperature=0, max_tokens=1, cache_salt=params.cache_salt)
        request = Request(tuple(self.pooled_ids(prompt, params, name)), sampling, pools=True)
        self.core.check(request, name)
        return PendingRequest(request_id, text, request, None)

    def pooled_ids(self, prompt: str | List[int], params: PoolingParams, name: str = "the prompt") -> list[int]:
        """The token ids that are read of ``prompt``: a text with what its tokenizer puts around it, cut as asked for.

        Raises:
            RequestError: the text is far too long.
        """
        most, after = params.most_tokens(self.max_seq_len), list[int]()
        if isinstance(prompt, str):
            tokenizer = self._require_text().tokenizer
            ids = tokenizer.encode(prompt, True, self.max_seq_len if most is None else None)
            after = tokenizer.closing
        else:
            ids = token_ids(prompt, name)
        if most is None or len(ids) <= most:
            return ids
        return [*ids[: max(0, most - len(after))], *after][:most]

    def _made(
        self, prompts: List[Prompt], params: PoolingParams, use_tqdm: bool, make: Callable[[np.ndarray], Made]
    ) -> list[PoolingRequestOutput[Made]]:
        return [_result(pending, make(_output(pending))) for pending in self._run_pooled(prompts, params, use_tqdm)]

    def _run_pooled(self, prompts: List[Any], params: PoolingParams, use_tqdm: bool) -> list[PendingRequest]:
        names = [f"text {index + 1}" if len(prompts) > 1 else "the text" for index in range(len(prompts))]
        pending = [
            self.prepare_pooled(prompt, params, self._next_id(), name)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        for output in self.finish(pending, use_tqdm):
            if output.error is not None:
                raise EngineError(output.error)
        return pending

    # Of LLM.

    @property
    @abstractmethod
    def max_seq_len(self) -> int: ...

    @abstractmethod
    def _require_text(self) -> TextModel: ...

    @abstractmethod
    def _next_id(self) -> str: ...


def as_pairs(queries: str | List[str], documents: str | List[str]) -> list[tuple[str, str]]:
    """``queries`` and ``documents`` as pairs; one query is for all documents.

    Raises:
        RequestError: they are no texts, or there is another number of them.
    """
    each = [[texts] if isinstance(texts, str) else texts for texts in (queries, documents)]
    for name, texts in zip(("queries", "documents"), each, strict=True):
        if not isinstance(texts, List) or not all(isinstance(text, str) for text in texts):
            raise RequestError(f"{name} is {reprlib.repr(texts)}, expected a text or a list of texts")
    first, second = list(each[0]), list(each[1])
    if len(first) == 1:
        first *= len(second)
    if len(first) != len(second):
        raise RequestError(f"{len(first)} queries for {len(second)} documents, expected one or as many")
    return list(zip(first, second, strict=True))


def _checked(params: PoolingParams | None) -> PoolingParams:
    if not isinstance(params, PoolingParams | None):
        raise RequestError(f"pooling_params is {reprlib.repr(params)}, expected PoolingParams")
    return params or PoolingParams()


def _output(pending: PendingRequest) -> np.ndarray:
    assert pending.request.pooled is not None
    return pending.request.pooled


def _result(pending: PendingRequest, made: Made) -> PoolingRequestOutput[Made]:
    request = pending.request
    return PoolingRequestOutput(pending.request_id, made, list(request.prompt), request.num_cached_tokens)
