"""The settings of :class:`~qwen_run.api.causal_lm.QwenForCausalLM`, and every rule they have to keep."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qwen_engine.choices import QUANTS
from qwen_engine.graph_io import KEY_TILE
from qwen_engine.manifest import MIN_SEQ_LEN, Manifest

CHUNK_MULTIPLE = 64  # tokens


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is built and run.

    Attributes:
        batch_size: rows of ``input_ids`` answered at once, which the cache has room for at full length; more rows
            wait for those before them.
        max_seq_len: most tokens of a row, prompt and answer together; what the model was trained for, or the
            engine was built for, if None.
        kvcache_block_size: tokens of a block of the cache; the builder's choice if None.
        kvcache_num_blocks: blocks of the cache; estimated from the free memory if None.
        prefill_chunk_size: most tokens of prompts in one run of the model.
        quantization: how weights are stored, ``none`` (float32), ``int8``, ``int6``, ``int5`` or ``int4``; the
            builder's default, or what the engine has, if None.
        use_inputs_embeds: whether ``generate`` is given embeddings instead of token ids.

    Raises:
        ValueError: a rule is violated; the message names it.
    """

    batch_size: int = 1
    max_seq_len: int | None = None
    kvcache_block_size: int | None = None
    kvcache_num_blocks: int | None = None
    prefill_chunk_size: int = 128
    quantization: str | None = None
    use_inputs_embeds: bool = False

    def __post_init__(self) -> None:
        _check("batch_size", self.batch_size, "a positive integer", lambda n: n >= 1)
        _check("prefill_chunk_size", self.prefill_chunk_size, f"a positive multiple of {CHUNK_MULTIPLE}", _is_chunk)
        if self.max_seq_len is not None:
            expected = f"{MIN_SEQ_LEN} tokens or more, one of a prompt and one of its answer"
            _check("max_seq_len", self.max_seq_len, expected, lambda n: n >= MIN_SEQ_LEN)
        if self.kvcache_block_size is not None:
            _check("kvcache_block_size", self.kvcache_block_size, f"a power of two from {KEY_TILE}", _is_block)
        if self.kvcache_num_blocks is not None:
            _check("kvcache_num_blocks", self.kvcache_num_blocks, "a positive integer", lambda n: n >= 1)
        if self.quantization is not None and self.quantization not in QUANTS:
            raise ValueError(f"quantization is {self.quantization!r}, expected one of {', '.join(QUANTS)}")
        if not isinstance(self.use_inputs_embeds, bool):
            raise ValueError(f"use_inputs_embeds is {self.use_inputs_embeds!r}, expected True or False")
        if self.use_inputs_embeds:
            raise ValueError(
                "use_inputs_embeds is True, engines look embeddings up; leave it out and give generate the token ids "
                "as input_ids"
            )

    @classmethod
    def of(cls, config: EngineConfig | Mapping[str, Any] | None) -> Self:
        """``config`` as an EngineConfig; None is the defaults.

        Raises:
            ValueError: a field is unknown, or a rule is violated.
        """
        if not isinstance(config, EngineConfig | Mapping | None):
            raise ValueError(f"engine_config is {config!r}, expected an EngineConfig, a mapping of its fields or None")
        fields = vars(config) if isinstance(config, EngineConfig) else dict(config or {})
        if unknown := sorted(fields.keys() - cls.__dataclass_fields__.keys()):
            raise ValueError(f"engine_config has {unknown[0]!r}, expected {', '.join(cls.__dataclass_fields__)}")
        return cls(**fields)

    @property
    def build_options(self) -> dict[str, Any]:
        """The fields of ``qwen_build.plan.options.BuildOptions`` this config asks for."""
        asked = {
            "quant": self.quantization,
            "max_seq_len": self.max_seq_len,
            "block_size": self.kvcache_block_size,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def check(self, manifest: Manifest) -> None:
        """Agree with the engine of ``manifest``.

        Raises:
            ValueError: a rule is violated; the message names it.
        """
        longest, block_size = manifest.limits.max_seq_len, manifest.cache.block_size
        schemes = list(dict.fromkeys(row.quantization.scheme for row in manifest.linears if ".layers." in row.name))
        if self.max_seq_len is not None and self.max_seq_len > longest:
            raise ValueError(f"max_seq_len is {self.max_seq_len}, expected {longest} or less as the engine was built")
        if self.kvcache_block_size not in (None, block_size):
            raise ValueError(
                f"kvcache_block_size is {self.kvcache_block_size}, expected {block_size} as the engine was built"
            )
        if self.quantization is not None and [self.quantization] != schemes:
            mixed = f"None as the engine mixes {' and '.join(schemes)}"
            expected = f"{schemes[0]!r} as the engine was built" if len(schemes) == 1 else mixed
            raise ValueError(f"quantization is {self.quantization!r}, expected {expected}")
        if self.kvcache_num_blocks is None:
            return
        row = math.ceil((self.max_seq_len or longest) / block_size)
        least = self.batch_size * row
        if self.kvcache_num_blocks < least:
            raise ValueError(
                f"kvcache_num_blocks is {self.kvcache_num_blocks}, expected {least} or more: batch_size "
                f"{self.batch_size} times the {row} blocks of a row; or set a smaller max_seq_len"
            )

    def warn_above(self, estimated_blocks: int) -> None:
        """Warn of more blocks than memory is estimated to have room for."""
        if self.kvcache_num_blocks is not None and self.kvcache_num_blocks > estimated_blocks:
            warnings.warn(
                f"kvcache_num_blocks is {self.kvcache_num_blocks}, more than the {estimated_blocks} that the free "
                "memory is estimated to hold",
                stacklevel=3,
            )


def _check(name: str, value: Any, expected: str, allowed: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not allowed(value):
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def _is_chunk(tokens: int) -> bool:
    return tokens > 0 and tokens % CHUNK_MULTIPLE == 0


def _is_block(tokens: int) -> bool:
    return tokens >= KEY_TILE and tokens & (tokens - 1) == 0
