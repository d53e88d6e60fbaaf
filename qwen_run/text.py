"""Prompts and conversations in, text out: an engine together with its tokenizer, chat template and defaults.

The commands and the interactive chat are written against :class:`TextModel`; it knows no terminal and no files but
those of the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qwen_engine.errors import EngineError, RequestError
from qwen_engine.manifest import Manifest
from qwen_run.chat import ChatTemplate, Conversation, Message, read_json
from qwen_run.engine import Engine
from qwen_run.generate import Token, check_request, generate
from qwen_run.request import FinishReason, Request
from qwen_run.sampling import SamplingParams
from qwen_run.tokenizer import StreamDecoder, Tokenizer

GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True)
class Piece:
    """What one new token of request ``request_index`` adds to its answer: whole characters, possibly none.

    The token that ends an answer (``finish_reason`` ``stop``) is no part of its text.
    """

    request_index: int
    text: str
    token: Token


@dataclass
class Answer:
    """An answer as far as it has come, and when (seconds of ``time.perf_counter``) it began and its tokens came."""

    started_s: float = field(default_factory=time.perf_counter)
    first_s: float = 0.0
    last_s: float = 0.0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s
        self.text += piece.text
        self.token_ids.append(piece.token.token_id)
        self.finish_reason = piece.token.finish_reason

    @property
    def ttft_ms(self) -> float | None:
        """Milliseconds to the first token."""
        return (self.first_s - self.started_s) * 1e3 if self.token_ids else None

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens a second after the first."""
        seconds = self.last_s - self.first_s
        return (len(self.token_ids) - 1) / seconds if seconds > 0 else None


@dataclass(frozen=True)
class TextModel:
    """An engine that takes and gives text.

    Attributes:
        generate: answers requests token by token, as ``qwen_run.generate.generate`` of one engine does.
        check: raises a RequestError for a request the engine cannot answer.
        template: None for an engine that is only given raw prompts.
        defaults: sampling as the checkpoint asks for it.
        eos_token_ids: tokens that end every answer.
        max_seq_len: most tokens of prompt and answer together.
    """

    generate: Callable[..., Generator[Token, None, None]]
    check: Callable[[Request], None]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: SamplingParams
    eos_token_ids: frozenset[int]
    max_seq_len: int

    @classmethod
    def load(cls, engine_directory: Path, threads: int | None = None, raw: bool = False) -> TextModel:
        """Open an engine with everything that belongs to it; the small files first.

        Args:
            threads: threads of one run; the physical cores if None.
            raw: do without a chat template.

        Raises:
            EngineError: something is missing or damaged.
        """
        Manifest.read(engine_directory)
        parts = _TextParts.load(engine_directory, raw)
        return cls._join(Engine.load(engine_directory, threads), parts)

    @classmethod
    def of(cls, engine: Engine, raw: bool = False) -> TextModel:
        """As :meth:`load`, for an engine that is open already."""
        return cls._join(engine, _TextParts.load(engine.directory, raw))

    @classmethod
    def _join(cls, engine: Engine, parts: _TextParts) -> TextModel:
        return cls(
            generate=partial(generate, engine),
            check=partial(check_request, manifest=engine.manifest),
            tokenizer=parts.tokenizer,
            template=parts.template,
            defaults=parts.defaults,
            eos_token_ids=frozenset(engine.manifest.eos_token_ids) | end_of_turn_ids(parts.tokenizer, parts.template),
            max_seq_len=engine.manifest.limits.max_seq_len,
        )

    def encode_raw(self, prompt: str) -> list[int]:
        """Ids of a prompt that goes to the model as it is."""
        return self.tokenizer.encode(prompt, add_special_tokens=True)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> list[int]:
        """Ids of a conversation and the opening of an answer; ``variables`` go to the chat template.

        Raises:
            RequestError: the template refuses the messages.
        """
        assert self.template is not None, "loaded with raw=True"
        return self.tokenizer.encode(self.template.render(messages, tools, **variables))

    def request(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """A request for an answer to ``prompt``.

        Raises:
            RequestError: the prompt is empty or longer than the engine takes.
        """
        request = Request(tuple(prompt), params, self.eos_token_ids)
        self.check(request)
        return request

    def stream(self, requests: Sequence[Request], keep_logits: bool = False) -> Generator[Piece, None, None]:
        """Answer ``requests`` together, one piece a new token as soon as it is known; closing it frees their cache.

        Args:
            keep_logits: set ``logits`` of every token.
        """
        decoders = [StreamDecoder(self.tokenizer) for _ in requests]
        tokens = self.generate(requests, keep_logits=keep_logits)
        try:
            for token in tokens:
                decoder = decoders[token.request_index]
                text = "" if token.finish_reason == "stop" else decoder.push(token.token_id)
                if token.finish_reason:
                    text += decoder.flush()
                yield Piece(token.request_index, text, token)
        finally:
            tokens.close()

    def fit(self, conversation: Conversation, params: SamplingParams, **variables: Any) -> tuple[list[int], int]:
        """Ids of ``conversation`` without as many of its oldest turns as leave room for an answer.

        Room is ``params.max_tokens``, or a quarter of the engine's length where that is less.

        Returns:
            The ids, and how many turns are left out of them. The last question always stays.
        """
        room, dropped = min(params.max_tokens, self.max_seq_len // 4), 0
        while True:
            ids = self.encode_chat(conversation.messages, **variables)
            if len(ids) + room <= self.max_seq_len or conversation.num_questions < 2:
                return ids, dropped
            conversation, dropped = conversation.without_oldest(), dropped + 1


@dataclass(frozen=True)
class _TextParts:
    """What an engine's directory holds for text."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: SamplingParams

    @classmethod
    def load(cls, engine_directory: Path, raw: bool) -> _TextParts:
        return cls(
            Tokenizer.load(engine_directory),
            None if raw else ChatTemplate.load(engine_directory),
            _read_defaults(engine_directory),
        )


def end_of_turn_ids(tokenizer: Tokenizer, template: ChatTemplate | None) -> frozenset[int]:
    """The special token the template puts after an answer: checkpoints do not always list it as an end of sequence."""
    first = tokenizer.encode(template.end_of_turn())[:1] if template else []
    return frozenset(first) & tokenizer.special_ids


def _read_defaults(engine_directory: Path) -> SamplingParams:
    path = engine_directory / GENERATION_CONFIG_FILE
    try:
        return SamplingParams.from_generation_config(read_json(path) if path.is_file() else {})
    except RequestError as error:
        raise EngineError(f"{path}: {error}; correct it there") from error
