"""The defaults of an engine's answers: what ``generation_config.json`` asks for and engines have.

What is decided here is written into the engine's own ``generation_config.json`` in the ranges that requests take, so
that no request is ever refused for a default. What the file asks for and some or all answers do not have is named when
the engine is built, with the option that asks for the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from qwen_engine.errors import CheckpointError, RequestError, shown
from qwen_run.sampling.rules import RULES, checked


class Default(NamedTuple):
    """A value that engines have: what of ``expected`` is kept of it, None where it is something else."""

    expected: str
    kept: Callable[[Any], Any]


def _number(low: float, high: float) -> Callable[[Any], float | None]:
    return lambda value: value if _is_number(value) and low <= value <= high else None


def _temperature(value: Any) -> float | None:
    """At 1e-6 the likeliest token has all the probability, and so it has below."""
    if not _is_number(value) or not 0 <= value <= 100:
        return None
    return 0.0 if value == 0 else max(value, 1e-6)


def _top_k(value: Any) -> int | None:
    """vLLM's -1 stands for all tokens, as 0 does here and in transformers; some files have 20.0."""
    whole = _whole(value)
    return None if whole is None or whole < -1 else max(whole, 0)


def _whole(value: Any) -> int | None:
    return int(value) if _is_number(value) and math.isfinite(value) and value == int(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _switch(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _whole_from(low: int, value: Any) -> int | None:
    whole = _whole(value)
    return None if whole is None or whole < low else whole


def _request_option(name: str, value: Any) -> Any:
    """What requests take of it; lists in the form of JSON."""
    try:
        kept = checked(name, value)
    except RequestError:
        return None
    return [list(item) if isinstance(item, tuple) else item for item in kept] if isinstance(kept, tuple) else kept


def _token_id(value: Any) -> int | None:
    return value if type(value) is int else None


def _token_ids(value: Any) -> int | list[int] | None:
    ids = value if isinstance(value, list) else [value]
    return value if all(type(token_id) is int for token_id in ids) else None


def _same_as(option: str) -> Default:
    return Default(RULES[option].expected, partial(_request_option, option))


DEFAULTS = {
    "do_sample": Default("true or false", _switch),
    "temperature": Default("a number from 0 to 100", _temperature),
    "top_k": Default("a whole number, 0 or -1 for all tokens", _top_k),
    "top_p": Default("a number from 0 to 1", _number(0, 1)),
    "min_p": Default("a number from 0 to 1", _number(0, 1)),
    "repetition_penalty": Default("a number from 0.01 to 100", _number(0.01, 100)),
    "max_new_tokens": Default("a whole number, 1 or more", partial(_whole_from, 1)),
    "max_length": Default("a whole number, 1 or more", partial(_whole_from, 1)),
    "min_new_tokens": Default("a whole number, 0 or more", partial(_whole_from, 0)),
    "min_length": Default("a whole number, 0 or more", partial(_whole_from, 0)),
    "no_repeat_ngram_size": Default("a whole number, 0 or more", partial(_whole_from, 0)),
    "stop_strings": _same_as("stop"),
    "suppress_tokens": _same_as("suppress_tokens"),
    "begin_suppress_tokens": _same_as("begin_suppress_tokens"),
    "bad_words_ids": _same_as("bad_words_ids"),
    "forced_bos_token_id": _same_as("forced_bos_token_id"),
    "forced_eos_token_id": _same_as("forced_eos_token_id"),
    "num_beams": _same_as("num_beams"),
    "length_penalty": _same_as("length_penalty"),
    "early_stopping": _same_as("early_stopping"),
    "num_return_sequences": _same_as("n"),
    "eos_token_id": Default("a token id or a list of them", _token_ids),
    "bos_token_id": Default("a token id", _token_id),
    "pad_token_id": Default("a token id", _token_id),
}

# of transformers' interface alone -> the value with which it asks for nothing, and why it is no default of the others
OF_GENERATE: dict[str, tuple[Any, str]] = {
    "num_beams": (1, "excludes streams, drawing and stop texts; requests ask for it with --num-beams"),
    "num_return_sequences": (1, "is one answer elsewhere; requests ask for more with -n"),
}
OF_BEAMS = ("length_penalty", "early_stopping")

# lists of token ids, of which those that the model has are kept
OF_THE_VOCABULARY = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_eos_token_id")

# what engines do not have -> the values with which it asks for nothing
MISSING: dict[str, tuple[Any, ...]] = {
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_decoder_ids": ([],),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False, True),  # the probabilities of what is left are made to add up to 1 anyway
    "sequence_bias": ({}, []),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}

# how transformers runs the model
WITHOUT_EFFECT = frozenset(
    [
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "cache_config",
        "cache_implementation",
        "chat_format",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "is_assistant",
        "low_memory",
        "max_cache_len",
        "max_matching_ngram_size",
        "max_window_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "return_dict_in_generate",
        "speculation_type",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
        "use_mtp",
    ]
)

FILE = "generation_config.json"


def generation_defaults(config: Mapping[str, Any], vocab_size: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The engine's defaults, and a sentence about each thing that ``config`` asks for and not all answers have.

    Raises:
        CheckpointError: the tokens that end an answer are not token ids: an engine without them would not stop.
    """
    defaults: dict[str, Any] = {}
    notes = []
    for name, value in config.items():
        if value is None or name.startswith("_") or name in WITHOUT_EFFECT:
            continue
        if name in DEFAULTS:
            kept = DEFAULTS[name].kept(value)
            if kept is not None:
                defaults[name] = kept
            elif name == "eos_token_id":
                raise CheckpointError(f"{FILE}: eos_token_id is {value!r}, expected {DEFAULTS[name].expected}")
            else:
                notes.append(f"{FILE}: {name} {shown(value)} is left out, expected {DEFAULTS[name].expected}.")
        elif name not in MISSING:
            notes.append(f"{FILE}: {name} is unknown and left unread.")
        elif value not in MISSING[name]:
            notes.append(f"{FILE}: {name} {shown(value)} is left out, engines do not have it.")
    notes += _without_beams_that_draw(defaults)
    notes += _within(defaults, vocab_size)
    for name, (neutral, why) in OF_GENERATE.items():
        if defaults.get(name, neutral) != neutral:
            notes.append(f"{FILE}: {name} {defaults[name]} is a default of QwenForCausalLM.generate alone: it {why}.")
    return defaults, tuple(notes)


def _without_beams_that_draw(defaults: dict[str, Any]) -> list[str]:
    """Leave out what belongs to beam search where there is none, or where its beams would be drawn."""
    beams, notes = defaults.get("num_beams", 1), []
    if beams > 1 and defaults.get("do_sample"):
        notes.append(f"{FILE}: num_beams {beams} is left out: with do_sample it draws its beams, which engines do not.")
        beams = 1
    if beams == 1:
        for name in ("num_beams", *OF_BEAMS):
            defaults.pop(name, None)
    return notes


def _within(defaults: dict[str, Any], vocab_size: int) -> list[str]:
    """Leave out the ids that the model does not have."""

    def known(item: int | Sequence[int]) -> bool:
        return all(token_id < vocab_size for token_id in ([item] if isinstance(item, int) else item))

    notes = []
    for name in OF_THE_VOCABULARY:
        found = defaults.get(name, [])
        if beyond := [item for item in found if not known(item)]:
            defaults[name] = [item for item in found if known(item)]
            notes.append(
                f"{FILE}: {shown(beyond)} of {name} is left out, expected token ids from 0 to {vocab_size - 1}."
            )
    first = defaults.get("forced_bos_token_id")
    if first is not None and not known(first):
        del defaults["forced_bos_token_id"]
        notes.append(
            f"{FILE}: forced_bos_token_id {first} is left out, expected a token id from 0 to {vocab_size - 1}."
        )
    return notes
