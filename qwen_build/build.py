"""From a checkpoint to an engine directory, in two steps: plan everything, then write it.

A plan costs no weight and no disk; it holds every decision, so ``--dry-run`` shows exactly what a build
writes. The engine is written beside its final place and renamed, so that an interrupted build leaves
nothing that looks like an engine.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_build.checkpoint import Checkpoint, digest_files, read_json
from qwen_build.config import ModelConfig, token_ids
from qwen_build.export import ARRAYS_PER_SLICE, SLICE_ELEMENTS, Layout, plan_layout, write_graph, write_weights
from qwen_build.layers import Schemes
from qwen_build.locate import Located
from qwen_build.model import Graph, build_graph
from qwen_build.output import engine_directory
from qwen_build.packed import PackedFormat
from qwen_build.per_linear import Rule, choose, excluding, packed_choices
from qwen_build.quantize import Scheme, make_scheme
from qwen_build.weight_map import EMBEDDING, HEAD, AnySource, check_layers, linear_names, map_weights
from qwen_engine import __version__
from qwen_engine.errors import BuildError, CheckpointError, EngineError
from qwen_engine.graph_io import BATCH_INPUTS, KEY_TILE, PLUGIN_DOMAIN, TensorSpec, cache_inputs, logits_output
from qwen_engine.manifest import (
    FORMAT_VERSION,
    GRAPH_FILE,
    ITEM_BYTES,
    LAYERS_GRAPH_FILE,
    MANIFEST_FILE,
    MIN_SEQ_LEN,
    TEXT_FILES,
    WEIGHTS_FILE,
    CacheLayout,
    Limits,
    LinearRecord,
    Manifest,
    Operator,
    Origin,
)
from qwen_plugin import OPERATORS
from qwen_run.machine import physical_cores
from qwen_run.parts import measure_part
from qwen_run.tokenizer import TOKENIZER_FILE, Tokenizer

# ends an answer in the chat templates of all families, whatever generation_config.json says
END_OF_TURN = "<|im_end|>"

DEFAULT_GROUP_SIZE = 32

# resident memory of the interpreter and its libraries, before any weight
BASE_MEMORY_BYTES = 200_000_000


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; None means the default that goes with ``quant``.

    ``quant`` None is int4, or what the checkpoint is stored in. ``exclude`` are patterns of linears to keep float,
    ``quant_config`` schemes of others, see :mod:`qwen_build.per_linear`.

    A float engine keeps embedding and cache in float32, so that it equals Hugging Face; a quantised one
    stores the embedding in int8 and the cache in float16, whose error is far below that of its linears.
    The default of ``activations`` goes with ``kernels``, see ``quantize.KERNELS``. ``block_size`` is tokens a cache
    block.
    """

    quant: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    kernels: str = "native"
    activations: str | None = None
    embedding_quant: str | None = None
    kv_cache_dtype: str | None = None
    max_seq_len: int | None = None
    block_size: int = 32
    exclude: tuple[str, ...] = ()
    quant_config: tuple[Rule, ...] = ()

    def resolved(self) -> BuildOptions:
        """The options with every default filled in but ``max_seq_len``, which the checkpoint decides."""
        exact = self.quant == "none"
        fields = vars(self) | {
            "quant": self.quant or "int4",
            "group_size": self.group_size or DEFAULT_GROUP_SIZE,
            "embedding_quant": self.embedding_quant or ("none" if exact else "int8"),
            "kv_cache_dtype": self.kv_cache_dtype or ("float32" if exact else "float16"),
        }
        return BuildOptions(**fields)


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first weight is read."""

    located: Located
    options: BuildOptions
    config: ModelConfig
    schemes: Schemes
    graph: Graph
    sources: dict[str, AnySource]
    layout: Layout
    inputs: tuple[TensorSpec, ...]
    eos_token_ids: tuple[int, ...]
    dtype: str
    max_seq_len: int

    @property
    def linears(self) -> tuple[LinearRecord, ...]:
        """Every linear and embedding; a tied head is listed with the bytes it shares."""
        return tuple(
            LinearRecord(
                name.removesuffix(".weight"),
                in_features=module.shape[1],
                out_features=module.shape[0],
                quantization=module.scheme.record,
                stored_bytes=sum(part.size_bytes for part in module.scheme.parts(module.shape).values()),
            )
            for name, module in self.graph.stored.items()
        )

    @property
    def head_is_shared(self) -> bool:
        """Whether the head reads the bytes of the embedding."""
        head, embedding = self.graph.stored[HEAD], self.graph.stored[EMBEDDING]
        return self.config.tie_word_embeddings and head.scheme == embedding.scheme

    @property
    def cache_bytes_per_token(self) -> int:
        states = [spec for spec in self.inputs if spec.kind == "paged_state"]
        block_bytes = sum(ITEM_BYTES[spec.dtype] * math.prod(map(int, spec.shape[1:])) for spec in states)
        return block_bytes // self.options.block_size

    @property
    def build_memory_bytes(self) -> int:
        """Estimate of the build's peak resident memory."""
        slices = [max(SLICE_ELEMENTS, weight.scheme.block_rows * weight.shape[-1]) for weight in self.layout.weights]
        constants = sum(array.nbytes for array, _ in self.layout.constants)
        return BASE_MEMORY_BYTES + 2 * constants + physical_cores() * ARRAYS_PER_SLICE * 4 * max(slices)


def plan_build(checkpoint: Checkpoint, located: Located, options: BuildOptions) -> Plan:
    """Decide everything about the engine of ``checkpoint``, the weights of the ``located`` directory.

    Raises:
        CheckpointError, UnsupportedModel, WeightMismatch: the checkpoint is not one that can be built.
        BuildError: an option does not fit it.
    """
    config = ModelConfig.from_hf(located.path)
    options = (options if config.packed is None else _as_packed(options, config.packed)).resolved()
    if options.block_size < KEY_TILE or options.block_size & (options.block_size - 1):
        raise BuildError(f"block_size is {options.block_size}, expected a power of two from {KEY_TILE}")
    check_layers(config, checkpoint)
    check_text_files(located.path)
    max_seq_len = _max_seq_len(options, config)
    assert options.kv_cache_dtype is not None
    schemes = _schemes(options, config, checkpoint)
    inputs = (
        *BATCH_INPUTS,
        *cache_inputs(
            range(config.num_hidden_layers),
            config.num_key_value_heads,
            config.head_dim,
            options.block_size,
            options.kv_cache_dtype,
        ),
    )
    graph = build_graph(config, schemes, inputs, max_seq_len)
    shapes: dict[str, tuple[int, ...]] = {name: module.shape for name, module in graph.stored.items()}
    shapes |= {name: tuple(value.shape) for name, value in graph.plain.items()}
    sources = map_weights(shapes, checkpoint, config)
    return Plan(
        located=located,
        options=options,
        config=config,
        schemes=schemes,
        graph=graph,
        sources=sources,
        layout=plan_layout(graph, sources),
        inputs=inputs,
        eos_token_ids=end_of_sequence_ids(located.path, config),
        dtype=checkpoint.dtype,
        max_seq_len=max_seq_len,
    )


def write_engine(
    plan: Plan,
    checkpoint: Checkpoint,
    output: Path,
    replace: bool = False,
    command: str = "",
    advance: Callable[[int], object] = lambda _: None,
) -> Manifest:
    """Write the engine to the directory ``output``.

    Args:
        replace: if ``output`` is an engine, put the new one in its place; else it must not exist.
        command: what the user typed, kept in the manifest.
        advance: called with the bytes newly written of ``plan.layout.size_bytes``.

    Raises:
        BuildError: ``output`` exists, the disk is full, or it cannot be written.
        CheckpointError: a weight cannot be read or is not finite.
    """
    with engine_directory(output, replace) as scratch, _digests(plan, checkpoint) as digests:
        write_weights(plan.layout, checkpoint, scratch / WEIGHTS_FILE, advance)
        write_graph(plan.graph, plan.layout, scratch / GRAPH_FILE)
        exposing = build_graph(plan.config, plan.schemes, plan.inputs, plan.max_seq_len, expose=True)
        write_graph(exposing, plan.layout, scratch / LAYERS_GRAPH_FILE)
        for name in TEXT_FILES:
            if (plan.located.path / name).is_file():
                shutil.copyfile(plan.located.path / name, scratch / name)
        manifest = _manifest(plan, scratch, digests(), command)
        (scratch / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def end_of_sequence_ids(directory: Path, config: ModelConfig) -> tuple[int, ...]:
    """Every token id that ends an answer: what generation_config.json, config.json and the tokenizer name."""
    ids = [*token_ids(_optional_json(directory, "generation_config.json").get("eos_token_id")), *config.eos_token_ids]
    try:
        added = {t["content"]: t["id"] for t in _optional_json(directory, TOKENIZER_FILE).get("added_tokens", [])}
        eos_token = _optional_json(directory, "tokenizer_config.json").get("eos_token")
        if isinstance(eos_token, dict):  # an AddedToken written out
            eos_token = eos_token.get("content")
        ids += token_ids([added[token] for token in (eos_token, END_OF_TURN) if token in added])
    except (TypeError, KeyError) as error:
        where = f"added_tokens of {TOKENIZER_FILE} or eos_token of tokenizer_config.json"
        raise CheckpointError(f"{directory}: {where} is damaged; download them again") from error
    if beyond := [i for i in ids if not 0 <= i < config.vocab_size]:
        raise BuildError(f"end-of-sequence ids {beyond} are outside the vocabulary of {config.vocab_size}")
    return tuple(dict.fromkeys(ids))


def check_text_files(checkpoint: Path) -> None:
    """Refuse a directory whose tokenizer the runtime cannot read, or whose files for text are not files.

    Raises:
        CheckpointError: names the file.
    """
    for path in (checkpoint / name for name in TEXT_FILES):
        if not path.is_file() and (path.exists() or path.is_symlink()):
            found = "is not a file" if path.exists() else "is a link to nothing"
            raise CheckpointError(f"{path} {found}; download it again or remove it")
    if (checkpoint / TOKENIZER_FILE).is_file():
        try:
            Tokenizer.load(checkpoint)
        except EngineError as error:
            raise CheckpointError(str(error)) from error


def _max_seq_len(options: BuildOptions, config: ModelConfig) -> int:
    trained = config.max_position_embeddings
    chosen = trained if options.max_seq_len is None else options.max_seq_len
    if chosen > trained:
        raise BuildError(f"--max-seq-len {chosen} is more than the {trained} tokens the checkpoint was trained for")
    if chosen < MIN_SEQ_LEN:
        raise BuildError(f"{chosen} is too short a sequence for a prompt and an answer, expected {MIN_SEQ_LEN} or more")
    return chosen


def _as_packed(options: BuildOptions, packed: PackedFormat) -> BuildOptions:
    """``options`` for a checkpoint that decided how its linears are stored."""
    for name in ("quant", "group_size", "symmetric"):
        if (value := getattr(options, name)) is not None:
            raise BuildError(
                f"{name} {value} cannot be chosen, the checkpoint is stored as {packed.method} {packed.quant} already; "
                "leave it out or build from the float checkpoint"
            )
    return dataclasses.replace(options, quant=packed.quant)


def _schemes(options: BuildOptions, config: ModelConfig, checkpoint: Checkpoint) -> Schemes:
    """The scheme of every linear. What a packed checkpoint left float stays so."""

    def scheme(quant: str, **chosen: Any) -> Scheme:
        fields = {name: getattr(options, name) for name in ("group_size", "symmetric", "activations")}
        fields |= {name: value for name, value in chosen.items() if value is not None}
        return make_scheme(quant, kernels=options.kernels, **fields)

    def scheme_of(rule: Rule) -> Scheme:
        try:
            return scheme(
                rule.quant, group_size=rule.group_size, symmetric=rule.symmetric, activations=rule.activations
            )
        except BuildError as error:
            raise BuildError(f"{rule.origin}: {rule.pattern!r}: {error}") from error

    if options.exclude and options.quant == "none":
        raise BuildError("--exclude keeps linears float, as --quant none keeps all of them; leave one out")
    assert options.quant is not None
    assert options.embedding_quant is not None
    packed = {}
    if config.packed:
        grid = config.packed.grid
        quantised = scheme(config.packed.quant, group_size=grid.group_size, symmetric=grid.symmetric)
        packed = packed_choices(config, checkpoint, quantised)
    rules = (*excluding(options.exclude), *options.quant_config)
    return Schemes(
        scheme("none" if config.packed else options.quant),
        scheme(options.embedding_quant),
        choose(linear_names(config), packed, rules, scheme_of),
    )


def _manifest(plan: Plan, scratch: Path, digests: dict[str, str], command: str) -> Manifest:
    assert plan.options.kv_cache_dtype is not None
    used = {(node.domain, node.op_type) for node in plan.graph.model.graph if node.domain == PLUGIN_DOMAIN}
    parts = sorted(path for path in scratch.iterdir() if path.name != MANIFEST_FILE)
    return Manifest(
        format_version=FORMAT_VERSION,
        name=_utf8(plan.located.name),
        model=plan.config.sizes,
        limits=Limits(plan.max_seq_len),
        cache=CacheLayout(plan.options.block_size, plan.options.kv_cache_dtype, plan.cache_bytes_per_token),
        inputs=plan.inputs,
        outputs=(logits_output(plan.config.vocab_size),),
        linears=plan.linears,
        operators=tuple(Operator(domain, name, OPERATORS[domain, name]) for domain, name in sorted(used)),
        eos_token_ids=plan.eos_token_ids,
        parts={path.name: measure_part(path) for path in parts},
        origin=Origin(
            checkpoint=_utf8(plan.located.source),
            revision=plan.located.revision,
            dtype=plan.dtype,
            sha256=digests,
            builder_version=__version__,
            command=_utf8(command),
        ),
    )


def _utf8(text: str) -> str:
    """``text`` of the command line or a path, where bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(text).decode("utf-8", "replace")


@contextmanager
def _digests(plan: Plan, checkpoint: Checkpoint) -> Iterator[Callable[[], dict[str, str]]]:
    """sha256 of the checkpoint's files, computed while the weights are written; call what it yields for the result."""
    paths = [*checkpoint.files, *(p for n in ("config.json", *TEXT_FILES) if (p := plan.located.path / n).is_file())]
    stopped = threading.Event()

    def stop_when_told(_: int) -> None:
        if stopped.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1, "digests") as pool:
        future = pool.submit(digest_files, paths, stop_when_told)
        try:
            yield future.result
        finally:
            stopped.set()


def _optional_json(directory: Path, name: str) -> dict[str, Any]:
    return read_json(directory / name) if (directory / name).is_file() else {}
