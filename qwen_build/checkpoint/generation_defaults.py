"""The defaults of an engine's answers: what ``generation_config.json`` asks for and engines have.

What is decided here is written into the engine's own ``generation_config.json`` in the ranges that requests take, so
that no request is ever refused for a default. Whatever else the file asks for is named when the engine is built, with
the option that asks for the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qwen_engine.errors import CheckpointError


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


def _count(value: Any) -> int | None:
    whole = _whole(value)
    return None if whole is None or whole < 1 else whole


def _whole(value: Any) -> int | None:
    return int(value) if _is_number(value) and math.isfinite(value) and value == int(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _switch(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _token_id(value: Any) -> int | None:
    return value if type(value) is int else None


def _token_ids(value: Any) -> int | list[int] | None:
    ids = value if isinstance(value, list) else [value]
    return value if all(type(token_id) is int for token_id in ids) else None


DEFAULTS = {
    "do_sample": Default("true or false", _switch),
    "temperature": Default("a number from 0 to 100", _temperature),
    "top_k": Default("a whole number, 0 or -1 for all tokens", _top_k),
    "top_p": Default("a number from 0 to 1", _number(0, 1)),
    "min_p": Default("a number from 0 to 1", _number(0, 1)),
    "repetition_penalty": Default("a number from 0.01 to 100", _number(0.01, 100)),
    "max_new_tokens": Default("a whole number, 1 or more", _count),
    "eos_token_id": Default("a token id or a list of them", _token_ids),
    "bos_token_id": Default("a token id", _token_id),
    "pad_token_id": Default("a token id", _token_id),
}

# what engines leave to each request -> the values with which it asks for nothing, and the option that asks for it
LEFT_TO_REQUESTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_length": ((20,), "--max-new-tokens"),
    "min_new_tokens": ((0,), "--min-tokens"),
    "min_length": ((0,), "--min-tokens"),
    "num_beams": ((1,), "--num-beams"),
    "num_return_sequences": ((1,), "-n"),
    "stop_strings": (([], ""), "--stop"),
    "suppress_tokens": (([],), "logit_bias"),
}

# what engines do not have -> the values with which it asks for nothing
MISSING: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_decoder_ids": ([],),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "no_repeat_ngram_size": (0,),
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

# of beam search alone, or how transformers runs the model
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
        "early_stopping",
        "is_assistant",
        "length_penalty",
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


def generation_defaults(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The engine's defaults, and a sentence about each thing that ``config`` asks for beside them.

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
                notes.append(f"{FILE}: {name} {value!r} is left out, expected {DEFAULTS[name].expected}.")
        elif name in LEFT_TO_REQUESTS:
            neutral, option = LEFT_TO_REQUESTS[name]
            if name == "max_length" and (kept := _count(value)) is not None:
                defaults[name] = kept  # of QwenForCausalLM.generate, which counts as transformers does
            if value not in neutral:
                notes.append(f"{FILE}: {name} {value!r} is no default; requests ask for it with {option}.")
        elif name not in MISSING:
            notes.append(f"{FILE}: {name} is unknown and left unread.")
        elif value not in MISSING[name]:
            notes.append(f"{FILE}: {name} {value!r} is left out, engines do not have it.")
    return defaults, tuple(notes)
