"""``QwenForCausalLM`` where torch or transformers is missing: arrays of token ids in and out."""

from __future__ import annotations

import operator
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qwen_engine.errors import EngineError, RequestError, first_line
from qwen_engine.manifest import MANIFEST_FILE, Manifest
from qwen_engine.tasks import GENERATE, check_task
from qwen_engine.whole_files import whole_directory
from qwen_run.api.build_on_demand import build_engine, engine_of, is_engine
from qwen_run.api.engine_config import EngineConfig
from qwen_run.api.generate_options import GenerateOptions, in_names_of_transformers, with_generate_options
from qwen_run.api.llm import LLM
from qwen_run.runtime.capacity import choose_capacity
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.machine import available_bytes
from qwen_run.sampling.params import SamplingParams
from qwen_run.text.chat_template import read_json
from qwen_run.text.text_model import GENERATION_CONFIG_FILE

Ids = NDArray[np.int64]
Config = EngineConfig | Mapping[str, Any] | None
Settings = Mapping[str, Any]

DEFAULT_NEW_TOKENS = 20  # what transformers generates where nothing says how many


class EngineForCausalLM:
    """A language model that generates as transformers' models do. Make one with ``from_pretrained`` or ``from_model``.

    ``qwen_run.QwenForCausalLM`` is this class where torch or transformers is missing. Where both are installed it is
    :class:`qwen_run.torch_model.model.QwenForCausalLM`, which has one of these inside.

    Attributes:
        engine: what runs.
        engine_config: how it is run.
        generation_config: what the checkpoint's ``generation_config.json`` says, the defaults of :meth:`generate`.
        lock: held while the engine runs; a thread may take it twice.
    """

    def __init__(self, directory: Path, config: EngineConfig) -> None:
        manifest = Manifest.read(directory)
        check_task(manifest.task, GENERATE)
        config.check(manifest)
        config.warn_without_effect()
        config.warn_above(choose_capacity(manifest, available_bytes(), max_seq_len=config.max_seq_len).num_blocks)
        self.engine_config = config
        self.engine = Engine.load(directory, num_blocks=config.kvcache_num_blocks, max_seq_len=config.max_seq_len)
        found = directory / GENERATION_CONFIG_FILE
        self.generation_config = read_json(found) if found.is_file() else {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self.lock = threading.RLock()  # an engine serves one core at a time

    @classmethod
    def from_pretrained(cls, path: str | Path, export: bool = False, engine_config: Config = None) -> Self:
        """Open the engine ``path``; with ``export`` build it first from the checkpoint ``path``.

        Args:
            path: an engine directory; with ``export`` a checkpoint directory or Hub id, whose engine is built once
                and kept in the user's cache directory.

        Raises:
            ValueError: ``engine_config`` violates a rule, or ``path`` and ``export`` do not go together.
            EngineError: the engine is damaged.
            BuildError: the checkpoint cannot be built.
        """
        config = EngineConfig.of(engine_config)
        if not isinstance(path, str | Path):
            raise ValueError(f"path is {path!r}, expected the path of an engine or a checkpoint")
        if export and is_engine(path):
            raise ValueError(f"export is True and {path} is an engine already; leave out export")
        if not export and (Path(path) / "config.json").is_file() and not is_engine(path):
            raise ValueError(f"export is False and {path} is a checkpoint, expected an engine; pass export=True")
        return cls(engine_of(path, config.build_options) if export else Path(path), config)

    @classmethod
    def from_model(cls, model: Any, engine_config: Config = None, tokenizer: Any = None) -> Self:
        """Build an engine from the weights of a transformers model; it lasts as long as the object that is returned.

        Args:
            model: what has ``save_pretrained``, as transformers' models do.
            tokenizer: the same of its tokenizer; without one the engine takes and gives token ids only.

        Raises:
            ValueError: ``engine_config`` violates a rule, or ``model`` or ``tokenizer`` is something else.
            BuildError: the model cannot be built.
        """
        config = EngineConfig.of(engine_config)
        given = {"model": model, **({} if tokenizer is None else {"tokenizer": tokenizer})}
        for name, value in given.items():
            if not hasattr(value, "save_pretrained"):
                raise ValueError(f"{name} is {value!r}, expected a transformers {name}")
        try:
            scratch = tempfile.TemporaryDirectory(prefix="qwen-engine-")
        except OSError as error:
            raise EngineError(f"no directory for temporary files: {error.strerror}; set TMPDIR to one") from error
        checkpoint, engine = Path(scratch.name) / "checkpoint", Path(scratch.name) / "engine"
        try:
            for name, value in given.items():
                _save(name, value, checkpoint)
            build_engine(checkpoint, engine, config.build_options)
            shutil.rmtree(checkpoint)
            made = cls(engine, config)
        except BaseException:
            scratch.cleanup()
            raise
        made._scratch = scratch
        return made

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the engine to ``directory``, for :meth:`from_pretrained` and the commands.

        It appears whole or not at all.

        Raises:
            EngineError: ``directory`` holds something, or cannot be written.
        """
        source, target = self.engine.directory, Path(os.path.realpath(directory))

        def replaces() -> bool:
            if target.exists() and any(target.iterdir()):
                raise EngineError(f"{directory} is not empty; remove it or choose another")
            return True

        try:
            replaces()
            with whole_directory(target, replaces) as new:
                for name in (*self.engine.manifest.parts, MANIFEST_FILE):
                    shutil.copyfile(source / name, new / name)
        except OSError as error:
            raise EngineError(f"{directory} cannot be written: {error.strerror}; choose another") from error

    @with_generate_options
    def generate(
        self, input_ids: Any = None, attention_mask: Any = None, settings: Settings | None = None, **options: Any
    ) -> Any:
        """Continue every row of ``input_ids``, with the arguments and defaults of transformers' ``generate``.

        A row's answer depends on that row alone, not on the batch nor on how it is padded.

        Args:
            input_ids: (rows, length) integers, a NumPy array or a torch tensor, padded left or right.
            attention_mask: (rows, length), 0 where ``input_ids`` is padding. If None, padding is where the pad token
                stands, provided that it is no end-of-sequence token.
            settings: what is chosen where no option says so; what ``generation_config`` says if None.
            options: ``max_new_tokens`` and the others of :class:`~qwen_run.api.generate_options.GenerateOptions`.

        Returns:
            (rows * num_return_sequences, length + most new tokens) int64: ``input_ids``, the new tokens with the
            end-of-sequence token, padding. A tensor on the same device where ``input_ids`` is one.

        Raises:
            TypeError: an option is unknown.
            ValueError: an argument is missing, out of range or not as described.
            EngineError: the engine cannot answer a row.
        """
        asked = GenerateOptions.of(options)
        defaults = self.generation_config if settings is None else settings
        ids = _to_array("input_ids", input_ids)
        manifest = self.engine.manifest
        eos = _as_ids("eos_token_id", _default("eos_token_id", asked.eos_token_id, defaults, manifest.eos_token_ids))
        pad = _first(_as_ids("pad_token_id", _default("pad_token_id", asked.pad_token_id, defaults, eos[:1])))
        mask = _mask(ids, attention_mask, pad, eos)
        length = ids.shape[1]
        room = self._num_new(length, asked, defaults)
        stop_ids = [token_id for token_id in eos if 0 <= token_id < manifest.model.vocab_size]
        try:
            params = asked.sampling_params(defaults, length, room, stop_ids)
            seeds = [None if asked.seed is None else asked.seed + row for row in range(len(ids))]
            prompts = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
            answers = self._answer(prompts, [replace(params, seed=seed) for seed in seeds])
        except RequestError as error:
            raise ValueError(in_names_of_transformers(str(error))) from error
        rows = np.full((len(answers), length + max(map(len, answers))), 0 if pad is None else pad, np.int64)
        rows[:, :length] = np.repeat(ids, params.n, axis=0)
        for row, answer in zip(rows, answers, strict=True):
            row[length : length + len(answer)] = answer
        return input_ids.new_tensor(rows) if _is_tensor(input_ids) else rows

    def close(self) -> None:
        """Remove an engine that was built from a model; nothing else is kept on disk."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def _answer(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
        """The new tokens of every answer to every prompt."""
        width = max(self.engine_config.batch_size, *(each.num_beams for each in params))
        llm = LLM(
            self.engine,
            skip_tokenizer_init=not params[0].stop,
            max_batch_size=width,
            max_batch_tokens=width + self.engine_config.prefill_chunk_size,
            max_drafts=0,
        )
        rows = [
            llm.prepare(prompt, p, name=f"row {i}") for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]
        with self.lock, llm:
            for output in llm.run(rows, final_only=True):
                if output.error is not None:
                    raise EngineError(output.error)
        return [sequence.output for row in rows for sequence in row.request.sequences]

    def _num_new(self, length: int, asked: GenerateOptions, defaults: Settings) -> int:
        """Most new tokens of a row of ``length``; what is given as an argument goes before ``defaults``."""
        longest = self.engine.manifest.limits.max_seq_len
        max_length, max_new_tokens = asked.max_length, asked.max_new_tokens
        if max_new_tokens is None and max_length is None:
            max_new_tokens, max_length = defaults.get("max_new_tokens"), defaults.get("max_length")
        if max_new_tokens is None:
            max_new_tokens = DEFAULT_NEW_TOKENS if max_length is None else max_length - length
            if max_new_tokens < 1:
                raise ValueError(f"max_length is {max_length}, expected more than the {length} tokens of input_ids")
        elif max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
        if length >= longest:
            raise ValueError(f"input_ids has {length} columns, expected less than max_seq_len, which is {longest}")
        return min(max_new_tokens, longest - length)


def _default(name: str, given: Any, defaults: Settings, otherwise: Any) -> Any:
    """An argument of ``generate``: as given, else as ``defaults`` have it."""
    if given is not None:
        return given
    configured = defaults.get(name)
    return otherwise if configured is None else configured


def _save(name: str, value: Any, checkpoint: Path) -> None:
    try:
        value.save_pretrained(checkpoint)
    except Exception as error:  # a full disk is an error of safetensors' own, not an OSError
        reason = first_line(error)
        raise EngineError(
            f"the {name} cannot be saved to {checkpoint}: {reason}; set TMPDIR to another place"
        ) from error


def _is_tensor(value: Any) -> bool:
    """Whether ``value`` is torch's, seen without importing torch."""
    return type(value).__module__.partition(".")[0] == "torch"


def _to_array(name: str, value: Any) -> Ids:
    """(rows, length) int64 of an argument of ``generate``."""
    try:
        array = np.asarray(value.detach().cpu() if _is_tensor(value) else value)
    except ValueError:  # rows of different lengths
        raise ValueError(f"{name} has rows of different lengths, expected integers (rows, length)") from None
    is_whole = array.dtype.kind in "iub"
    if array.ndim != 2 or 0 in array.shape or not is_whole:
        found = "None" if value is None else f"{array.dtype} {array.shape}"
        raise ValueError(f"{name} is {found}, expected integers (rows, length), neither of them 0")
    return array.astype(np.int64)


def _mask(ids: Ids, attention_mask: Any, pad: int | None, eos: list[int]) -> NDArray[np.bool_]:
    """Where ``ids`` are tokens and not padding."""
    if attention_mask is None:
        mask = np.ones_like(ids, bool) if pad is None or pad in eos else ids != pad
    else:
        values = _to_array("attention_mask", attention_mask)
        if values.shape != ids.shape or not np.isin(values, (0, 1)).all():
            raise ValueError(
                f"attention_mask is {values.shape}, expected 0 and 1 in the shape of input_ids {ids.shape}"
            )
        mask = values.astype(bool)
    if not mask.any(axis=1).all():
        raise ValueError(f"row {int(np.argmin(mask.any(axis=1)))} of input_ids is all padding, expected a token")
    return mask


def _as_ids(name: str, value: Any) -> list[int]:
    if value is None:
        return []
    try:
        return [operator.index(token_id) for token_id in (value if isinstance(value, list | tuple) else [value])]
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected a token id or a list of them") from None


def _first(ids: list[int]) -> int | None:
    return ids[0] if ids else None
