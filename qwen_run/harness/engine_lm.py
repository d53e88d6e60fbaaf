"""``qwen-engine``, a model of lm-evaluation-harness: many requests in a batch, shared beginnings computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qwen_engine.errors import RequestError
from qwen_run.api.llm import LLM
from qwen_run.api.outputs import RequestOutput
from qwen_run.sampling.params import SamplingParams

DEFAULT_NEW_TOKENS = 256  # of an answer whose task does not say, as the harness's models have it
# What a task may set for an answer, in transformers' names, which are also those of SamplingParams.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
# Keywords that say nothing more once the others are read.
_READ = ("do_sample", "num_beams")


@register_model("qwen-engine")
class EngineLM(TemplateLM):
    """An engine that the harness asks for log likelihoods and answers.

    A log likelihood judges the tokens of the continuation alone: a context that several requests share, such as the
    examples of a task, is computed once and read from the prefix cache afterwards.

    Args:
        engine: the directory of an engine, or a checkpoint.
        max_length: most tokens of a context and its continuation; what the engine takes if None.
        max_gen_toks: most tokens of an answer whose task does not say.
        options: of :class:`~qwen_run.LLM`.
    """

    def __init__(
        self, engine: str | Path, max_length: int | None = None, max_gen_toks: int = DEFAULT_NEW_TOKENS, **options: Any
    ) -> None:
        super().__init__()
        for name in ("batch_size", "max_batch_size", "device"):  # the harness sets them for every model
            options.pop(name, None)
        self.llm = LLM(engine, **options)
        self.tokenizer = self.llm.tokenizer
        self.max_gen_toks = int(max_gen_toks)
        # One token is always generated, and the harness's own models do not feed the last token of a continuation.
        longest = self.llm.max_seq_len - 2
        if max_length is not None and int(max_length) > longest:
            raise RequestError(
                f"max_length is {max_length}, expected {longest} or less, the engine's max_seq_len less 2"
            )
        self.max_length = longest if max_length is None else int(max_length)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.llm.core.engine.manifest.eos_token_ids[0])

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps its cache of requests under."""
        return str(self.llm.core.engine.directory.resolve()).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of ``string``; control tokens that a chat template wrote are control tokens."""
        return list(self.tokenizer.encode(string, add_special_tokens is not False))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The text of the engine's chat template, for the harness's records."""
        template = self.llm.text.template if self.llm.text else None
        return "" if template is None or not chat_template else str(template.source)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text."""
        return str(
            self.llm.chat_prompt(
                chat_history,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        prompts, params = [], []
        for _texts, context, continuation in requests:
            ids = [*context, *continuation][-(self.max_length + 1) :]
            start = max(len(ids) - len(continuation), 1)
            prompts.append({"prompt_token_ids": ids})
            params.append(
                SamplingParams(
                    temperature=0, max_tokens=1, prompt_logprobs=0, prompt_logprobs_start=start, detokenize=False
                )
            )
        found = []
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        for request, output in zip(requests, outputs, strict=True):
            texts = request[0]
            _check(output, texts)
            judged = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
            entries = [row[token] for token, row in judged if row]
            found.append((sum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries)))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood of whole texts, in windows of ``max_length`` tokens that do not overlap."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        judged = iter(self._loglikelihood_tokens([w for each in windows for w in each], disable_tqdm=disable_tqdm))
        return [sum(next(judged)[0] for _ in each) for each in windows]

    def _windows(self, text: str) -> Iterator[tuple[None, list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        for context, continuation in map(make_disjoint_window, windows):
            yield None, list(context), list(continuation)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to texts, each up to the first of its stop texts."""
        prompts, params = [], []
        for text, options in (request.args for request in requests):
            chosen, most = self._sampling(options)
            if most >= self.max_length:
                raise RequestError(f"max_gen_toks is {most}, expected less than max_length, which is {self.max_length}")
            prompts.append({"prompt_token_ids": self.tok_encode(text)[-(self.max_length - most) :]})
            params.append(chosen)
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        answers = []
        for request, output in zip(requests, outputs, strict=True):
            _check(output, request.args)
            answers.append(output.outputs[0].text)
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _sampling(self, options: dict[str, Any]) -> tuple[SamplingParams, int]:
        """The parameters of an answer, and the most tokens it has."""
        left = normalize_gen_kwargs(options, self.max_gen_toks)
        most = int(left.pop("max_gen_toks"))
        stops = _texts(handle_stop_sequences(left.pop("until", None), eos=None))
        if left.get("num_beams", 1) != 1:
            raise RequestError("num_beams is set by a task, expected 1; use lm_eval's hf model with QwenForCausalLM")
        chosen = {name: left.pop(name) for name in _SAMPLING if name in left}
        unknown = [name for name in left if name not in _READ]
        if unknown:
            raise RequestError(f"a task sets {unknown[0]}, expected {', '.join(_SAMPLING)}")
        return SamplingParams(**{"temperature": 0.0, **chosen}, max_tokens=most, stop=stops), most


def _check(output: RequestOutput, asked: Any) -> None:
    if output.error is not None:
        raise RequestError(f"the harness's request {asked!r:.80} has no answer: {output.error}")


def _texts(stops: Iterable[str]) -> list[str]:
    return [stop for stop in stops if stop]
