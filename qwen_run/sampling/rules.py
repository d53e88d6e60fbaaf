"""What each option of a request may be, and the limits of all lists and numbers, in one table: :data:`RULES`."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

from qwen_engine.errors import RequestError, shown
from qwen_run.sampling.custom import is_processor
from qwen_run.sampling.structured import StructuredOutputsParams

# Limits of what one request may ask for; RULES has those that belong to one option. No vocabulary is as large as these.
MAX_NUMBER = 2**31 - 1
MAX_TOKEN_IDS = 2**20
MAX_STOP_TEXTS, MAX_STOP_CHARACTERS = 64, 1024
MAX_PROCESSORS, MAX_EXTRA_ARGS = 64, 64
MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = 2**14, 256
# of a conversation: characters are those of all its texts, or of all tools; the longest contexts hold fewer
MAX_MESSAGES, MAX_PARTS, MAX_TOOLS = 2**14, 2**14, 2**10
MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH = 2**25, 2**20, 64


class RequestOutputKind(IntEnum):
    """What an output of a stream holds: all so far, what is new since the last, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


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


def bias_pairs(value: Any) -> tuple[tuple[int, float], ...]:
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


def _id_list(normal: Callable[[Any], Any] = lambda value: tuple(value or ())) -> FieldRule:
    return FieldRule(
        f"at most {MAX_TOKEN_IDS} token ids from 0 to {MAX_NUMBER}",
        lambda ids: len(ids) <= MAX_TOKEN_IDS and all(map(_is_token_id, ids)),
        normal,
    )


def _texts(longest: int) -> FieldRule:
    return FieldRule(
        f"at most {MAX_STOP_TEXTS} texts of 1 to {longest} characters, none of them a lone surrogate",
        lambda texts: len(texts) <= MAX_STOP_TEXTS and all(map(_is_stop_text, texts)),
        strings,
    )


def token_ids(value: Any) -> tuple[Any, ...]:
    """One token id, or several."""
    return (value,) if _is_whole(value) else tuple(value or ())


def _is_bad_word(ids: tuple[Any, ...]) -> bool:
    return 0 < len(ids) <= MAX_BAD_WORD_TOKENS and all(map(_is_token_id, ids))


def _kind(value: Any) -> Any:
    return RequestOutputKind(value) if _is_whole(value) else value


def strings(value: Any) -> tuple[str, ...]:
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
        lambda value: value is None or (_is_whole(value) and 1 <= value <= MAX_NUMBER),
    ),
    "min_p": _number("a number from 0 to 1", 0, 1),
    "presence_penalty": _number("a number from -2 to 2", -2, 2),
    "frequency_penalty": _number("a number from -2 to 2", -2, 2),
    "logit_bias": FieldRule(
        f"at most {MAX_TOKEN_IDS} token ids from 0 to {MAX_NUMBER}, each with a number from -100 to 100",
        lambda pairs: len(pairs) <= MAX_TOKEN_IDS and all(map(_is_bias, pairs)),
        bias_pairs,
    ),
    "n": _whole("a whole number from 1 to 1024", 1, 1024),
    "stop": _texts(MAX_STOP_CHARACTERS),
    "stop_token_ids": _id_list(),
    "include_stop_str_in_output": _switch(),
    "ignore_eos": _switch(),
    "min_tokens": _whole("a whole number, 0 (off) or more", 0),
    "logprobs": _whole_or_none("a whole number, 0 or more"),
    "prompt_logprobs": _whole_or_none("a whole number, 0 or more"),
    "prompt_logprobs_start": _whole("a whole number, 0 or more", 0),
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
    "max_length": FieldRule(
        "None or a whole number, 1 or more",
        lambda value: value is None or (_is_whole(value) and 1 <= value <= MAX_NUMBER),
    ),
    "min_length": _whole("a whole number, 0 (off) or more", 0),
    "suppress_tokens": _id_list(),
    "begin_suppress_tokens": _id_list(),
    "bad_words_ids": FieldRule(
        f"at most {MAX_BAD_WORDS} lists of 1 to {MAX_BAD_WORD_TOKENS} token ids from 0 to {MAX_NUMBER}",
        lambda words: len(words) <= MAX_BAD_WORDS and all(map(_is_bad_word, words)),
        lambda value: tuple(tuple(word) for word in value or ()),
    ),
    "no_repeat_ngram_size": _whole("a whole number, 0 (off) or more", 0),
    "forced_bos_token_id": FieldRule(
        f"None or a token id from 0 to {MAX_NUMBER}", lambda value: value is None or _is_token_id(value)
    ),
    "forced_eos_token_id": _id_list(token_ids),
}
