"""How answers are chosen: every option of a request, its range, and which of them exclude each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Self

from qwen_engine.errors import RequestError, shown
from qwen_run.sampling.custom import LogitsProcessor
from qwen_run.sampling.rules import MAX_NUMBER, RULES, RequestOutputKind, bias_pairs, checked, strings, token_ids
from qwen_run.sampling.structured import StructuredOutputsParams

_ID_LISTS = (
    "stop_token_ids",
    "allowed_token_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_eos_token_id",
)

# what transformers' GenerationConfig uses where generation_config.json is silent
TRANSFORMERS_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0, "min_p": 0.0}

# what of generation_config.json are defaults of a request, and the option that has them
OF_GENERATION_CONFIG = {
    **{name: name for name in TRANSFORMERS_DEFAULTS},
    "max_new_tokens": "max_tokens",
    "max_length": "max_length",
    "min_new_tokens": "min_tokens",
    "min_length": "min_length",
    "stop_strings": "stop",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
    "bad_words_ids": "bad_words_ids",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "forced_bos_token_id": "forced_bos_token_id",
    "forced_eos_token_id": "forced_eos_token_id",
}


@dataclass(unsafe_hash=True)
class SamplingParams:
    """How one request is answered. Names are vLLM's; those of beam search, and those from ``max_length`` on,
    transformers'.

    Lists are kept as hashable tuples; None stands for none. A value is checked when it is set, and values that exclude
    each other when they are given together or a request is made; a request keeps those it was made with.

    Attributes:
        temperature: 0 is greedy.
        top_p: 1 is off.
        top_k: 0 is off.
        repetition_penalty: of tokens in the prompt or the answer; 1 is off (arXiv 1909.05858, section 4.1).
        seed: what the random numbers of this request are made from; None draws one, which the result tells.
        max_tokens: most tokens of an answer; None for ``max_length``, or as many as the engine has room for.
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
        prompt_logprobs_start: the first token of the prompt that has them; what stands before may be read from the
            cache.
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
        max_length: most tokens of prompt and answer together, where ``max_tokens`` is None.
        min_length: tokens that prompt and answer have before a token may end it, where ``min_tokens`` is 0.
        suppress_tokens: tokens that do not come.
        begin_suppress_tokens: tokens that do not begin an answer.
        bad_words_ids: sequences of tokens that do not come, not even where the prompt begins them.
        no_repeat_ngram_size: no so many tokens in a row come twice in prompt and answer; 0 is off.
        forced_bos_token_id: what follows a prompt of one token.
        forced_eos_token_id: the only tokens, one or several, that may be the last of ``max_tokens``.

    Raises:
        RequestError: a value is out of range, or excludes another; the message says which and what it may be.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 512
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
    prompt_logprobs_start: int = 0
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
    max_length: int | None = None
    min_length: int = 0
    suppress_tokens: Collection[int] = ()
    begin_suppress_tokens: Collection[int] = ()
    bad_words_ids: Collection[Sequence[int]] = ()
    no_repeat_ngram_size: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Collection[int] | None = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in RULES:
            raise AttributeError(f"SamplingParams has no {name!r}, it has {', '.join(RULES)}")
        object.__setattr__(self, name, checked(name, value))

    def __post_init__(self) -> None:
        for rule in CONTRADICTIONS:
            if rule.excluded(self):
                raise RequestError(rule.message.format_map({name: shown(value) for name, value in vars(self).items()}))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias`` as pairs of token id and bias, ids rising."""
        return bias_pairs(self.logit_bias)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return strings(self.stop)

    @property
    def bad_word_texts(self) -> tuple[str, ...]:
        """``bad_words`` as a tuple."""
        return strings(self.bad_words)

    @property
    def forced_last(self) -> tuple[int, ...]:
        """``forced_eos_token_id`` as a tuple."""
        return token_ids(self.forced_eos_token_id)

    def stop_ids(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """The tokens that end an answer of a model whose ends of sequence are ``eos_token_ids``."""
        return frozenset(self.stop_token_ids or ()) | frozenset(() if self.ignore_eos else eos_token_ids)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Compare the ids that are named with the model's vocabulary.

        Raises:
            RequestError: ``logit_bias`` or a list of ids names a token that the model does not have.
        """
        named: list[tuple[str, Collection[int]]] = [(name, getattr(self, name) or ()) for name in _ID_LISTS]
        named += [("logit_bias", dict(self.biases)), *(("bad_words_ids", word) for word in self.bad_words_ids)]
        named += [("forced_bos_token_id", () if self.forced_bos_token_id is None else (self.forced_bos_token_id,))]
        for name, ids in named:
            if max(ids, default=0) >= vocab_size:
                raise RequestError(f"{name} holds token {max(ids)}, expected 0 to {vocab_size - 1}")

    def most_tokens(self, prompt_length: int) -> int:
        """Most tokens of the answer to a prompt of ``prompt_length``; less than 1 where ``max_length`` leaves none."""
        if self.max_tokens is not None:
            return self.max_tokens
        return MAX_NUMBER if self.max_length is None else self.max_length - prompt_length

    def least_tokens(self, prompt_length: int) -> int:
        """Tokens that the answer to a prompt of ``prompt_length`` has before a token may end it."""
        return self.min_tokens or max(0, self.min_length - prompt_length)

    def with_options(self, **given: Any) -> Self:
        """These as the defaults of a request that says ``given``, for which they give way where both cannot be.

        Raises:
            RequestError: a value is out of range, or ``given`` exclude each other.
        """
        off = {each.name: each.default for each in fields(self)}
        values: dict[str, Any] = {partner: off[partner] for name, partner in REPLACED.items() if name in given} | given
        for rule in CONTRADICTIONS:
            if rule.gives_way is not None and rule.gives_way not in given:
                merged = copy(self)
                for name, value in values.items():
                    setattr(merged, name, value)
                if rule.excluded(merged):
                    values[rule.gives_way] = rule.instead(merged)
        return replace(self, **values)

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> Self:
        """The defaults a checkpoint asks for in ``generation_config.json``, read as transformers reads them.

        Without ``do_sample`` the temperature is 0; what chooses among tokens is kept for a user who sets one.
        """
        given = {to: config[name] for name, to in OF_GENERATION_CONFIG.items() if config.get(name) is not None}
        values = {**TRANSFORMERS_DEFAULTS, **given}
        if not config.get("do_sample"):
            values["temperature"] = 0.0
        if "max_length" in given and "max_tokens" not in given:
            values["max_tokens"] = None
        least = values.pop("min_tokens", 0)
        most = cls(**values).max_tokens
        return cls(**values, min_tokens=least if most is None else min(least, most))


class Contradiction(NamedTuple):
    """Options that make no sense together, and the message about it.

    ``gives_way`` is the one of them that a checkpoint may set: where a request asks for the other, it becomes
    ``instead``.
    """

    excluded: Callable[[SamplingParams], bool]
    message: str
    gives_way: str | None = None
    instead: Callable[[SamplingParams], Any] = lambda params: ()


CONTRADICTIONS = (
    Contradiction(
        lambda params: params.max_tokens is not None and params.min_tokens > params.max_tokens,
        "min_tokens is {min_tokens}, expected at most max_tokens, which is {max_tokens}",
        "min_tokens",
        lambda params: params.max_tokens,
    ),
    Contradiction(
        lambda params: params.num_beams > 1 and not params.greedy,
        "num_beams is {num_beams} at temperature {temperature}: beam search draws nothing; set temperature to 0",
    ),
    Contradiction(
        lambda params: params.num_beams > 1 and params.n > params.num_beams,
        "n is {n}, expected at most num_beams, which is {num_beams}",
    ),
    Contradiction(
        lambda params: params.num_beams > 1 and params.logprobs is not None,
        "logprobs is {logprobs} with num_beams {num_beams}: beam search reports scores only; leave one out",
    ),
    Contradiction(
        lambda params: params.num_beams > 1 and bool(params.stop),
        "stop is {stop} with num_beams {num_beams}: beam search ends at tokens only; use stop_token_ids",
        "stop",
    ),
    Contradiction(
        lambda params: params.num_beams == 1 and (params.length_penalty != 1 or params.early_stopping is not False),
        "length_penalty is {length_penalty} and early_stopping {early_stopping} without beam search; "
        "set num_beams to 2 or more",
    ),
    Contradiction(
        lambda params: bool(params.stop) and not params.detokenize,
        "stop is {stop} with detokenize False: stop texts are found in the text; leave one out",
        "stop",
    ),
    Contradiction(
        lambda params: params.structured_outputs is not None and (params.num_beams > 1 or params.ignore_eos),
        "structured_outputs are given with num_beams {num_beams} and ignore_eos {ignore_eos}: such an answer is "
        "sampled, and ends by itself; leave them out",
    ),
    Contradiction(
        lambda params: params.num_beams > 1 and params.thinking_token_budget is not None,
        "thinking_token_budget is {thinking_token_budget} with num_beams {num_beams}; leave one out",
    ),
    Contradiction(
        lambda params: params.num_beams > 1 and bool(params.allowed_token_ids or params.logits_processors),
        "allowed_token_ids or logits_processors are given with num_beams {num_beams}; leave one out",
    ),
)

# an option that a request gives -> the checkpoint's other word for the same, which then is off
REPLACED = {"max_tokens": "max_length", "min_tokens": "min_length"}
