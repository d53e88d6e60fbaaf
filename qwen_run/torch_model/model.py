"""An engine as a model of transformers: :class:`QwenForCausalLM`, tensors in and out."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qwen_engine.manifest import Manifest
from qwen_run.api.causal_lm import Config, EngineForCausalLM
from qwen_run.api.generate_options import with_generate_options
from qwen_run.runtime.engine import Engine
from qwen_run.torch_model.arguments import (
    check_cache,
    check_embeds,
    check_ids,
    check_positions,
    new_columns,
    next_labels,
    refuse_others,
)
from qwen_run.torch_model.embedding import EngineEmbedding
from qwen_run.torch_model.loading import EngineArguments
from qwen_run.torch_model.paged_cache import PagedCache
from qwen_run.torch_model.paged_rows import BlockPool
from qwen_run.torch_model.reading import read
from qwen_run.torch_model.which_loop import engine_options

# A model_type that transformers has no class for -> the one of the same configuration.
KNOWN_AS = {"qwen": "qwen2"}
# Pipelines of text generation take classes of these names alone.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("qwen-engine", "QwenForCausalLM")


class QwenForCausalLM(PreTrainedModel, GenerationMixin):
    """An engine that transformers takes for one of its models. Make one with ``from_pretrained`` or ``from_model``.

    It computes in float32 on the processor and cannot be trained. It may be used from several threads.

    Attributes:
        engine: what runs.
        engine_config: how it is run.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _supports_sdpa = True  # of the kernels, which no option of transformers chooses

    def __init__(self, arrays: EngineForCausalLM) -> None:
        super().__init__(_config(arrays.engine.manifest))
        self.name_or_path = str(arrays.engine.directory)  # where others look for the tokenizer
        self._arrays = arrays
        self._pool = BlockPool(arrays.engine.cache, arrays.lock)
        self._calls = threading.local()
        self.anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # what has a device and a dtype
        self.generation_config = _generation_config(arrays, self.config)
        self.eval()

    @property
    def engine(self) -> Engine:
        """What runs."""
        return self._arrays.engine

    @property
    def engine_config(self) -> Any:
        """How the engine is run, an :class:`~qwen_run.EngineConfig`."""
        return self._arrays.engine_config

    @property
    def num_free_blocks(self) -> int:
        """Blocks of the cache that no ``past_key_values`` holds."""
        return self._pool.num_free

    @property
    def last_loop(self) -> str | None:
        """Whose loop answered this thread's last :meth:`generate`: ``engine`` or ``transformers``."""
        return getattr(self._calls, "loop", None)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *_: Any, export: bool = False, engine_config: Config = None, **options: Any
    ) -> Self:
        """Open the engine ``path``; with ``export`` build it first from the checkpoint ``path``.

        Args:
            path: an engine directory; with ``export`` a checkpoint directory or Hub id, whose engine is built once
                and kept in the user's cache directory.
            engine_config: how the engine is built and run.
            options: fields of ``engine_config`` with the prefix ``engine_``; ``revision``, ``token``, ``cache_dir``,
                ``subfolder`` and ``local_files_only`` of a Hub id, as transformers has them. What transformers takes
                and has no effect here is named in a warning.

        Raises:
            TypeError: an option is unknown.
            ValueError: ``engine_config`` violates a rule, or ``path`` and ``export`` do not go together.
            EngineError: the engine is damaged.
            BuildError: the checkpoint cannot be built.
        """
        arguments = EngineArguments.of(path, export, engine_config, options)
        return cls(EngineForCausalLM.from_pretrained(arguments.path, export, arguments.engine_config))

    @classmethod
    def from_model(cls, model: Any, engine_config: Config = None, tokenizer: Any = None) -> Self:
        """As :meth:`EngineForCausalLM.from_model`."""
        return cls(EngineForCausalLM.from_model(model, engine_config, tokenizer))

    @classmethod
    def can_generate(cls) -> bool:
        """True."""
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def new_cache(self) -> PagedCache:
        """An empty ``past_key_values``, for a conversation that goes on over several calls."""
        return PagedCache(self._pool)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: PagedCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """The logits of new columns.

        Args:
            input_ids: (rows, columns) int64, the columns after those that ``past_key_values`` holds.
            attention_mask: (rows, all columns) 0 or 1, 0 where a column is padding, anywhere in a row.
            position_ids: accepted where they count each row's tokens, as they do by default.
            past_key_values: what this model returned for the columns before.
            inputs_embeds: (rows, columns, hidden_size) floats in place of ``input_ids``, of an engine that was built
                to take them.
            labels: (rows, columns) int64, -100 where none counts; the result then has their mean cross entropy, which
                is that of the rows without padding.
            use_cache: return ``past_key_values``, True by default.
            logits_to_keep: the number of last columns to return logits of, 0 for all, or their indices.

        Returns:
            ``logits`` float32 (rows, columns kept, vocab_size), 0 where a column is padding; ``past_key_values``;
            ``loss`` with labels.

        Raises:
            ValueError: an argument is not as described.
            RequestError: a row is longer than the engine takes.
            EngineError: the cache is full.
        """
        refuse_others(**others)
        cache = self.new_cache() if past_key_values is None else check_cache(past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds are both given or both missing, expected one of them")
        embeds = None if inputs_embeds is None else check_embeds(inputs_embeds, self.engine.manifest)
        ids = check_ids(input_ids, self.config.vocab_size) if embeds is None else torch.zeros(embeds.shape[:2]).long()
        if cache.batch_size == -1:
            cache.begin(len(ids))
        new = new_columns(ids, attention_mask, cache)
        check_positions(position_ids, cache, new)
        following = None if labels is None else next_labels(labels, new)
        wanted = torch.arange(ids.shape[1])
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep.cpu()
            wanted = wanted[kept]
        logits = read(self.engine, self._pool, cache, ids, new, wanted, self.engine_config.prefill_chunk_size, embeds)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, None, self.config.vocab_size, shift_labels=following)
        past = cache if use_cache is not False else None
        if past is None and past_key_values is None:
            cache.reset()
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)
        return output if return_dict is not False else output.to_tuple()

    @with_generate_options
    def generate(self, inputs: Any = None, attention_mask: Any = None, **options: Any) -> Any:
        """Continue every row, with all arguments of transformers' ``generate``.

        The engine's own loop answers what it knows, many rows in one batch: greedy, beams, and draws with ``seed``.
        Anything else goes through transformers' loop: draws from torch's generator, ``streamer``,
        ``logits_processor``, ``assistant_model``, scores, ``past_key_values``, ``inputs_embeds`` and the rest.
        :attr:`last_loop` says which it was. Greedy and beam answers are the same both ways.

        Args:
            inputs: (rows, length) token ids, a tensor or a NumPy array, padded left or right; also ``input_ids``.
            attention_mask: (rows, length), 0 where ``inputs`` is padding; on the left alone for transformers' loop.
            options: as transformers has them, and ``seed``: row ``i`` draws with ``seed + i``.

        Returns:
            What transformers returns: (rows, length + new tokens) int64; a NumPy array where ``inputs`` is one.

        Raises:
            TypeError, ValueError: an option is unknown, or an argument is not as described.
            EngineError: the engine cannot answer a row.
        """
        ids = options.pop("input_ids", None) if inputs is None else inputs
        is_array = isinstance(ids, np.ndarray)
        ids, mask = (torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in (ids, attention_mask))
        config = options.get("generation_config") or self.generation_config
        settings = {"eos_token_id": [], **config.to_diff_dict()}  # where it says none, there is none
        given = {name: value for name, value in options.items() if name != "generation_config"}
        own = engine_options(settings, given)
        if own is not None and isinstance(ids, torch.Tensor):
            self._calls.loop = "engine"
            with self._pool.lock:
                self._pool.collect()
                found = self._arrays.generate(ids, mask, settings, **own)
        else:
            self._calls.loop = "transformers"
            found = self._generate_in_torch(ids, mask, config.use_cache, options)
        return found.numpy() if is_array and isinstance(found, torch.Tensor) else found

    def _generate_in_torch(self, ids: Any, attention_mask: Any, use_cache: Any, options: dict[str, Any]) -> Any:
        if options.get("seed") is not None:
            raise ValueError("seed is given, transformers' loop draws from torch; call torch.manual_seed instead")
        made = None
        if options.get("use_cache", use_cache) is not False and options.get("past_key_values") is None:
            options["past_key_values"] = made = self.new_cache()
        if attention_mask is not None:
            if not bool(attention_mask[:, -1].all()):
                raise ValueError(
                    "attention_mask ends with padding, expected padding on the left: transformers' loop goes on after "
                    "the last column; set padding_side='left' of the tokenizer"
                )
            options["attention_mask"] = attention_mask
        with torch.no_grad():
            found = super().generate(ids, **options)
        if made is not None and isinstance(found, torch.Tensor):  # nobody else has it
            made.reset()
        return found

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Weights of the matrices that the engine was built from, none to be trained. Norms and biases do not count."""
        if only_trainable:
            return 0
        manifest = self.engine.manifest
        left_out = {"model.embed_tokens"} if exclude_embeddings else set()
        left_out |= {"lm_head"} if manifest.model.tie_word_embeddings else set()
        return sum(row.in_features * row.out_features for row in manifest.linears if row.name not in left_out)

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """As :meth:`EngineForCausalLM.save_pretrained`."""
        self._arrays.save_pretrained(directory)

    def to(self, *target: Any, **named: Any) -> Self:
        """This model, which stays where it is.

        Raises:
            ValueError: a device that is not the processor, or a dtype other than float32, is asked for.
        """
        for value in (*target, *named.values()):
            is_here = value in ("cpu", torch.float32, None) or value == torch.device("cpu") or isinstance(value, bool)
            if not is_here:
                raise ValueError(f"to({value!r}) is asked for, an engine computes in float32 on the cpu; leave it out")
        return self

    def train(self, mode: bool = True) -> Self:
        """This model, where ``mode`` is False.

        Raises:
            ValueError: ``mode`` is True.
        """
        if mode:
            _refuse("training", "train the checkpoint and build an engine of it")
        super().train(False)
        return self

    def cuda(self, *_: Any, **__: Any) -> Self:
        """Refused: an engine runs on the processor."""
        return self.to("cuda")

    def half(self, *_: Any) -> Self:
        """Refused: an engine computes in float32."""
        return self.to(torch.float16)

    def bfloat16(self, *_: Any) -> Self:
        """Refused: an engine computes in float32."""
        return self.to(torch.bfloat16)

    def resize_token_embeddings(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: an engine's weights are fixed."""
        _refuse("resize_token_embeddings", "resize the checkpoint and build an engine of it")

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """This model, where ``requires_grad`` is False.

        Raises:
            ValueError: ``requires_grad`` is True.
        """
        if requires_grad:
            _refuse("requires_grad_", "train the checkpoint and build an engine of it")
        return self

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: an engine has no gradients."""
        _refuse("gradient_checkpointing_enable", "train the checkpoint and build an engine of it")

    def get_input_embeddings(self) -> EngineEmbedding:
        """What looks up the rows of token ids, to put others beside them as ``inputs_embeds``.

        Raises:
            ValueError: the engine was built without ``inputs_embeds``.
        """
        if not self.engine.manifest.takes_embeds:
            _refuse("get_input_embeddings", "build it with --inputs-embeds (engine_use_inputs_embeds=True)")
        return EngineEmbedding(self.engine.directory)

    def get_output_embeddings(self) -> None:
        """None: an engine's weights are no tensors of torch."""

    def close(self) -> None:
        """Remove an engine that was built from a model; nothing else is kept on disk."""
        self._arrays.close()


def _refuse(what: str, advice: str) -> NoReturn:
    raise ValueError(f"{what} is asked for, an engine's weights are fixed; {advice}")


def _config(manifest: Manifest) -> Any:
    """The model's configuration in transformers' class, and its length the engine's."""
    fields = dict(vars(manifest.model))
    model_type = fields.pop("model_type")
    return AutoConfig.for_model(
        KNOWN_AS.get(model_type, model_type),
        **fields,
        max_position_embeddings=manifest.limits.max_seq_len,
        eos_token_id=list(manifest.eos_token_ids) or None,
    )


def _generation_config(arrays: EngineForCausalLM, config: Any) -> Any:
    """The engine's defaults in transformers' class."""
    settings: Mapping[str, Any] = arrays.generation_config
    if not settings:
        return GenerationConfig.from_model_config(config)
    return GenerationConfig.from_dict({"eos_token_id": config.eos_token_id, **settings})
