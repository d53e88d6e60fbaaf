"""The requests as clients write them: one pydantic model each, which are also what ``/docs`` shows.

A field that none of them has is no error; the answer's ``warnings`` name it. A field of another type is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qwen_engine.errors import RequestError, shown
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.rules import checked
from qwen_run.sampling.structured import StructuredOutputsParams
from qwen_serve.common.errors import ServeError

MAX_CHOICES, MAX_STOP_TEXTS, MAX_LOGPROBS, MAX_PROMPTS = 16, 16, 20, 128

Model = TypeVar("Model", bound="Body")
StopTexts = str | Annotated[list[str], Field(max_length=MAX_STOP_TEXTS)]


class Body(BaseModel):
    """What every request has in common."""

    model_config = ConfigDict(strict=True, extra="allow")

    @property
    def warnings(self) -> list[str]:
        """What is read and has no effect."""
        return [f"unknown field {shown(name)} has no effect" for name in self.model_extra or {}]


class SampledBody(Body):
    """How an answer is chosen; the names are OpenAI's, and vLLM's and llama.cpp's where OpenAI has none."""

    model: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: StopTexts | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    return_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # read by others, and without effect on an answer here
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    request_id: str | None = None
    priority: int | None = None

    @property
    def includes_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def usage_goes_on(self) -> bool:
        """Every chunk tells how many tokens there are."""
        return bool((self.stream_options or {}).get("continuous_usage_stats"))


class Chat(SampledBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = None
    reasoning_budget_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    verbosity: str | None = None


class Completion(SampledBody):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None


class Tokenize(Body):
    """``POST /tokenize``: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class Detokenize(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


class ApplyTemplate(Body):
    """``POST /apply-template``."""

    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


def parsed(kind: type[Model], body: bytes) -> Model:
    """The request in ``body``.

    Raises:
        ServeError: it is no JSON, or a field is of another type; none of what it holds is repeated at length.
    """
    try:
        value = json.loads(body, parse_constant=_no_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise ServeError("invalid_request", f"the request is not JSON: {_first_words(error)}") from None
    if not isinstance(value, dict):
        raise ServeError("invalid_request", f"the request is a {type(value).__name__}, expected a JSON object")
    return validated(kind, value)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _number(digits: str) -> float:
    """
    Raises:
        ValueError: it is beyond what a float holds, and no answer could repeat it.
    """
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits:.40} is too large for a number")
    return value


def validated(kind: type[Model], value: Mapping[str, Any]) -> Model:
    """The request that ``value`` says.

    Raises:
        ServeError: a field is missing, or of another type.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(str(part) for part in _path(first["loc"], value))
        if first["type"] == "missing":
            raise ServeError("invalid_request", f"{path} is missing", path) from None
        message = f"{path} is {shown(first['input'])}: {_lowered(first['msg'])}"
        raise ServeError("invalid_request", message, path) from None


def _path(location: tuple[int | str, ...], value: Any) -> list[int | str]:
    """The part of ``location`` that leads into ``value``; pydantic adds the names of the types it has tried."""
    path: list[int | str] = []
    for part in location:
        if not path or (isinstance(value, Mapping) and part in value):
            value = value.get(part) if isinstance(value, Mapping) else None
        elif isinstance(part, int) and isinstance(value, list) and part < len(value):
            value = value[part]
        else:
            break
        path.append(part)
    return path


def _lowered(message: str) -> str:
    return f"{message[:1].lower()}{message[1:]}".replace("input should be", "expected")


def _first_words(error: BaseException) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]


# field of a request -> field of SamplingParams, where a request has it; a later row goes before an earlier one
SAMPLING: tuple[tuple[str, str], ...] = (
    ("temperature", "temperature"),
    ("top_p", "top_p"),
    ("top_k", "top_k"),
    ("min_p", "min_p"),
    ("repeat_penalty", "repetition_penalty"),
    ("repetition_penalty", "repetition_penalty"),
    ("presence_penalty", "presence_penalty"),
    ("frequency_penalty", "frequency_penalty"),
    ("logit_bias", "logit_bias"),
    ("seed", "seed"),
    ("stop", "stop"),
    ("stop_token_ids", "stop_token_ids"),
    ("include_stop_str_in_output", "include_stop_str_in_output"),
    ("ignore_eos", "ignore_eos"),
    ("min_tokens", "min_tokens"),
    ("max_tokens", "max_tokens"),
    ("max_completion_tokens", "max_tokens"),
    ("n", "n"),
    ("bad_words", "bad_words"),
    ("allowed_token_ids", "allowed_token_ids"),
    ("skip_special_tokens", "skip_special_tokens"),
    ("truncate_prompt_tokens", "truncate_prompt_tokens"),
    ("reasoning_budget_tokens", "thinking_token_budget"),
    ("thinking_token_budget", "thinking_token_budget"),
    ("cache_salt", "cache_salt"),
)


def form_of(body: SampledBody) -> StructuredOutputsParams | None:
    """The form that an answer is to have; vLLM's old names do, too.

    Raises:
        ServeError: what asks for it is none, or there are several.
    """
    old = ("json", "regex", "choice", "grammar")
    given = {f"guided_{each}": {each: getattr(body, f"guided_{each}")} for each in old}
    given = {name: value for name, value in given.items() if None not in value.values()}
    given |= {} if body.structured_outputs is None else {"structured_outputs": body.structured_outputs}
    try:
        forms = {name: StructuredOutputsParams.of(value) for name, value in given.items()}
        forms["response_format"] = StructuredOutputsParams.of_response_format(body.response_format)
    except RequestError as error:
        raise ServeError("invalid_request", str(error)) from None
    found = {name: form for name, form in forms.items() if form is not None}
    if len(found) > 1:
        raise ServeError("invalid_request", f"{' and '.join(found)} are given, expected one of them", list(found)[1])
    return next(iter(found.values()), None)


def sampling_params(body: SampledBody, defaults: SamplingParams, fixed: Mapping[str, Any]) -> SamplingParams:
    """``defaults`` with what ``body`` and then ``fixed`` say.

    Raises:
        ServeError: a value is out of range, or excludes another.
    """
    given: dict[str, Any] = {}
    for field, target in SAMPLING:
        value = getattr(body, field, None)
        if value is None:
            continue
        if field == "top_k" and value == -1:  # vLLM's way to turn it off
            value = 0
        try:
            given[target] = checked(target, value)
        except RequestError as error:
            raise ServeError("invalid_request", str(error).replace(target, field, 1), field) from None
    try:
        return defaults.with_options(**{**given, **fixed})
    except RequestError as error:
        raise ServeError("invalid_request", str(error)) from None


Usage = dict[str, Any]
FinishReason = Literal["stop", "length", "tool_calls"]
