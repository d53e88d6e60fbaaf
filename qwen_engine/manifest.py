"""``engine.json``: what builder and runtime agree on, one dataclass for writer and reader.

Reading is strict both ways: a field that is missing, unknown or of another type is an
:class:`EngineError` that names it.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qwen_engine import strict_json
from qwen_engine.errors import EngineError, shown
from qwen_engine.graph_io import (
    EMBEDS,
    KEY_TILE,
    KEY_VALUE_POOLS,
    STATE_KINDS,
    TensorSpec,
    cache_inputs,
    find_batch_fault,
)
from qwen_engine.regular_files import read_regular
from qwen_engine.sizes import ModelSizes
from qwen_engine.tasks import TASKS, output_fault

FORMAT_VERSION = 6

ENGINES = Path("engines")  # where commands put engines, and look for the newest
MANIFEST_FILE = "engine.json"
GRAPH_FILE = "model.onnx"
LAYERS_GRAPH_FILE = "layers.onnx"
WEIGHTS_FILE = "weights.bin"

# files of a checkpoint that text goes through, parts of an engine as they are
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)

MIN_SEQ_LEN = 2  # one token of a prompt and one of its answer

# No integer of a manifest is larger: sizes in bytes fit, and no product of a few overflows a float.
_MOST = 2**53
_MOST_STACKED = 2**16  # weights of a stack, whose names are listed

# bytes of one element of each dtype a manifest may name
ITEM_BYTES = {"int64": 8, "int32": 4, "float32": 4, "float16": 2, "int8": 1, "uint8": 1}


# what shares a scale of an input -> how it is said
_ACTIVATION_SCALES = {"group": "", "block": " per block", "token": " per token", "static": " static"}


@dataclass(frozen=True)
class Quantization:
    """How the weight of one linear layer or embedding is stored and multiplied.

    Attributes:
        scheme: the name on the command line.
        bits: of a weight; 32 means float32.
        group_size: columns of a group; 0 for float32.
        symmetric: whether groups have no zero point.
        activations: the precision in which inputs enter the product.
        kernels: whose operator multiplies.
        layout: how the bytes lie that it reads.
        weight_scales: what has a scale of its own: each "group", each output ("channel"), or the whole weight
            ("tensor").
        activation_scales: the same of an input that is rounded: each "group", each "block" of 128 columns, each row
            ("token"), or the linear, a constant ("static"). With "block", panels hold the weight's scales as multiples
            of a unit of the block.
        method: how the weight was rounded: "rtn" (to the nearest), a method that calibrates, or "imported" as it was;
            for float32 "none", or "folded" if factors of its inputs or outputs went into it.
    """

    scheme: str
    bits: int
    group_size: int
    symmetric: bool
    activations: str
    kernels: str
    layout: str
    weight_scales: str
    activation_scales: str
    method: str

    @property
    def activation_words(self) -> str:
        """How inputs are rounded, in a few words."""
        return f"{self.activations}{_ACTIVATION_SCALES[self.activation_scales]}"

    @property
    def words(self) -> str:
        """How a weight is stored and multiplied, in a few words."""
        if not self.group_size:
            return "float32"
        scales = f"g{self.group_size}" if self.weight_scales == "group" else f"per {self.weight_scales}"
        grid = "symmetric" if self.symmetric else "asymmetric"
        method = "" if self.method == "rtn" else f" {self.method}"
        return f"{self.scheme} {scales} {grid}{method} x {self.activation_words}, {self.kernels}"


@dataclass(frozen=True)
class LinearPart:
    """A module of Hugging Face whose ``rows`` a linear of the graph has."""

    name: str
    rows: int


def stacked_parts(parts: Sequence[LinearPart], stack: int) -> Iterator[LinearPart]:
    """``parts`` once for each weight of a stack, with its number in place of ``*`` in their names."""
    return (LinearPart(part.name.replace("*", str(number)), part.rows) for number in range(stack) for part in parts)


@dataclass(frozen=True)
class LinearRecord:
    """One linear layer or embedding of the graph.

    Attributes:
        parts: the modules whose rows follow each other in it; where there is one, that is itself.
        stack: weights that lie in it one after the other, each with ``parts`` and stored by itself: those of a layer's
            experts, whose number ``*`` in the parts' names stands for; else 1.
        stored_bytes: everything it reads.
        output_error: relative error (rms) of its output on the calibration text; None: not calibrated.
    """

    name: str
    in_features: int
    out_features: int
    parts: tuple[LinearPart, ...]
    stack: int
    quantization: Quantization
    stored_bytes: int
    output_error: float | None = None

    @property
    def all_parts(self) -> Iterator[LinearPart]:
        """Each module of Hugging Face whose rows it has, in their order."""
        return stacked_parts(self.parts, self.stack)


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
class FileRecord:
    """A file of the engine, its size and what it must hash to."""

    size_bytes: int
    crc32: str
    sha256: str


@dataclass(frozen=True)
class MergedAdapter:
    """A LoRA adapter in an engine's weights: its folder, the factor of what it added, the digests of its files."""

    directory: str
    weight: float
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class Origin:
    """Where an engine comes from: the checkpoint, the digest of each of its files, who built it.

    Attributes:
        rope_scaling: the JSON text of the rope object that was given in place of the checkpoint's; None: its own.
        adapters: what was merged into its weights, in this order.
    """

    checkpoint: str
    revision: str | None
    dtype: str
    sha256: Mapping[str, str]
    rope_scaling: str | None
    adapters: tuple[MergedAdapter, ...]
    builder_version: str
    command: str

    @property
    def digests(self) -> dict[str, str]:
        """The digest of every file that the weights come from; an adapter's by its folder and name."""
        own = {f"{a.directory}/{name}={a.weight:g}": digest for a in self.adapters for name, digest in a.sha256.items()}
        return {**self.sha256, **own}


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
    parts: Mapping[str, FileRecord]
    origin: Origin

    @cached_property
    def task(self) -> str:
        """What the engine is for, a key of ``TASKS``."""
        names = {spec.name for spec in self.outputs}
        return next(name for name, task in TASKS.items() if task.output in names)

    @cached_property
    def output(self) -> TensorSpec:
        """What the graph ends in."""
        return next(spec for spec in self.outputs if spec.name == TASKS[self.task].output)

    @cached_property
    def states(self) -> tuple[TensorSpec, ...]:
        """The inputs that hold state from one run to the next."""
        return tuple(spec for spec in self.inputs if spec.kind in STATE_KINDS)

    @cached_property
    def batch_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that a batch brings."""
        return tuple(spec for spec in self.inputs if spec.kind not in STATE_KINDS)

    @property
    def takes_embeds(self) -> bool:
        """Whether a batch may bring embeddings in place of token ids."""
        return any(spec.name == EMBEDS for spec in self.inputs)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_FILE) -> Manifest:
        """Read what :meth:`to_json` wrote.

        Raises:
            EngineError: not JSON, of another format version, a field is missing, unknown or mistyped, or
                :meth:`find_fault` finds one.
        """
        try:
            data = json.loads(text)
            version = data.get("format_version") if isinstance(data, dict) else None
            if version != FORMAT_VERSION or isinstance(version, bool):
                raise EngineError(
                    f"{where} has format version {version!r}, this runtime reads {FORMAT_VERSION}; "
                    "build the engine again with the qwen-build of this installation"
                )
            manifest = strict_json.parse(cls, data, where)
        except strict_json.MismatchError as error:
            raise EngineError(f"{error}; build the engine again") from error
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{where} is not JSON: {error}; build the engine again") from error
        assert isinstance(manifest, cls)
        if fault := manifest.find_fault():
            raise EngineError(f"{where}{fault}; build the engine again")
        return manifest

    def find_fault(self) -> str | None:
        """The first thing that no builder writes and no runtime could serve, to be read after a file's name."""
        if odd := next((name for name in self.parts if not _is_plain(name)), None):
            return f" has part {odd[:80]!r}, expected the plain name of a file"
        if missing := [name for name in (GRAPH_FILE, LAYERS_GRAPH_FILE, WEIGHTS_FILE) if name not in self.parts]:
            return f" has no part {', '.join(missing)}"
        if not MIN_SEQ_LEN <= self.limits.max_seq_len <= _MOST:
            return f": max_seq_len is {self.limits.max_seq_len}, expected {MIN_SEQ_LEN} or more"
        if fault := output_fault(self.outputs, vars(self.model)):
            return fault
        if odd_ids := [token_id for token_id in self.eos_token_ids if not -1 <= token_id <= _MOST]:
            return f": eos_token_ids holds {shown(odd_ids[0])}, expected ids of tokens"
        return self._find_linear_fault() or self._find_cache_fault() or self._find_input_fault()

    def _find_linear_fault(self) -> str | None:
        for linear in self.linears:
            scales = linear.quantization.activation_scales
            if scales not in _ACTIVATION_SCALES:
                return (
                    f": {linear.name} has activation_scales {scales[:80]!r}, expected {', '.join(_ACTIVATION_SCALES)}"
                )
            for field, least in (("in_features", 1), ("out_features", 1), ("stored_bytes", 0)):
                if not least <= (size := getattr(linear, field)) <= _MOST:
                    return f": {linear.name} has {field} {shown(size)}, expected {least} or more"
            rows = [part.rows for part in linear.parts]
            if not 1 <= linear.stack <= _MOST_STACKED:
                return f": {linear.name} has stack {shown(linear.stack)}, expected 1 to {_MOST_STACKED}"
            if not all(1 <= count <= _MOST for count in rows) or sum(rows) * linear.stack != linear.out_features:
                times = "" if linear.stack == 1 else f"{linear.stack} times "
                return f": {linear.name} has {linear.out_features} rows, its parts {times}{rows}"
        names = [part.name for linear in self.linears for part in linear.all_parts]
        if twice := next((name for name, count in Counter(names).items() if count > 1), None):
            return f": two linears have the rows of {twice}"
        return None

    def _find_cache_fault(self) -> str | None:
        block_size, dtype = self.cache.block_size, self.cache.dtype
        kv_heads, head_dim = self.model.num_key_value_heads, self.model.head_dim
        if not KEY_TILE <= block_size <= _MOST or block_size & (block_size - 1):
            return f": block_size is {block_size}, expected a power of two from {KEY_TILE}"
        if dtype not in ITEM_BYTES:
            return f": cache dtype is {dtype!r}, expected one of {', '.join(ITEM_BYTES)}"
        if not (1 <= kv_heads <= _MOST and 1 <= head_dim <= _MOST):
            return f": num_key_value_heads is {kv_heads} and head_dim {head_dim}, expected 1 or more"
        return None

    def _find_input_fault(self) -> str | None:
        """An input that no runtime feeds, or a state that is not of the sizes it says."""
        counted = Counter(spec.name for spec in self.inputs)
        twice = next((name for name, count in counted.items() if count > 1), None)
        if twice or (fault := find_batch_fault(self.batch_inputs, self.model.hidden_size)):
            return f" has input {twice} twice" if twice else fault
        block_size, dtype = self.cache.block_size, self.cache.dtype
        kv_heads, head_dim = self.model.num_key_value_heads, self.model.head_dim
        layers = sorted({spec.layer for spec in self.states if spec.layer is not None})
        pools = {spec.name: spec for spec in cache_inputs(layers, kv_heads, head_dim, block_size, dtype)}
        for spec in self.states:
            if spec.name.startswith(KEY_VALUE_POOLS) and spec != pools.get(spec.name):
                sizes = f"block_size {block_size}, {kv_heads} heads of {head_dim}, {dtype}"
                return f": input {spec.name} is not as expected with {sizes}"
            first, *inner = spec.shape or (None,)
            sized = all(isinstance(size, int) and 1 <= size <= _MOST for size in inner)
            if not inner or not sized or first != STATE_KINDS[spec.kind] or spec.dtype not in ITEM_BYTES:
                found = f"{spec.dtype} {spec.shape}"
                return f": state {spec.name} is {found}, expected ({STATE_KINDS[spec.kind]}, sizes) of a known type"
        return None

    @classmethod
    def read(cls, engine: Path) -> Manifest:
        """Read ``engine.json`` of the directory ``engine``.

        Raises:
            EngineError: there is no such directory or manifest, or it does not parse.
        """
        path = engine / MANIFEST_FILE
        try:
            text = read_regular(path).decode()
        except FileNotFoundError:
            if (engine / "config.json").is_file():
                command = f"qwen-build {shlex.quote(str(engine))}"
                raise EngineError(f"{engine} is a checkpoint; make an engine of it with `{command}`") from None
            found = "has no engine.json" if engine.is_dir() else "does not exist"
            raise EngineError(f"{engine} {found}; make an engine with qwen-build") from None
        except OSError as error:
            raise EngineError(f"{path} cannot be read: {error.strerror}; copy the engine again") from error
        except UnicodeDecodeError as error:
            raise EngineError(f"{path} is not UTF-8: {error}; build the engine again") from error
        return cls.from_json(text, str(path))


def _is_plain(name: str) -> bool:
    """Whether ``name`` can only be a file right in the engine's directory."""
    return name.isprintable() and 0 < len(name.encode()) <= 255 and "/" not in name and name not in (".", "..")
