"""What an engine has for text: its tokenizer, chat template, stop texts and sampling defaults.

:class:`TextModel` makes requests out of texts; :class:`~qwen_run.api.llm.LLM` answers them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from qwen_engine.errors import EngineError, RequestError
from qwen_engine.manifest import Manifest
from qwen_engine.tasks import GENERATE, check_task
from qwen_run.pipeline.staged_engine import open_engine
from qwen_run.runtime.flights import AnyEngine
from qwen_run.runtime.request import Request
from qwen_run.sampling.constraint import END_OF_THINKING, Constraint, Thinking, ThinkingBudget, thinking_at_end
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.structured import StructuredOutputsParams
from qwen_run.text.chat_template import ChatTemplate, Conversation, Message, read_json
from qwen_run.text.grammar import Grammars
from qwen_run.text.stops import StopTexts, TextStopper
from qwen_run.text.tokenizer import Tokenizer

GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True)
class TextModel:
    """An engine and what it has for text.

    Attributes:
        template: None for an engine that is only given raw prompts.
        defaults: sampling as the checkpoint asks for it.
        eos_token_ids: tokens that end every answer.
    """

    engine: AnyEngine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: SamplingParams
    eos_token_ids: frozenset[int]

    @property
    def max_seq_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.engine.manifest.limits.max_seq_len

    @classmethod
    def load(
        cls,
        engine_directory: Path,
        threads: int | None = None,
        raw: bool = False,
        cache_bytes: int | None = None,
        max_seq_len: int | None = None,
        pipeline_parallel_size: int | None = None,
    ) -> TextModel:
        """Open an engine with everything that belongs to it; the small files first.

        Args:
            threads: threads of one run; the physical cores if None.
            raw: do without a chat template.
            cache_bytes: memory of the cache; chosen from the free memory if None.
            max_seq_len: most tokens of a sequence; see :meth:`Engine.load`.
            pipeline_parallel_size: stages; see :func:`open_engine`.

        Raises:
            EngineError: something is missing or damaged, or the cache does not hold ``max_seq_len`` tokens.
            RequestError: the engine does not write text.
        """
        check_task(Manifest.read(engine_directory).task, GENERATE)
        parts = _TextParts.load(engine_directory, raw)
        engine = open_engine(
            engine_directory,
            threads,
            cache_bytes=cache_bytes,
            max_seq_len=max_seq_len,
            pipeline_parallel_size=pipeline_parallel_size,
        )
        return cls._join(engine, parts)

    @classmethod
    def of(cls, engine: AnyEngine, raw: bool = False) -> TextModel:
        """As :meth:`load`, for an engine that is open already."""
        return cls._join(engine, _TextParts.load(engine.directory, raw))

    @classmethod
    def _join(cls, engine: AnyEngine, parts: _TextParts) -> TextModel:
        return cls(
            engine=engine,
            tokenizer=parts.tokenizer,
            template=parts.template,
            defaults=parts.defaults,
            eos_token_ids=frozenset(engine.manifest.eos_token_ids) | end_of_turn_ids(parts.tokenizer, parts.template),
        )

    def encode_raw(self, prompt: str) -> list[int]:
        """Ids of a prompt that goes to the model as it is."""
        return self.tokenizer.encode(prompt, add_special_tokens=True)

    def chat_pieces(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> tuple[str, ...]:
        """A conversation and the opening of an answer, in pieces to be encoded one by one.

        What a message, a tool's result or an argument says stays text, also where it spells a control token.

        Args:
            options: ``add_generation_prompt``, ``continue_final_message``, and variables of the chat template.

        Raises:
            RequestError: the template refuses the messages.
        """
        assert self.template is not None, "loaded with raw=True"
        return self.template.pieces(messages, tools, control_texts=self.tokenizer.control_texts, **options)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> list[int]:
        """Ids of what :meth:`chat_pieces` makes of a conversation.

        Raises:
            RequestError: the template refuses the messages.
        """
        return self.tokenizer.encode_pieces(self.chat_pieces(messages, tools, **variables))

    def new_request(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """A request for an answer to ``prompt``; nothing of the prompt is checked.

        Raises:
            RequestError: ``params`` bounds the thinking of a model that does not think, or has a form that cannot be
                kept to.
            EngineError: a form is asked for, and llguidance is not installed.
        """
        new_stopper = partial(
            TextStopper,
            self.tokenizer,
            StopTexts(self.tokenizer, params.stop_strings),
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
        )
        bad_words = tuple(spelling for word in params.bad_word_texts for spelling in self._spellings(word))
        stopper = new_stopper if params.detokenize else None
        return Request(tuple(prompt), params, self.eos_token_ids, stopper, bad_words, self._constraints(prompt, params))

    def _constraints(self, prompt: Sequence[int], params: SamplingParams) -> tuple[Constraint, ...]:
        budget, form = params.thinking_token_budget, StructuredOutputsParams.of(params.structured_outputs)
        if budget is None and form is None:
            return ()
        begin, end = self.tokenizer.token_id("<think>"), self.tokenizer.token_id("</think>")
        thinking, found = thinking_at_end(prompt, begin, end), list[Constraint]()
        if budget is not None:
            if begin is None or end is None:
                raise RequestError(
                    f"thinking_token_budget is {budget}, and the engine's tokenizer has no <think>; leave it out"
                )
            words = self.tokenizer.encode(END_OF_THINKING)
            found.append(ThinkingBudget(budget, begin, end, words, thinking is Thinking.OPEN))
        if form is not None:
            thinks_first = thinking is Thinking.UNSAID and self._may_think_after(prompt)
            found.append(self.grammars.constraint(form, thinks_first, thinking is Thinking.OPEN))
        return tuple(found)

    def _may_think_after(self, prompt: Sequence[int]) -> bool:
        """Whether ``prompt`` ends with the opening of an answer, and the template knows of thinking."""
        opening = self._opening
        return bool(opening) and list(prompt[-len(opening) :]) == opening

    @cached_property
    def _opening(self) -> list[int]:
        """What the template writes before an answer; empty where it knows nothing of thinking."""
        if self.template is None or "<think>" not in self.template.source:
            return []
        asked = [{"role": "user", "content": "A question."}]
        without = self.template.render(asked, add_generation_prompt=False)
        return self.tokenizer.encode(self.template.render(asked).removeprefix(without))

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles the forms of answers."""
        return Grammars(self.tokenizer, self.engine.manifest.model.vocab_size, self.eos_token_ids)

    def _spellings(self, word: str) -> list[tuple[int, ...]]:
        """``word`` as it stands at the beginning and, where it has as many tokens there, after a space."""
        bare = word.lstrip() or word
        first, inside = (tuple(self.tokenizer.encode(prefix + bare)) for prefix in ("", " "))
        return [first, inside] if len(first) == len(inside) and first[:1] != inside[:1] else [first]

    def fit(self, conversation: Conversation, params: SamplingParams, **variables: Any) -> tuple[list[int], int]:
        """Ids of ``conversation`` without as many of its oldest turns as leave room for an answer.

        Room is ``params.max_tokens``, or a quarter of the engine's length where that is less.

        Returns:
            The ids, and how many turns are left out of them. The last question always stays.
        """
        quarter = self.max_seq_len // 4
        room, dropped = quarter if params.max_tokens is None else min(params.max_tokens, quarter), 0
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
        raise EngineError(f"{path}: {error}; build the engine again, which writes only what requests take") from error
