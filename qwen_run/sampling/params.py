"""How answers are chosen: every option of a request, its range, and which of them exclude each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, NamedTuple, Self

from qwen_engine.errors import RequestError, shown
from qwen_run.sampling.custom import LogitsProcessor, is_processor
from qwen_run.sampling.structured import StructuredOutputsParams

# Limits of what one request may ask for; RULES has those that belong to one option. No vocabulary is as large as these.
MAX_NUMBER = 2**31 - 1
MAX_TOKEN_IDS = 2**20
MAX_STOP_TEXTS, MAX_STOP_CHARACTERS = 64, 1024
MAX_PROCESSORS, MAX_EXTRA_ARGS = 64, 64

_ID_LISTS = ("stop_token_ids", "allowed_token_ids")

# what transformers' GenerationConfig uses where generation_config.json is silent
TRANSFORMERS_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0, "min_p": 0.0}


class RequestOutputKind(IntEnum):
    """What an output of a stream holds: all so far, what is new since the last, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(unsafe_hash=True)
class SamplingParams:
    """How one request is answered. Names are vLLM's, those of beam search transformers'.

    Lists are kept as hashable tuples; None stands for none. A value is checked when it is set, and values that exclude
    each other when they are given together or a request is made; a request keeps those it was made with.

    Attributes:
        temperature: 0 is greedy.
        top_p: 1 is off.
        top_k: 0 is off.
        repetition_penalty: of tokens in the prompt or the answer; 1 is off (arXiv 1909.05858, section 4.1).
        seed: what the random numbers of this request are made from; None draws one, which the result tells.
        max_tokens: most tokens of an answer; None for as many as the engine's length leaves.
        min_p: least probability of a token, as a share of the likeliest token's; 0 is off.
        presence_penalty: taken from the logits of tokens that are in the answer.
        frequency_penalty: taken from the logit of a token for each time it is in the answer.
        logit_bias: token id to what is added to its logit.
        n: answers to return: samples, or the best of ``num_beams``.
        stop: texts that end an answer; not part of it unless ``include_stop_str_in_output``.
        stop_token_ids: tokens that end an answer besides those the checkpoint says.
        ignore_eos: do not end at the tokens the checkpoint says.
        min_tokens: tokens an answer has before anything but ``max_tokens`` may end it.
        logprobs: how many of the likeliest tokens to report with each token of the answer; 0 for its own only.
        prompt_logprobs: the same for the tokens of the prompt.
        num_beams: width of the beam search, 1 is off.
        length_penalty: the exponent of an answer's length by which beam search divides its log probability.
        early_stopping: end a beam search once it has ``num_beams`` answers (True), when its best beam is not likely
            to improve on them (False), or when it cannot ("never").
        bad_words: texts that do not come in an answer, token by token as the tokenizer spells them.
        allowed_token_ids: the only tokens an answer may have; None for all.
        skip_special_tokens: special tokens have no text.
        spaces_between_special_tokens: without effect: byte-level tokens carry their own spaces.
        detokenize: make text of the answer; without, ``text`` is empty.
        truncate_prompt_tokens: keep the last so many tokens of a prompt; -1 keeps what the engine takes.
        logits_processors: functions of (answer so far, logits) or (prompt, answer so far, logits) that return logits, a
            NumPy array (vocab_size,); or transformers' ``LogitsProcessor``, which see prompt and answer as tensors.
        output_kind: what each output of a stream holds.
        extra_args: anything; a request keeps it, and nothing reads it.
        thinking_token_budget: tokens after which thinking is brought to its end; None for no such bound.
        structured_outputs: the form of an answer, a StructuredOutputsParams or an object with its fields.
        cache_salt: prompts share what is in the cache with those of the same salt alone.

    Raises:
        RequestError: a value is out of range, or excludes another; the message says which and what it may be.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 512  # None, when it is set, becomes MAX_NUMBER
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Collection[tuple[int, float]] | None = ()
    n: int = 1
    stop: str | Collection[str] | None = ()
    stop_token_ids: Collection[int] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    bad_words: str | Collection[str] | None = ()
    allowed_token_ids: Collection[int] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None
    logits_processors: Sequence[LogitsProcessor] | None = ()
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    extra_args: Mapping[str, Any] | None = field(default=None, hash=False)
    thinking_token_budget: int | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    cache_salt: str | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in RULES:
            raise AttributeError(f"SamplingParams has no {name!r}, it has {', '.join(RULES)}")
        object.__setattr__(self, name, checked(name, value))

    def __post_init__(self) -> None:
        for excluded, message in CONTRADICTIONS:
            if excluded(self):
                raise RequestError(message.format_map({name: shown(value) for name, value in vars(self).items()}))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias`` as pairs of token id and bias, ids rising."""
        return _bias_pairs(self.logit_bias)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return _strings(self.stop)

    @property
    def bad_word_texts(self) -> tuple[str, ...]:
        """``bad_words`` as a tuple."""
        return _strings(self.bad_words)

    def stop_ids(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """The tokens that end an answer of a model whose ends of sequence are ``eos_token_ids``."""
        return frozenset(self.stop_token_ids or ()) | frozenset(() if self.ignore_eos else eos_token_ids)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Compare the ids that are named with the model's vocabulary.

        Raises:
            RequestError: ``logit_bias`` or a list of ids names a token that the model does not have.
        """
        named = ("logit_bias", dict(self.biases)), *((name, getattr(self, name) or ()) for name in _ID_LISTS)
        for name, ids in named:
            if max(ids, default=0) >= vocab_size:
                raise RequestError(f"{name} holds token {max(ids)}, expected 0 to {vocab_size - 1}")

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> Self:
        """The defaults a checkpoint asks for in ``generation_config.json``, read as transformers reads them.

        Without ``do_sample`` the temperature is 0; what chooses among tokens is kept for a user who sets one.
        """
        given = {name: config[name] for name in TRANSFORMERS_DEFAULTS if config.get(name) is not None}
        values = {**TRANSFORMERS_DEFAULTS, **given}
        if not config.get("do_sample"):
            values["temperature"] = 0.0
        if config.get("max_new_tokens") is not None:
            values["max_tokens"] = config["max_new_tokens"]
        return cls(**values)


class FieldRule(NamedTuple):
    """What an option may be. ``normal`` makes what users write into what is kept; ``allowed`` sees the latter."""

    expected: str
    allowed: Callable[[Any], bool]
    normal: Callable[[Any], Any] = lambda value: value


def checked(name: str, value: Any) -> Any:
    """``value`` of one option as :class:`SamplingParams` keeps it, whatever the other options are.

    Raises:
        RequestError: it is out of range.
    """
    rule = RULES[name]
    try:
        kept = rule.normal(value)
        if rule.allowed(kept):  # NaN is in no range
            return kept
    except (TypeError, ValueError, AttributeError, OverflowError):
        pass
    raise RequestError(f"{name} is {shown(value)}, expected {rule.expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(expected: str, low: float, high: float) -> FieldRule:
    return FieldRule(expected, lambda value: _is_number(value) and low <= value <= high)


def _whole(expected: str, low: int, high: int = MAX_NUMBER) -> FieldRule:
    return FieldRule(expected, lambda value: _is_whole(value) and low <= value <= high)


def _switch() -> FieldRule:
    return FieldRule("True or False", lambda value: isinstance(value, bool))


def _whole_or_none(expected: str, high: int = MAX_NUMBER) -> FieldRule:
    return FieldRule(f"None or {expected}", lambda value: value is None or (_is_whole(value) and 0 <= value <= high))


def _bias_pairs(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = dict(value or ()).items()
    return tuple(sorted((int(key) if isinstance(key, str) else key, bias) for key, bias in pairs))  # JSON's keys


def _is_token_id(value: Any) -> bool:
    return _is_whole(value) and 0 <= value <= MAX_NUMBER


def _is_bias(pair: tuple[Any, Any]) -> bool:
    token_id, bias = pair
    return _is_token_id(token_id) and _is_number(bias) and -100 <= bias <= 100


def _is_stop_text(value: Any) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_STOP_CHARACTERS:
        return False
    value.encode()  # a lone surrogate, which JSON can write, is a UnicodeEncodeError, a ValueError
    return True


def _texts(longest: int) -> FieldRule:
    return FieldRule(
        f"at most {MAX_STOP_TEXTS} texts of 1 to {longest} characters, none of them a lone surrogate",
        lambda texts: len(texts) <= MAX_STOP_TEXTS and all(map(_is_stop_text, texts)),
        _strings,
    )


def _kind(value: Any) -> Any:
    return RequestOutputKind(value) if _is_whole(value) else value


def _strings(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


RULES = {
    "temperature": FieldRule(
        "0 (greedy) or from 1e-6 to 100", lambda value: _is_number(value) and (value == 0 or 1e-6 <= value <= 100)
    ),
    "top_p": _number("a number from 0 to 1", 0, 1),
    "top_k": _whole("a whole number, 0 (off) or more", 0),
    "repetition_penalty": _number("a number from 0.01 to 100", 0.01, 100),
    "seed": _whole_or_none("a whole number from 0 to 2^64 - 1", 2**64 - 1),
    "max_tokens": FieldRule(
        "a whole number, 1 or more, or None for what is left",
        lambda value: _is_whole(value) and 1 <= value <= MAX_NUMBER,
        lambda value: MAX_NUMBER if value is None else value,
    ),
    "min_p": _number("a number from 0 to 1", 0, 1),
    "presence_penalty": _number("a number from -2 to 2", -2, 2),
    "frequency_penalty": _number("a number from -2 to 2", -2, 2),
    "logit_bias": FieldRule(
        f"at most {MAX_TOKEN_IDS} token ids from 0 to {MAX_NUMBER}, each with a number from -100 to 100",
        lambda pairs: len(pairs) <= MAX_TOKEN_IDS and all(map(_is_bias, pairs)),
        _bias_pairs,
    ),
    "n": _whole("a whole number from 1 to 1024", 1, 1024),
    "stop": _texts(MAX_STOP_CHARACTERS),
    "stop_token_ids": FieldRule(
        f"at most {MAX_TOKEN_IDS} token ids from 0 to {MAX_NUMBER}",
        lambda ids: len(ids) <= MAX_TOKEN_IDS and all(map(_is_token_id, ids)),
        lambda value: tuple(value or ()),
    ),
    "include_stop_str_in_output": _switch(),
    "ignore_eos": _switch(),
    "min_tokens": _whole("a whole number, 0 (off) or more", 0),
    "logprobs": _whole_or_none("a whole number, 0 or more"),
    "prompt_logprobs": _whole_or_none("a whole number, 0 or more"),
    "num_beams": _whole("a whole number from 1 (off) to 128", 1, 128),
    "length_penalty": _number("a number from -5 to 5", -5, 5),
    "early_stopping": FieldRule("True, False or 'never'", lambda value: isinstance(value, bool) or value == "never"),
    "bad_words": _texts(MAX_STOP_CHARACTERS),
    "allowed_token_ids": FieldRule(
        "None or token ids, at least one",
        lambda ids: ids is None or (0 < len(ids) <= MAX_TOKEN_IDS and all(map(_is_token_id, ids))),
        lambda value: None if value is None else tuple(value),
    ),
    "skip_special_tokens": _switch(),
    "spaces_between_special_tokens": _switch(),
    "detokenize": _switch(),
    "truncate_prompt_tokens": FieldRule(
        "None, -1 (what the engine takes) or a whole number, 1 or more",
        lambda value: value is None or (_is_whole(value) and (value == -1 or 1 <= value <= MAX_NUMBER)),
    ),
    "logits_processors": FieldRule(
        f"at most {MAX_PROCESSORS} functions of (answer's ids, logits) or (prompt's ids, answer's ids, logits)",
        lambda functions: len(functions) <= MAX_PROCESSORS and all(map(is_processor, functions)),
        lambda value: tuple(value or ()),
    ),
    "output_kind": FieldRule(
        "a RequestOutputKind", lambda value: isinstance(value, RequestOutputKind), lambda value: _kind(value)
    ),
    "extra_args": FieldRule(
        f"None or at most {MAX_EXTRA_ARGS} values by name",
        lambda value: value is None or (len(value) <= MAX_EXTRA_ARGS and all(isinstance(name, str) for name in value)),
        lambda value: None if value is None else dict(value.items()),
    ),
    "thinking_token_budget": _whole_or_none("a whole number, 0 or more"),
    "structured_outputs": FieldRule(
        "None or a StructuredOutputsParams", lambda value: True, StructuredOutputsParams.of
    ),
    "cache_salt": FieldRule(
        f"None or a text of 1 to {MAX_STOP_CHARACTERS} characters, none of them a lone surrogate",
        lambda value: value is None or _is_stop_text(value),
    ),
}

# what of two or more options makes no sense together, and the message about it
CONTRADICTIONS: tuple[tuple[Callable[[SamplingParams], bool], str], ...] = (
    (
        lambda params: params.min_tokens > params.max_tokens,
        "min_tokens is {min_tokens}, expected at most max_tokens, which is {max_tokens}",
    ),
    (
        lambda params: params.num_beams > 1 and not params.greedy,
        "num_beams is {num_beams} at temperature {temperature}: beam search draws nothing; set temperature to 0",
    ),
    (
        lambda params: params.num_beams > 1 and params.n > params.num_beams,
        "n is {n}, expected at most num_beams, which is {num_beams}",
    ),
    (
        lambda params: params.num_beams > 1 and params.logprobs is not None,
        "logprobs is {logprobs} with num_beams {num_beams}: beam search reports scores only; leave one out",
    ),
    (
        lambda params: params.num_beams > 1 and bool(params.stop),
        "stop is {stop} with num_beams {num_beams}: beam search ends at tokens only; use stop_token_ids",
    ),
    (
        lambda params: params.num_beams == 1 and (params.length_penalty != 1 or params.early_stopping is not False),
        "length_penalty is {length_penalty} and early_stopping {early_stopping} without beam search; "
        "set num_beams to 2 or more",
    ),
    (
        lambda params: bool(params.stop) and not params.detokenize,
        "stop is {stop} with detokenize False: stop texts are found in the text; leave one out",
    ),
    (
        lambda params: params.structured_outputs is not None and (params.num_beams > 1 or params.ignore_eos),
        "structured_outputs are given with num_beams {num_beams} and ignore_eos {ignore_eos}: such an answer is "
        "sampled, and ends by itself; leave them out",
    ),
    (
        lambda params: params.num_beams > 1 and params.thinking_token_budget is not None,
        "thinking_token_budget is {thinking_token_budget} with num_beams {num_beams}; leave one out",
    ),
    (
        lambda params: params.num_beams > 1 and bool(params.allowed_token_ids or params.logits_processors),
        "allowed_token_ids or logits_processors are given with num_beams {num_beams}; leave one out",
    ),
)
