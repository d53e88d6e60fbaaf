"""The keywords of :meth:`QwenForCausalLM.generate`, with the names and defaults of transformers' ``generate``."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

from qwen_run.sampling.params import SamplingParams

# beam search and several answers, which generation_config.json asks of ``generate`` alone
_BEAMS = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False, "num_return_sequences": 1}
# transformers' name -> that of a request, where they differ
_OURS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class GenerateOptions:
    """How rows are continued. None is what ``generation_config.json`` says, else what transformers does.

    Attributes:
        max_length: most tokens of a row, padding included.
        max_new_tokens: most new tokens of a row; counts before ``max_length``.
        min_length: least tokens of a row, padding included.
        min_new_tokens: least new tokens of a row; counts before ``min_length``.
        do_sample: draw tokens instead of taking the likeliest.
        temperature, top_k, top_p, min_p: for drawing, as in :class:`~qwen_run.sampling.params.SamplingParams`.
        num_return_sequences: answers to each row, one after the other.
        stop_strings: texts that end a row with the token that completes them; the engine's tokenizer spells them.
        suppress_tokens, begin_suppress_tokens, bad_words_ids, no_repeat_ngram_size: what does not come.
        forced_bos_token_id, forced_eos_token_id: what has to.
        eos_token_id: what ends a row; else what ``generation_config`` says, else what the engine says.
        pad_token_id: fills the rows that end early; else ``generation_config``'s, else the first end of sequence.
        seed: row ``i`` draws with ``seed + i``; None draws a seed for each row.

    Raises:
        ValueError: a value is not as described.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    num_return_sequences: int | None = None
    stop_strings: str | list[str] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    bad_words_ids: list[list[int]] | None = None
    no_repeat_ngram_size: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    seed: int | None = None
    inputs_embeds: Any = None

    def __post_init__(self) -> None:
        if self.inputs_embeds is not None:
            raise ValueError(
                "inputs_embeds is given, the engine's own loop takes token ids; give the token ids as input_ids, or "
                "install torch and transformers, with which QwenForCausalLM takes both"
            )
        for name in ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "seed"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise ValueError(f"{name} is {number!r}, expected a whole number")
        if not isinstance(self.do_sample, bool | None):
            raise ValueError(f"do_sample is {self.do_sample!r}, expected True or False")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The options ``given`` as keywords.

        Raises:
            TypeError: one is unknown.
            ValueError: as for the class.
        """
        known = list(cls.__dataclass_fields__)
        for name in given:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                raise TypeError(f"generate has no {name!r}, expected {nearest[0] if nearest else ', '.join(known)}")
        return cls(**given)

    def sampling_params(
        self, generation_config: Mapping[str, Any], length: int, room: int, stop_ids: list[int]
    ) -> SamplingParams:
        """The same as parameters of a request.

        Args:
            generation_config: what is chosen where no keyword says so.
            length: tokens of a row of ``input_ids``.
            room: most new tokens.
            stop_ids: what ends a row.

        Raises:
            RequestError: a value is out of range.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        asked = {"do_sample": False} | dict(generation_config) | given
        values = vars(SamplingParams.from_generation_config(asked | {"max_new_tokens": room, "max_length": None}))
        beams = {name: asked.get(name, default) for name, default in _BEAMS.items()}
        if beams["num_beams"] == 1:  # what the file says of a beam search is not for this
            beams |= {name: given.get(name, _BEAMS[name]) for name in ("length_penalty", "early_stopping")}
        least = values["min_tokens"] if "min_new_tokens" in asked else min(room, max(0, values["min_length"] - length))
        own = {
            **{_OURS.get(name, name): value for name, value in beams.items()},
            "min_tokens": least if self.min_new_tokens is None else self.min_new_tokens,
            "min_length": 0,
            "ignore_eos": True,
            "stop_token_ids": stop_ids,
        }
        return SamplingParams(**values | own)


def with_generate_options(function: Function) -> Function:
    """``function(..., **options)``, whose signature names the fields of :class:`GenerateOptions`, as ``help`` shows."""
    *own, others = inspect.signature(function).parameters.values()
    named = inspect.signature(GenerateOptions).parameters.values()
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in named]
    function.__signature__ = inspect.signature(function).replace(parameters=[*own, *keywords, others])  # type: ignore[attr-defined]
    return function


def in_names_of_transformers(message: str) -> str:
    """A message about parameters, for whom ``generate`` has named them.

    >>> in_names_of_transformers("min_tokens is 9, expected at most max_tokens, which is 8")
    'min_new_tokens is 9, expected at most max_new_tokens, which is 8'
    """
    return re.sub(r"\b(?:max_tokens|min_tokens|(?:n|stop)(?= is ))\b", lambda found: _THEIRS[found[0]], message)
