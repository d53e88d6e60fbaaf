"""A GGUF file as a Hugging Face directory: config, tokenizer and template of its metadata, links to the weights.

The directory lies in the user's cache. Everything that reads a checkpoint reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from qwen_build.checkpoint.gguf_file import GgufFile, model_name, part_files
from qwen_engine.errors import BuildError, CheckpointError, UnsupportedModel
from qwen_engine.user_cache import FOLDER, user_cache
from qwen_engine.whole_files import whole_directory

LINK, PART_LINK = "model.gguf", "model-{number:05}-of-{count}.gguf"
CONVERSION = 1  # raised when what is written changes, so that older copies in caches are replaced
RECORD_FILE = "gguf.json"

# general.architecture -> model_type
MODEL_TYPES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama"}
CONTROL, USER_DEFINED = 3, 4  # types of tokens

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def _split(digits: str) -> list[Any]:
    pattern = Regex(_WORDS.replace("DIGITS", digits))
    return [
        pre_tokenizers.Split(pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# tokenizer.ggml.pre -> whether texts are normalised, and how they are split
SPLITS: dict[str, tuple[bool, Any]] = {
    "qwen2": (True, lambda: _split("")),
    "deepseek-r1-qwen": (True, lambda: _split("")),
    "llama-bpe": (False, lambda: _split("{1,3}")),
    "smollm": (
        False,
        lambda: [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
    ),
}


def as_directory(path: Path) -> Path:
    """The Hugging Face directory of the GGUF file ``path``, made on the first call and found on later ones.

    Raises:
        CheckpointError, UnsupportedModel: the file is damaged, or of a kind that is not read.
        BuildError: the cache cannot be written.
    """
    path = path.absolute()  # not resolved: the Hub's cache has links, whose names say which part a file is
    try:
        state = [CONVERSION, *(_state(part) for part in part_files(path) if part.is_file())]
        key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
        target = cache_folder() / f"{model_name(path)[:80]}-{key}"
        if _is_complete(target):
            return target
        with whole_directory(target, lambda: not _is_complete(target)) as directory:
            _write(path, directory)
    except OSError as error:
        reason = error.strerror or error
        raise BuildError(f"{cache_folder()} cannot be written: {reason}; set XDG_CACHE_HOME") from error
    return target


def cache_folder() -> Path:
    """Where the directories are."""
    return user_cache() / FOLDER / "gguf"


def weights_file(directory: Path) -> Path:
    """The file in ``directory`` that leads to the weights; of several the first."""
    return next(iter(directory.glob(PART_LINK.format(number=1, count="?????"))), directory / LINK)


def _state(path: Path) -> list[str | int]:
    stat = path.stat()
    return [str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]


def _is_complete(directory: Path) -> bool:
    links = part_files(weights_file(directory))
    return (directory / RECORD_FILE).is_file() and all(link.is_file() for link in links)


def _write(path: Path, directory: Path) -> None:
    file = GgufFile.open(path)
    try:
        fields = GgufFields(path, file.metadata)
        config = _config(fields, file)
        tokenizer, tokenizer_config = _tokenizer(fields)
    finally:
        file.close()
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    for number, part in enumerate(file.files, 1):
        alone, count = len(file.files) == 1, f"{len(file.files):05}"
        (directory / (LINK if alone else PART_LINK.format(number=number, count=count))).symlink_to(part)
    for name, value in (
        ("config.json", config),
        ("generation_config.json", ids),
        ("tokenizer_config.json", tokenizer_config),
        (RECORD_FILE, {"conversion": CONVERSION}),
    ):
        (directory / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


class GgufFields:
    """Metadata by key, of the type that is asked for."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path, self._metadata = path, metadata

    def get(self, key: str, default: Any = None, kind: type | tuple[type, ...] = (int, float, str)) -> Any:
        """The value at ``key``; ``default`` where there is none.

        Raises:
            CheckpointError: it is of another type.
        """
        value = self._metadata.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{self.path}: {key} is {str(value)[:80]!r}, expected another type; download it again"
            )
        return value

    def need(self, key: str, kind: type | tuple[type, ...]) -> Any:
        if (value := self.get(key, None, kind)) is None:
            raise CheckpointError(f"{self.path} has no {key}; give a complete GGUF of the model")
        return value


def _config(fields: GgufFields, file: GgufFile) -> dict[str, Any]:
    """What config.json would say."""
    name = fields.need("general.architecture", str)
    if name not in MODEL_TYPES:
        raise UnsupportedModel(
            f"{fields.path}: architecture {name!r} is not one of {', '.join(MODEL_TYPES)}; give another model"
        )
    if "rope_freqs.weight" in file.tensors:
        raise UnsupportedModel(
            f"{fields.path} has rope_freqs.weight, frequencies of a rotation that its metadata does not name; give the "
            "Hugging Face directory of the model"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{fields.path} has no matrix token_embd.weight; give a complete GGUF of the model")
    heads = fields.need(f"{name}.attention.head_count", int)
    hidden = fields.need(f"{name}.embedding_length", int)
    config = {
        "model_type": MODEL_TYPES[name],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.need(f"{name}.feed_forward_length", int),
        "num_hidden_layers": fields.need(f"{name}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{name}.attention.head_count_kv", heads, int),
        "head_dim": fields.get(f"{name}.attention.key_length", hidden // max(heads, 1), int),
        "hidden_act": "silu",
        "max_position_embeddings": fields.need(f"{name}.context_length", int),
        # GGUF stores float32: 9.99999974e-06 was written as 1e-05
        "rms_norm_eps": float(f"{fields.need(f'{name}.attention.layer_norm_rms_epsilon', float):.6g}"),
        "rope_theta": float(fields.get(f"{name}.rope.freq_base", 10000.0, (int, float))),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "quantization_config": {"quant_method": "gguf"},
        **_rope(fields, name),
    }
    for key, known in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := fields.get(f"tokenizer.ggml.{known}_token_id", None, int)) is not None:
            config[f"{key}_token_id"] = token
    return config


def _rope(fields: GgufFields, name: str) -> dict[str, Any]:
    """The rope object of config.json, where the rotation is scaled."""
    kind = fields.get(f"{name}.rope.scaling.type", "none", str)
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": float(fields.get(f"{name}.rope.scaling.factor", 1.0, (int, float)))}
    if original := fields.get(f"{name}.rope.scaling.original_context_length", None, int):
        scaling["original_max_position_embeddings"] = original
    return {"rope_scaling": scaling}


def _tokenizer(fields: GgufFields) -> tuple[Tokenizer, dict[str, Any]]:
    """tokenizer.json, and what tokenizer_config.json would say."""
    kind, pre = fields.need("tokenizer.ggml.model", str), fields.get("tokenizer.ggml.pre", "default", str)
    if kind != "gpt2" or pre not in SPLITS:
        raise UnsupportedModel(
            f"{fields.path}: the tokenizer is {kind!r} with the splitting {pre!r}, expected 'gpt2' with one of "
            f"{', '.join(SPLITS)}; give the Hugging Face directory of the model"
        )
    tokens, merges = _texts(fields, "tokenizer.ggml.tokens"), _texts(fields, "tokenizer.ggml.merges")
    kinds = fields.get("tokenizer.ggml.token_type", np.ones(len(tokens), np.int32), np.ndarray)
    if len(kinds) != len(tokens):
        raise CheckpointError(f"{fields.path}: {len(tokens)} tokens have {len(kinds)} types; download it again")
    normalised, pieces = SPLITS[pre]
    try:
        vocabulary = {token: index for index, token in enumerate(tokens)}
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    except Exception as error:  # the library raises what it likes
        raise CheckpointError(f"{fields.path}: its merges do not fit its tokens: {error}; download it again") from error
    if normalised:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces())
    tokenizer.decoder = decoders.ByteLevel()
    for number, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [token for token, own in zip(tokens, kinds, strict=True) if own == number]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for role, name in roles.items():
        index = fields.get(f"tokenizer.ggml.{name}_token_id", None, int)
        if index is not None and not 0 <= index < len(tokens):
            raise CheckpointError(f"{fields.path}: {name}_token_id is {index}, it has {len(tokens)} tokens")
        if index is not None:
            config[role] = tokens[index]
    if fields.get("tokenizer.ggml.add_bos_token", False, int) and "bos_token" in config:
        bos = config["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    if (template := fields.get("tokenizer.chat_template", None, str)) is not None:
        config["chat_template"] = template
    return tokenizer, config


def _texts(fields: GgufFields, key: str) -> list[str]:
    value = fields.need(key, list)
    if not all(isinstance(text, str) for text in value):
        raise CheckpointError(f"{fields.path}: {key} holds something else than texts; download it again")
    return list(value)
