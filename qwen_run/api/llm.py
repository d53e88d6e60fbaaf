"""Prompts in, answers out, for programs: :class:`LLM` with the names and results of vLLM's class."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Generator, Mapping
from collections.abc import Sequence as List
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_engine.errors import EngineError, RequestError
from qwen_run.api.beam_search import BeamSearchOutput, BeamSearchParams, beams_of
from qwen_run.api.build_on_demand import engine_of
from qwen_run.api.hub_tokenizer import HubTokenizer
from qwen_run.api.llm_options import CORE, LLMOptions
from qwen_run.api.outputs import RequestOutput
from qwen_run.api.pending_request import PendingRequest
from qwen_run.api.pooled import PooledLLM
from qwen_run.api.pooling import PoolingParams
from qwen_run.api.prompts import ChatPrompt, Prompt, as_list, plain, token_ids
from qwen_run.pipeline.staged_engine import open_engine
from qwen_run.runtime.core import Core
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.flights import AnyEngine, PipelinedEngine
from qwen_run.runtime.request import Request
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.structured import StructuredOutputsParams
from qwen_run.text.chat_template import CONFIG_FILE, Message, read_json
from qwen_run.text.text_model import TextModel
from qwen_run.text.tokenizer import TOKENIZER_FILE, Tokenizer

Params = SamplingParams | List[SamplingParams] | None


class LLM(PooledLLM):
    """An engine that answers prompts, many at once; or makes embeddings, classes and scores of texts.

    Any number of threads may call it; they share batches. For asyncio there is
    :class:`~qwen_run.api.async_llm.AsyncLLM`.

    Args:
        model: an engine directory, an engine that is open already (with its text or without), or a checkpoint (a
            directory or a Hub id), which is built once and kept in the user's cache directory.
        threads: threads of one run; the physical cores if None.
        num_blocks: blocks of the cache; chosen by ``cache_bytes`` if None.
        cache_bytes: memory of the cache; chosen from the free memory if None.
        max_seq_len: most tokens of prompt and answer together; what the engine was built for if None, or what the
            cache holds where that is less. vLLM's ``max_model_len`` is the same.
        pipeline_parallel_size, distributed_executor_backend: as vLLM has them: stages of the engine's layers, each a
            process with its own weights and cache, and who runs them (``local``). Answers are those of one process.
        skip_tokenizer_init: do without what the engine has for text: prompts are token ids.
        options: ``seed`` of requests that have none; fields of :class:`~qwen_run.runtime.core.CoreOptions`, such as
            ``max_batch_size``. For a checkpoint also those of ``qwen_build.plan.options.BuildOptions``, such as
            ``quant``. vLLM's names do as well, see :mod:`qwen_run.api.llm_options`.

    Attributes:
        default_params: sampling as the checkpoint's ``generation_config.json`` asks for it.

    Raises:
        EngineError: the engine is damaged, or cannot have these options.
        BuildError: the checkpoint cannot be built, or an option is unknown.
    """

    def __init__(
        self,
        model: str | Path | AnyEngine | TextModel,
        *,
        threads: int | None = None,
        num_blocks: int | None = None,
        cache_bytes: int | None = None,
        skip_tokenizer_init: bool = False,
        **options: Any,
    ) -> None:
        chosen = LLMOptions.of(options)
        opening: dict[str, Any] = {"threads": threads, "num_blocks": num_blocks, "cache_bytes": cache_bytes}
        opening |= {"max_seq_len": chosen.max_seq_len, **chosen.pipeline}
        if isinstance(model, str | Path):
            model = open_engine(engine_of(model, chosen.build), **opening)
        elif not isinstance(model, Engine | PipelinedEngine | TextModel):
            raise EngineError(f"model is {reprlib.repr(model)}, expected an engine or a checkpoint, or the path of one")
        elif fixed := [*chosen.build, *(name for name, value in opening.items() if value is not None)]:
            raise EngineError(f"the engine is open, {', '.join(fixed)} cannot change it; expected {', '.join(CORE)}")
        text = model if isinstance(model, TextModel) else None if skip_tokenizer_init else _text_model(model)
        super().__init__(Core(model.engine if isinstance(model, TextModel) else model, chosen.core))
        self.default_params = text.defaults if text else SamplingParams()
        self._seeds = None if chosen.seed is None else itertools.count(chosen.seed)
        self._text = text
        self._numbers = itertools.count()

    @property
    def max_seq_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.core.engine.manifest.limits.max_seq_len

    @property
    def has_template(self) -> bool:
        """:meth:`chat` can be used."""
        return self._text is not None and self._text.template is not None

    @property
    def text(self) -> TextModel:
        """What the engine has for text.

        Raises:
            RequestError: it has no tokenizer, or was opened without.
        """
        return self._require_text()

    @property
    def tokenizer(self) -> Tokenizer:
        """
        Raises:
            RequestError: the engine has none.
        """
        return self._require_text().tokenizer

    def get_tokenizer(self) -> HubTokenizer:
        """The tokenizer with the names of transformers' tokenizers.

        Raises:
            RequestError: the engine has none.
        """
        text = self._require_text()
        path = self.core.engine.directory / CONFIG_FILE
        return HubTokenizer(text.tokenizer, text.template, read_json(path) if path.is_file() else {})

    def get_default_sampling_params(self) -> SamplingParams:
        """A copy of ``default_params``, to be changed."""
        return replace(self.default_params)

    def generate(
        self, prompts: Prompt | List[Prompt], sampling_params: Params = None, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Answer ``prompts``, each as it would be answered alone.

        Args:
            prompts: a text or the token ids of one, or a list of either. Texts go to the model as they are;
                :meth:`chat` is for questions. As in vLLM ``{"prompt": text}`` and ``{"prompt_token_ids": ids}`` do,
                too.
            sampling_params: one for all prompts or one each; ``default_params`` if None.
            use_tqdm: show progress where standard error is a terminal.

        Returns:
            One result a prompt, in their order.

        Raises:
            RequestError: before any is answered, for a prompt that is empty, too long, or holds unknown ids.
        """
        answerings = self._prepare_all(prompts, sampling_params)
        for _ in self.finish(answerings, use_tqdm):
            pass
        return [answering.output(whole=True) for answering in answerings]

    def chat(
        self,
        messages: List[Message] | List[List[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        tools: List[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        response_format: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several.

        Args:
            messages: objects with ``role`` and ``content``; a list of them, or a list of such lists.
            sampling_params, use_tqdm: as in :meth:`generate`.
            tools: JSON schemas of functions the model may call.
            chat_template_kwargs: passed to the chat template, such as ``enable_thinking``.
            add_generation_prompt: end the prompt with the opening of an answer.
            continue_final_message: go on with the last message instead; the answer is what comes after it.
            response_format: OpenAI's: ``{"type": "json_object"}``, or a JSON schema that answers keep to.

        Returns:
            One result a conversation; ``prompt`` is its text as the template wrote it.

        Raises:
            RequestError: as in :meth:`generate`, or the template refuses the messages.
        """
        if not isinstance(messages, List) or isinstance(messages, str):
            raise RequestError(f"messages is {reprlib.repr(messages)}, expected a list of messages, or of such lists")
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        options |= chat_template_kwargs or {}
        prompts = [self.chat_prompt(each, tools, **options) for each in conversations]  # type: ignore[arg-type]
        form = StructuredOutputsParams.of_response_format(response_format)
        if form is not None:
            given: Any = sampling_params
            each_params = given if isinstance(given, list | tuple) else [given] * len(prompts)
            sampling_params = [replace(each or self.default_params, structured_outputs=form) for each in each_params]
        return self.generate(prompts, sampling_params, use_tqdm)

    def beam_search(self, prompts: Prompt | List[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The likeliest answers to ``prompts``, each with its log probability.

        Returns:
            One result a prompt, in their order.

        Raises:
            RequestError: as in :meth:`generate`, or ``params`` is out of range.
            EngineError: the engine cannot answer a prompt.
        """
        if not isinstance(params, BeamSearchParams):
            raise RequestError(f"params is {reprlib.repr(params)}, expected BeamSearchParams")
        pending = self._prepare_all(prompts, params.sampling_params())
        for output in self.run(pending, final_only=True):
            if output.error is not None:
                raise EngineError(output.error)
        decode = self._text.tokenizer.decode if self._text else lambda *_: ""
        return [beams_of(each.request, lambda ids: decode(ids, False)) for each in pending]

    def stream(
        self, prompts: Prompt | List[Prompt], sampling_params: Params = None
    ) -> Generator[RequestOutput, None, None]:
        """As :meth:`generate`, and yield each answer as far as it has come, every time it has grown.

        Closing the iterator gives up what is not finished. Several may be read in turn, or by a thread each.
        """
        return self.run(self._prepare_all(prompts, sampling_params))

    def chat_prompt(
        self, messages: List[Message], tools: List[Mapping[str, Any]] | None = None, **variables: Any
    ) -> ChatPrompt:
        """A conversation and the opening of an answer as one prompt.

        Args:
            messages, tools: as in :meth:`chat`.
            variables: for the chat template; also ``add_generation_prompt`` and ``continue_final_message``.

        Raises:
            RequestError: the engine has no chat template, or it refuses the messages.
        """
        text = self._require_text()
        if text.template is None:
            raise RequestError(f"{self.core.engine.directory} has no chat template that can be used; use generate")
        return ChatPrompt(*text.chat_pieces(messages, tools, **variables))

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | PoolingParams | None = None,
        request_id: str | None = None,
        name: str = "the prompt",
    ) -> PendingRequest:
        """A request for :meth:`submit`; may be called by any thread.

        Args:
            params: of another engine than one that writes text ``PoolingParams``.
            name: what an error calls the prompt.

        Raises:
            RequestError: the prompt is empty, too long, or holds ids the model does not have; or an argument is of
                another type.
        """
        if isinstance(params, PoolingParams):
            return self.prepare_pooled(prompt, params, request_id or self._next_id(), name)
        params = self.default_params if params is None else params
        for label, value, kind in (("sampling_params", params, SamplingParams), ("request_id", request_id or "", str)):
            if not isinstance(value, kind):
                raise RequestError(f"{label} is {reprlib.repr(value)}, expected {kind.__name__}")
        seed = next(self._seeds) % 2**64 if params.seed is None and self._seeds else params.seed
        params = replace(params, seed=seed)  # a copy: the caller may change its own
        kept = self.max_seq_len - 1 if params.truncate_prompt_tokens == -1 else params.truncate_prompt_tokens
        prompt = plain(prompt, name)
        if isinstance(prompt, str):
            most = self.max_seq_len if kept is None else None
            text, ids = str(prompt), self._encoded(prompt, most)
        else:
            text, ids = None, token_ids(prompt, name)
        if kept is not None:
            ids = ids[-kept:]
        if params.stop_strings or params.bad_words or self._text:
            request = self._require_text().new_request(ids, params)
        else:
            request = Request(tuple(ids), params, frozenset(self.core.engine.manifest.eos_token_ids))
        self.core.check(request, name)
        tokenizer = self._text.tokenizer if self._text else None
        return PendingRequest(request_id or self._next_id(), text, request, tokenizer)

    def _encoded(self, prompt: str, most: int | None) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            return self.tokenizer.encode_pieces(prompt.pieces, most)
        return self.tokenizer.encode(prompt, True, most)

    def _prepare_all(self, prompts: Prompt | List[Prompt], params: Params) -> list[PendingRequest]:
        every = as_list(prompts)
        each: list[Any] = list(params) if isinstance(params, list | tuple) else [params] * len(every)
        if len(each) != len(every):
            raise RequestError(f"{len(each)} sampling_params for {len(every)} prompts; give one, or one a prompt")
        names = [f"prompt {index + 1}" if len(every) > 1 else "the prompt" for index in range(len(every))]
        return [self.prepare(prompt, p, None, name) for prompt, p, name in zip(every, each, names, strict=True)]

    def _next_id(self) -> str:
        return str(next(self._numbers))

    def _require_text(self) -> TextModel:
        if self._text is None:
            raise RequestError(
                f"{self.core.engine.directory} has no tokenizer, expected token ids instead of text; "
                f"or build the engine from a checkpoint that has {TOKENIZER_FILE}"
            )
        return self._text


def _text_model(engine: AnyEngine) -> TextModel | None:
    """What ``engine`` has for text; None where it has no tokenizer. Without a chat template it is for raw prompts."""
    if not (engine.directory / TOKENIZER_FILE).is_file():
        return None
    try:
        return TextModel.of(engine)
    except EngineError:
        return TextModel.of(engine, raw=True)
