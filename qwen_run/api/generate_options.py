"""The keywords of :meth:`QwenForCausalLM.generate`, with the names and defaults of transformers' ``generate``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from qwen_run.sampling.params import SamplingParams

# what chooses among tokens; None is what generation_config.json says
CHOOSING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# our name -> transformers'
_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "n": "num_return_sequences"}


@dataclass(frozen=True)
class GenerateOptions:
    """How rows are continued.

    Attributes:
        max_length: most tokens of a row, padding included.
        max_new_tokens: most new tokens of a row; counts before ``max_length``.
        do_sample: draw tokens instead of taking the likeliest; the next five are for that.
        num_return_sequences: answers to each row, one after the other.
        eos_token_id: what ends a row; else what ``generation_config`` says, else what the engine says.
        pad_token_id: fills the rows that end early; else ``generation_config``'s, else the first end of sequence.
        seed: row ``i`` draws with ``seed + i``; None draws a seed for each row.

    Raises:
        ValueError: a value is not as described.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    seed: int | None = None
    inputs_embeds: Any = None

    def __post_init__(self) -> None:
        if self.inputs_embeds is not None:
            raise ValueError("inputs_embeds is given, engines look embeddings up; give the token ids as input_ids")
        for name in ("max_length", "max_new_tokens", "seed"):
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

    def sampling_params(self, generation_config: Mapping[str, Any], room: int, stop_ids: list[int]) -> SamplingParams:
        """The same as parameters of a request.

        Args:
            generation_config: what is chosen where no keyword says so.
            room: most new tokens.
            stop_ids: what ends a row.

        Raises:
            RequestError: a value is out of range.
        """
        chosen = {name: getattr(self, name) for name in CHOOSING if getattr(self, name) is not None}
        do_sample = generation_config.get("do_sample") if self.do_sample is None else self.do_sample
        defaults = SamplingParams.from_generation_config({**generation_config, **chosen, "do_sample": bool(do_sample)})
        return SamplingParams(
            **{name: getattr(defaults, name) for name in CHOOSING},
            n=self.num_return_sequences,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            min_tokens=self.min_new_tokens,
            max_tokens=room,
            ignore_eos=True,
            stop_token_ids=stop_ids,
        )


def in_names_of_transformers(message: str) -> str:
    """A message about parameters, for whom ``generate`` has named them.

    >>> in_names_of_transformers("min_tokens is 9, expected at most max_tokens, which is 8")
    'min_new_tokens is 9, expected at most max_new_tokens, which is 8'
    """
    return re.sub(r"\b(?:max_tokens|min_tokens|n(?= is ))\b", lambda found: _NAMES[found[0]], message)
