"""One engine of several, in a process of its own: :class:`Replica`. Nothing here knows of Ray.

Answers leave it in bulk: one call asks for all that is new of all requests, so that 64 streams cost what one does.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qwen_engine import __version__
from qwen_engine.errors import EngineError, QwenError, first_line
from qwen_engine.tasks import GENERATE
from qwen_run.api.async_llm import AsyncLLM, RequestStream
from qwen_run.api.outputs import RequestOutput
from qwen_run.api.pooling import PoolingParams
from qwen_run.runtime.core import CoreStatistics
from qwen_run.runtime.engine import Engine
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.rules import RequestOutputKind
from qwen_run.text.text_model import TextModel

_MAX_REQUESTS = 1 << 20  # whoever asks a replica bounds them
_PROBE_PROMPT, _PROBE_ANSWER = 96, 8  # tokens; more than the rows of a tile of AMX, and more than one block


@dataclass(frozen=True)
class Forwarded:
    """One request. ``params`` has a seed, so that whoever answers it answers the same."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams | PoolingParams


@dataclass(frozen=True)
class Told:
    """What is new of one request: its output without the prompt, or why there is none.

    Attributes:
        pooled: what its last token has put out, float32 (width,), at its end; None where an answer was asked for.
    """

    output: RequestOutput | None
    error: QwenError | None = None
    pooled: np.ndarray | None = None


@dataclass(frozen=True)
class News:
    """What is new of all requests of a replica, by their names, and where its core stands.

    Attributes:
        lengths: tokens so far of those that tell nothing before their end.
    """

    told: Mapping[str, Told]
    statistics: CoreStatistics
    lengths: Mapping[str, int]


@dataclass(frozen=True)
class Description:
    """What a replica is, as far as others have to be like it.

    Attributes:
        name: its machine and process, for people.
        identity: what must be equal, by a name for people; ``numerics`` is a digest of the log probabilities it has
            computed for a fixed prompt.
        max_seq_len, max_batch_size, num_blocks: of its engine.
    """

    name: str
    identity: Mapping[str, str]
    max_seq_len: int
    max_batch_size: int
    num_blocks: int


class Replica:
    """An engine that answers what others pass on to it; to be called from one event loop.

    Args:
        model, options: as :class:`~qwen_run.api.async_llm.AsyncLLM` has them; ``raw`` does without a chat template.
        on_failure: is called when the engine has stopped and answers no more.
    """

    def __init__(
        self, model: str | Path | Engine, options: Mapping[str, Any], on_failure: Callable[[], object]
    ) -> None:
        self._model, self._options, self._on_failure = model, dict(options), on_failure
        self._opened: AsyncLLM | None = None
        self._told: dict[str, Told] = {}
        self._has_news = asyncio.Event()
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._silent: dict[str, RequestStream] = {}  # that tell nothing before their end
        self._numbers = 0

    async def open(self) -> Description:
        """Load the engine, and let it answer once.

        Raises:
            EngineError, BuildError: it cannot be loaded, or cannot answer.
        """
        self._opened = await asyncio.to_thread(_load, self._model, self._options)
        llm = self._opened.llm
        manifest = llm.core.engine.manifest
        parts = {name: part.sha256 for name, part in manifest.parts.items()}
        identity = {
            "qwen-engine": __version__,
            "engine": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16],
            "numerics": await self.probe(_PROBE_ANSWER),
        }
        isa = os.environ.get("QWEN_PLUGIN_ISA", "the best it has")
        return Description(
            name=f"{platform.node()}, process {os.getpid()}, instruction set {isa}",
            identity=identity,
            max_seq_len=llm.max_seq_len,
            max_batch_size=llm.core.options.max_batch_size,
            num_blocks=llm.core.engine.cache.num_blocks,
        )

    async def probe(self, max_tokens: int = 1) -> str:
        """Answer a fixed prompt; a digest of what was computed.

        Raises:
            EngineError: the engine cannot.
        """
        llm = self._llm.llm
        length = min(_PROBE_PROMPT, llm.max_seq_len - max_tokens)
        vocab_size = llm.core.engine.manifest.model.vocab_size
        prompt = [(7 + 31 * position) % vocab_size for position in range(length)]
        self._numbers += 1
        params: SamplingParams | PoolingParams = PoolingParams(cache_salt=f"probe {self._numbers}")
        if llm.task == GENERATE:
            kind = RequestOutputKind.FINAL_ONLY
            params = SamplingParams(
                temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, detokenize=False, output_kind=kind
            )
            params = replace(params, cache_salt=f"probe {self._numbers}")  # computed, not found in the cache
        stream = await self._llm.add_request(prompt, params)
        digest = hashlib.sha256()
        async for output in stream:
            if output.error is not None:
                raise EngineError(output.error)
            for answer in output.outputs:
                found = [likely[token].logprob for token, likely in zip(answer.token_ids, answer.logprobs or [])]  # noqa: B905
                digest.update(np.array(answer.token_ids, np.int64).tobytes() + np.array(found, np.float64).tobytes())
        if (pooled := stream.pending.request.pooled) is not None:
            digest.update(pooled.tobytes())
        return digest.hexdigest()[:16]

    async def begin(self, asked: Sequence[Forwarded]) -> None:
        """Begin to answer; what becomes of each is told by :meth:`news`."""
        for each in asked:
            self._reading[each.request_id] = asyncio.ensure_future(self._read(each))

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Give requests up, of which nothing more is told; nothing for those that have ended."""
        for request_id in request_ids:
            if reading := self._reading.get(request_id):
                reading.cancel()  # which closes its stream
            self._told.pop(request_id, None)

    async def news(self, wait_s: float) -> News:
        """What is new, as soon as there is any, or nothing after ``wait_s`` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._has_news.wait(), wait_s)
        self._has_news.clear()
        told, self._told = self._told, {}
        lengths = {name: _length(stream) for name, stream in self._silent.items()}
        return News(told, self._llm.statistics, lengths)

    async def close(self) -> None:
        """End the engine."""
        if self._opened is not None:
            await self._opened.close()

    @property
    def _llm(self) -> AsyncLLM:
        if self._opened is None:
            raise EngineError("the replica has no engine yet; open it first")
        return self._opened

    async def _read(self, asked: Forwarded) -> None:
        try:
            stream = await self._llm.add_request(list(asked.prompt), asked.params, asked.request_id)
            if stream.pending.request.params.output_kind == RequestOutputKind.FINAL_ONLY:
                self._silent[asked.request_id] = stream
            async for output in stream:
                told = replace(output, prompt=None, prompt_token_ids=[])  # which the other side has
                self._tell(asked.request_id, Told(told, pooled=self._pooled(stream, output)))
        except QwenError as error:
            await self._check()
            self._tell(asked.request_id, Told(None, error))
        except Exception as error:
            self._tell(asked.request_id, Told(None, EngineError(f"{type(error).__name__}: {first_line(error)}")))
        finally:
            del self._reading[asked.request_id]
            self._silent.pop(asked.request_id, None)

    @staticmethod
    def _pooled(stream: RequestStream, output: RequestOutput) -> np.ndarray | None:
        return stream.pending.request.pooled if output.finished else None

    def _tell(self, request_id: str, told: Told) -> None:
        before = self._told.get(request_id)
        if before is not None and before.output is not None and told.output is not None:
            told = replace(told, output=before.output.followed_by(told.output))
        self._told[request_id] = told
        self._has_news.set()

    async def _check(self) -> None:
        """End the process where its engine has stopped, rather than tell anybody: another replica answers."""
        try:
            await self._llm.check_health()
        except EngineError:
            self._on_failure()


def _length(stream: RequestStream) -> int:
    """Tokens of the answers of a request, as far as another thread has come with them."""
    request = stream.pending.request
    return sum(len(sequence.token_ids) - len(request.prompt) for sequence in list(request.sequences))


def _load(model: str | Path | Engine, options: Mapping[str, Any]) -> AsyncLLM:
    """
    Raises:
        EngineError, BuildError: as AsyncLLM.
    """
    given = dict(options)
    if not given.pop("raw", False) or isinstance(model, Engine):
        return AsyncLLM(model, max_requests=_MAX_REQUESTS, **given)
    opening = {name: given.pop(name, None) for name in ("threads", "cache_bytes", "max_seq_len")}
    text = TextModel.load(Path(model), raw=True, **opening)
    return AsyncLLM(text, max_requests=_MAX_REQUESTS, **given)
