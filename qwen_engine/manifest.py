"""``engine.json``: what builder and runtime agree on, one dataclass for writer and reader.

Reading is strict both ways: a field that is missing, unknown or of another type is an
:class:`EngineError` that names it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qwen_engine import strict_json
from qwen_engine.errors import EngineError
from qwen_engine.graph_io import TensorSpec

FORMAT_VERSION = 1

MANIFEST_FILE = "engine.json"
GRAPH_FILE = "model.onnx"
LAYERS_GRAPH_FILE = "layers.onnx"
WEIGHTS_FILE = "weights.bin"

# bytes of one element of each dtype a manifest may name
ITEM_BYTES = {"int64": 8, "int32": 4, "float32": 4, "float16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of the model, in Hugging Face's own field names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool


@dataclass(frozen=True)
class Quantization:
    """How the weight of one linear layer or embedding is stored and multiplied.

    ``scheme`` is the name on the command line; ``bits`` 32 means float32 without groups
    (``group_size`` 0). ``activations`` is the precision in which inputs enter the product.
    """

    scheme: str
    bits: int
    group_size: int
    symmetric: bool
    activations: str


@dataclass(frozen=True)
class LinearRecord:
    """One linear layer or embedding of the graph; ``stored_bytes`` counts everything it reads."""

    name: str
    in_features: int
    out_features: int
    quantization: Quantization
    stored_bytes: int


@dataclass(frozen=True)
class Operator:
    """A plugin operator the graph uses."""

    domain: str
    name: str
    version: int


@dataclass(frozen=True)
class Limits:
    """``max_seq_len``: most tokens of one sequence, prompt and answer together."""

    max_seq_len: int


@dataclass(frozen=True)
class CacheLayout:
    """The paged cache: tokens a block, element type, bytes one token takes over all layers."""

    block_size: int
    dtype: str
    bytes_per_token: int


@dataclass(frozen=True)
class Part:
    """A file of the engine, its size and what it must hash to."""

    size_bytes: int
    crc32: str
    sha256: str


@dataclass(frozen=True)
class Origin:
    """Where an engine comes from: the checkpoint, the digest of each of its files, who built it."""

    checkpoint: str
    revision: str | None
    dtype: str
    sha256: Mapping[str, str]
    builder_version: str
    command: str


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime has to know about an engine before it opens the graph."""

    format_version: int
    name: str
    model: ModelSizes
    limits: Limits
    cache: CacheLayout
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    linears: tuple[LinearRecord, ...]
    operators: tuple[Operator, ...]
    eos_token_ids: tuple[int, ...]
    parts: Mapping[str, Part]
    origin: Origin

    @cached_property
    def states(self) -> tuple[TensorSpec, ...]:
        """The inputs that hold state from one run to the next."""
        return tuple(spec for spec in self.inputs if spec.kind == "paged_state")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_FILE) -> Manifest:
        """Read what :meth:`to_json` wrote.

        Raises:
            EngineError: not JSON, of another format version, or a field is missing, unknown or mistyped.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise EngineError(f"{where} is not JSON: {error}; build the engine again") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise EngineError(
                f"{where} has format version {version}, this runtime reads {FORMAT_VERSION}; "
                "build the engine again with the qwen-build of this installation"
            )
        try:
            manifest = strict_json.parse(cls, data, where)
        except strict_json.MismatchError as error:
            raise EngineError(f"{error}; build the engine again") from error
        assert isinstance(manifest, cls)
        return manifest

    @classmethod
    def read(cls, engine: Path) -> Manifest:
        """Read ``engine.json`` of the directory ``engine``.

        Raises:
            EngineError: there is no such directory or manifest, or it does not parse.
        """
        path = engine / MANIFEST_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            found = "has no engine.json" if engine.is_dir() else "does not exist"
            raise EngineError(f"{engine} {found}; make an engine with qwen-build") from None
        except (OSError, UnicodeDecodeError) as error:
            raise EngineError(f"{path} cannot be read: {error}") from error
        return cls.from_json(text, str(path))
