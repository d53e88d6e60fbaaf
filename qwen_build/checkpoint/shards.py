"""From a directory to its tensors: which files hold them, and the names they have in the graph.

As transformers does, the files are all that the index names, and what counts is what they hold.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from qwen_build.checkpoint import qwen1
from qwen_build.checkpoint.experts import split_experts
from qwen_build.checkpoint.files import check_inside, read_json
from qwen_build.checkpoint.safetensors_file import CHUNK_BYTES, TensorInfo, read_exactly, read_header
from qwen_engine.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"

EMBEDDING = "embed_tokens.weight"
# what programs put before the decoder's names in place of "model." -> and before the head's
PREFIXES = {
    "": "",
    "model.language_model.": "",
    "language_model.model.": "language_model.",
    "base_model.model.model.": "base_model.model.",
    "model.model.": "model.",
    "module.model.": "module.",
    "_orig_mod.model.": "_orig_mod.",
}
DECODER = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")


class Shards(NamedTuple):
    """``tensors`` by the names of the graph, open ``descriptors``, and ``notes`` on what was read in another way."""

    tensors: dict[str, TensorInfo]
    descriptors: dict[Path, int]
    notes: tuple[str, ...]


def has_config_alone(directory: Path) -> bool:
    """Whether ``directory`` has a config.json and nothing that could be weights."""
    kinds = ("*.safetensors", "*.bin", "*.gguf", INDEX_FILE, ADAPTER_FILE)
    return (directory / "config.json").is_file() and not any(any(directory.glob(kind)) for kind in kinds)


def open_file(path: Path) -> Shards:
    """Open one safetensors file by itself, whose names stay as they are.

    Raises:
        CheckpointError: it is not there, truncated or damaged.
    """
    descriptor = _open_file(path, path.parent)
    try:
        tensors = {info.name: info for info in read_header(path, descriptor)}
    except BaseException:
        os.close(descriptor)
        raise
    return Shards(tensors, {path: descriptor}, ())


def open_shards(directory: Path) -> Shards:
    """Open ``model.safetensors``, or all files that ``model.safetensors.index.json`` names; read their headers.

    Raises:
        CheckpointError: there are no such weights, a file is truncated or damaged, two files hold different tensors
            of one name, or the names are none of a known kind.
    """
    try:
        whole = (directory / WEIGHTS_FILE).is_file()
        names = [WEIGHTS_FILE] if whole else _read_index(directory)
        both = whole and (directory / INDEX_FILE).is_file()
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from error
    descriptors: dict[Path, int] = {}
    try:
        shards = []
        for path in (directory / name for name in names):
            descriptors[path] = _open_file(path, directory)
            shards.append(read_header(path, descriptors[path]))
        merged = _merge(shards, descriptors)
        if not merged:
            raise CheckpointError(f"{directory} has weight files without a tensor; download or save it again")
        tensors, notes = _renamed(directory, merged)
        tensors = split_experts(tensors)
    except BaseException:
        close(descriptors)
        raise
    if both:
        notes += (f"{directory} has both {WEIGHTS_FILE} and {INDEX_FILE}: the former is read, as by transformers.",)
    return Shards(tensors, descriptors, notes)


def close(descriptors: Mapping[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def _open_file(path: Path, directory: Path) -> int:
    check_inside(path, directory)
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error


def _read_index(directory: Path) -> list[str]:
    """The files that the index names, every one there."""
    path = directory / INDEX_FILE
    if not path.is_file():
        raise CheckpointError(_no_weights(directory))
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(map(_is_inside, index.values())):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names; download it again")
    names = sorted(set(index.values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise CheckpointError(f"{directory} lacks {some(missing)}, named in {INDEX_FILE}; download what is missing")
    return names


def _is_inside(shard: object) -> bool:
    """Whether an index may name ``shard``: a file of its own directory or of one in it."""
    if not isinstance(shard, str) or not shard:
        return False
    path = PurePosixPath(shard)
    return not path.is_absolute() and ".." not in path.parts


def _no_weights(directory: Path) -> str:
    """What to say of a directory that has neither weights nor an index."""
    if directory.suffix == ".gguf":
        return f"{directory} is a GGUF file; give its name to qwen-build or resolve_checkpoint, which read its metadata"
    if not directory.is_dir():
        return f"{directory} is not a directory; give the Hugging Face directory of the model"
    if (directory / ADAPTER_FILE).is_file():
        base = read_json(directory / ADAPTER_FILE).get("base_model_name_or_path") or "its base model"
        return (
            f"{directory} is a LoRA adapter of {base}, no model; give that one as the checkpoint, and "
            f"--lora {shlex.quote(str(directory))}"
        )
    for pattern, advice in (
        (
            "gptq_model*.safetensors",
            f"it was saved by an old AutoGPTQ; rename it to {WEIGHTS_FILE}, and add what quantize_config.json says, "
            'with "quant_method": "gptq", to config.json as quantization_config',
        ),
        ("*.safetensors", f"there is neither {WEIGHTS_FILE} nor {INDEX_FILE}; download the index, or rename the file"),
        ("*.bin", "only safetensors is read; convert it with save_pretrained of a recent transformers"),
        ("*.gguf", "give one of these files itself as the checkpoint"),
    ):
        found = sorted(path.name for path in directory.glob(pattern))
        if found:
            return f"{directory} has {some(found)}: {advice}"
    return f"{directory} has no weights: expected {WEIGHTS_FILE} or {INDEX_FILE}"


def _merge(shards: Iterable[Iterable[TensorInfo]], descriptors: Mapping[Path, int]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for info in (info for shard in shards for info in shard):
        first = tensors.setdefault(info.name, info)
        if first is not info and not _equal(first, info, descriptors):
            both = f"{first.path.name} and {info.path}"
            raise CheckpointError(f"{info.name} is in both {both}, and differs; remove the file that is left over")
    return tensors


def _equal(first: TensorInfo, second: TensorInfo, descriptors: Mapping[Path, int]) -> bool:
    """Whether two tensors are the same to the last byte."""
    if (first.dtype, first.shape, first.size_bytes) != (second.dtype, second.shape, second.size_bytes):
        return False
    for begin in range(0, first.size_bytes, CHUNK_BYTES):
        pieces = [bytearray(min(CHUNK_BYTES, first.size_bytes - begin)) for _ in range(2)]
        for info, piece in zip((first, second), pieces, strict=True):
            read_exactly(info.path, descriptors[info.path], memoryview(piece), info.offset + begin)
        if pieces[0] != pieces[1]:
            return False
    return True


def _renamed(directory: Path, tensors: dict[str, TensorInfo]) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """``tensors`` by the names that transformers saves a language model with."""
    if qwen1.is_qwen1(tensors):
        return qwen1.renamed(tensors), ()
    found = sorted(name.removesuffix(EMBEDDING) for name in tensors if name.endswith(EMBEDDING))
    if not found or "model." in found:
        return tensors, ()
    if len(found) > 1 or found[0] not in PREFIXES:
        known = ", ".join(repr(prefix) for prefix in PREFIXES if prefix)
        raise CheckpointError(
            f"{directory}: the weights' names begin with {' and '.join(map(repr, found))}, expected 'model.', nothing, "
            f"{known}; load the model with transformers and save it with save_pretrained"
        )
    decoder, head = found[0], PREFIXES[found[0]]
    renamed = {_graph_name(name, decoder, head): info for name, info in tensors.items()}
    if len(renamed) < len(tensors):
        raise CheckpointError(f"{directory}: some weights have names with and without {decoder!r}; remove the copies")
    return renamed, (f"the weights' names begin with {decoder!r} in place of 'model.', and are read as if with that.",)


def graph_name(name: str) -> str:
    """The name in the graph of what a program calls ``name``, whichever of ``PREFIXES`` it puts before.

    >>> graph_name("model.language_model.layers.0.mlp.up_proj"), graph_name("layers.1.mlp.up_proj")
    ('model.layers.0.mlp.up_proj', 'model.layers.1.mlp.up_proj')
    """
    for decoder, head in PREFIXES.items():
        if (renamed := _graph_name(f"{name}.", decoder, head)) != f"{name}.":
            return renamed.removesuffix(".")
    return name


def _graph_name(name: str, decoder: str, head: str) -> str:
    if name.startswith(decoder) and name.removeprefix(decoder).startswith(DECODER):
        return "model." + name.removeprefix(decoder)
    return name.removeprefix(head) if name.startswith(f"{head}lm_head.") else name


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first ``limit`` names, and how many more there are."""
    listed = ", ".join(names[:limit]) or "none"
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"
