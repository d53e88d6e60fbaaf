"""The settings of :class:`~qwen_run.api.causal_lm.QwenForCausalLM`, and every rule they have to keep."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qwen_engine.choices import ACTIVATIONS, CACHE_DTYPES, QUANTS
from qwen_engine.graph_io import KEY_TILE
from qwen_engine.manifest import MIN_SEQ_LEN, Manifest

CHUNK_MULTIPLE = 64  # tokens
ATTENTIONS = ("eager", "flash_attn")
# The lengths, in tokens, that RBLN's documentation gives for flash_attn.
LEAST_FLASH, LEAST_PARTITION, MOST_PARTITION = 8192, 4096, 32768

# A quantization given as a dictionary, as RBLN has it: its keys -> the options of a build
QUANTIZATION_KEYS = {"weights": "quant", "activations": "activations", "kv_caches": "kv_cache_dtype"}
_CHOICES = {"weights": QUANTS, "activations": ACTIVATIONS, "kv_caches": CACHE_DTYPES}
# RBLN's names of what is not quantised -> the builder's
_FLOATS = {"weights": {"fp16": "none"}, "activations": {"fp16": "float32"}, "kv_caches": {"fp16": "float16"}}


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
            builder's default, or what the engine has, if None. A mapping has RBLN's keys: ``weights``,
            ``activations`` (``int8``, ``int8x2``, ``float32``), ``kv_caches`` (``float32``, ``float16``, ``int8``);
            ``fp16`` is what is not quantised.
        use_inputs_embeds: whether the engine takes ``inputs_embeds`` as well as token ids; it is built so.
        attn_impl, kvcache_partition_len, use_attention_mask: RBLN's. They are checked by its rules and change nothing:
            attention is the same for every length, and ``attention_mask`` is always taken.

    Raises:
        ValueError: a rule is violated; the message names it.
    """

    batch_size: int = 1
    max_seq_len: int | None = None
    kvcache_block_size: int | None = None
    kvcache_num_blocks: int | None = None
    prefill_chunk_size: int = 128
    quantization: str | Mapping[str, str] | None = None
    use_inputs_embeds: bool = False
    attn_impl: str | None = None
    kvcache_partition_len: int | None = None
    use_attention_mask: bool = False

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
        _quantization_options(self.quantization)
        for name in ("use_inputs_embeds", "use_attention_mask"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} is {value!r}, expected True or False")
        self._check_partition()
        if self.max_seq_len is not None:
            self._check_flash(self.max_seq_len)

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
            **_quantization_options(self.quantization),
            "max_seq_len": self.max_seq_len,
            "block_size": self.kvcache_block_size,
            "inputs_embeds": self.use_inputs_embeds or None,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def check(self, manifest: Manifest) -> None:
        """Agree with the engine of ``manifest``.

        Raises:
            ValueError: a rule is violated; the message names it.
        """
        longest, block_size = manifest.limits.max_seq_len, manifest.cache.block_size
        if self.max_seq_len is not None and self.max_seq_len > longest:
            raise ValueError(f"max_seq_len is {self.max_seq_len}, expected {longest} or less as the engine was built")
        if self.kvcache_block_size not in (None, block_size):
            raise ValueError(
                f"kvcache_block_size is {self.kvcache_block_size}, expected {block_size} as the engine was built"
            )
        if self.use_inputs_embeds and not manifest.takes_embeds:
            raise ValueError(
                "use_inputs_embeds is True, expected False as the engine was built; build it with --inputs-embeds"
            )
        self._check_quantization(manifest)
        self._check_flash(self.max_seq_len or longest)
        if self.kvcache_num_blocks is None:
            return
        row = math.ceil((self.max_seq_len or longest) / block_size)
        least = self.batch_size * row
        if self.kvcache_num_blocks < least:
            raise ValueError(
                f"kvcache_num_blocks is {self.kvcache_num_blocks}, expected {least} or more: batch_size "
                f"{self.batch_size} times the {row} blocks of a row; or set a smaller max_seq_len"
            )

    def _check_quantization(self, manifest: Manifest) -> None:
        layers = [row.quantization for row in manifest.linears if ".layers." in row.name]
        built = {
            "quant": [stored.scheme for stored in layers],
            "activations": [stored.activations for stored in layers],
            "kv_cache_dtype": [manifest.cache.dtype],
        }
        keys = {option: key for key, option in QUANTIZATION_KEYS.items()}
        for option, asked in _quantization_options(self.quantization).items():
            found = list(dict.fromkeys(built[option]))
            if found != [asked]:
                named = isinstance(self.quantization, str)
                what = "quantization is" if named else f"quantization has {keys[option]}"
                mixed = f"None as the engine mixes {' and '.join(found)}"
                expected = f"{found[0]!r} as the engine was built" if len(found) == 1 else mixed
                raise ValueError(f"{what} {asked!r}, expected {expected}")

    def _check_partition(self) -> None:
        if self.attn_impl not in (None, *ATTENTIONS):
            raise ValueError(f"attn_impl is {self.attn_impl!r}, expected {' or '.join(ATTENTIONS)}")
        if (length := self.kvcache_partition_len) is None:
            return
        expected = f"{LEAST_PARTITION} to {MOST_PARTITION} tokens"
        _check("kvcache_partition_len", length, expected, lambda n: LEAST_PARTITION <= n <= MOST_PARTITION)
        if self.attn_impl == "eager":
            raise ValueError(
                f"kvcache_partition_len is {length} and attn_impl 'eager', expected 'flash_attn'; leave one of them out"
            )
        if self.kvcache_block_size not in (None, length):
            raise ValueError(
                f"kvcache_block_size is {self.kvcache_block_size}, expected the {length} of kvcache_partition_len; "
                "leave one of them out"
            )

    def _check_flash(self, max_seq_len: int) -> None:
        """The rules of lengths that go with ``flash_attn``."""
        length = self.kvcache_partition_len
        if self.attn_impl == "flash_attn" and max_seq_len < LEAST_FLASH:
            raise ValueError(
                f"attn_impl is 'flash_attn' and max_seq_len {max_seq_len}, expected {LEAST_FLASH} or more; "
                "leave attn_impl out, which changes no answer"
            )
        if length is not None and (max_seq_len % length or max_seq_len < 2 * length):
            raise ValueError(
                f"kvcache_partition_len is {length} and max_seq_len {max_seq_len}, expected a multiple of it, twice it "
                "or more; leave kvcache_partition_len out, which changes no answer"
            )

    def warn_without_effect(self) -> None:
        """Name the settings that change nothing."""
        names = ("attn_impl", "kvcache_partition_len", "use_attention_mask")
        if idle := [name for name in names if getattr(self, name)]:
            warnings.warn(
                f"{', '.join(idle)} of engine_config: no effect, an engine's attention is the same for every length "
                "and takes masks always",
                stacklevel=3,
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


def _quantization_options(quantization: Any) -> dict[str, str]:
    """The options of a build that ``quantization``, a name or a mapping, stands for."""
    if quantization is None:
        return {}
    if not isinstance(quantization, str | Mapping):
        raise ValueError(f"quantization is {quantization!r}, expected one of {', '.join(QUANTS)}, or a dictionary")
    if isinstance(quantization, str):
        if quantization not in QUANTS:
            raise ValueError(f"quantization is {quantization!r}, expected one of {', '.join(QUANTS)}")
        return {"quant": quantization}
    given = dict(quantization)
    if (layout := given.pop("format", None)) not in (None, "rbln"):
        raise ValueError(f"quantization has format {layout!r}, expected 'rbln'; leave it out")
    if unknown := sorted(map(str, given.keys() - QUANTIZATION_KEYS.keys())):
        raise ValueError(f"quantization has {unknown[0]!r}, expected {', '.join(QUANTIZATION_KEYS)}")
    asked = {name: value for name, value in given.items() if value is not None}
    for name, value in asked.items():
        asked[name] = _FLOATS[name].get(value, value) if isinstance(value, str) else value
        if asked[name] not in _CHOICES[name]:
            expected = ", ".join((*_CHOICES[name], *_FLOATS[name]))
            raise ValueError(f"quantization has {name} {value!r}, expected one of {expected}")
    if asked.get("weights") == "none" and asked.get("activations", "float32") != "float32":
        raise ValueError(
            f"quantization has activations {asked['activations']!r} and weights that are not quantised, expected "
            "weights of int8, int6, int5 or int4"
        )
    if asked.get("weights") == "none":
        asked.pop("activations", None)  # float weights are multiplied with floats anyway
    return {QUANTIZATION_KEYS[name]: value for name, value in asked.items()}


def _is_chunk(tokens: int) -> bool:
    return tokens > 0 and tokens % CHUNK_MULTIPLE == 0


def _is_block(tokens: int) -> bool:
    return tokens >= KEY_TILE and tokens & (tokens - 1) == 0
