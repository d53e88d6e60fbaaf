"""From a checkpoint to an engine directory, in two steps: plan everything, then write it.

A plan costs no weight and no disk; it holds every decision, so ``--dry-run`` shows exactly what a build
writes. The engine is written beside its final place and renamed, so that an interrupted build leaves
nothing that looks like an engine.
"""

from __future__ import annotations

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
from qwen_build.locate import Located
from qwen_build.model import Graph, Schemes, build_graph
from qwen_build.output import engine_directory
from qwen_build.quantize import Scheme, make_scheme
from qwen_build.weight_map import Source, check_layers, map_weights
from qwen_engine import __version__
from qwen_engine.errors import BuildError, CheckpointError, EngineError
from qwen_engine.graph_io import BATCH_INPUTS, PLUGIN_DOMAIN, TensorSpec, cache_inputs, logits_output
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

BLOCK_SIZE = 32  # tokens a cache block

# ends an answer in the chat templates of all families, whatever generation_config.json says
END_OF_TURN = "<|im_end|>"

# resident memory of the interpreter and its libraries, before any weight
BASE_MEMORY_BYTES = 200_000_000


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; None means the default that goes with ``quant``.

    A float engine keeps embedding and cache in float32, so that it equals Hugging Face; a quantised one
    stores the embedding in int8 and the cache in float16, whose error is far below that of its linears.
    """

    quant: str = "int4"
    group_size: int = 32
    symmetric: bool | None = None
    activations: str = "int8"
    embedding_quant: str | None = None
    kv_cache_dtype: str | None = None
    max_seq_len: int | None = None

    def resolved(self) -> BuildOptions:
        """The options with every default filled in but ``max_seq_len``, which the checkpoint decides."""
        exact = self.quant == "none"
        fields = vars(self) | {
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
    sources: dict[str, Source]
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
                module.in_features,
                module.out_features,
                module.scheme.record,
                sum(part.size_bytes for part in module.scheme.parts(module.out_features, module.in_features).values()),
            )
            for name, module in self.graph.stored.items()
        )

    @property
    def cache_bytes_per_token(self) -> int:
        states = [spec for spec in self.inputs if spec.kind == "paged_state"]
        block_bytes = sum(ITEM_BYTES[spec.dtype] * math.prod(map(int, spec.shape[1:])) for spec in states)
        return block_bytes // BLOCK_SIZE

    @property
    def build_memory_bytes(self) -> int:
        """Estimate of the build's peak resident memory."""
        slices = [max(SLICE_ELEMENTS, weight.shape[-1]) for weight in self.layout.weights]
        constants = sum(array.nbytes for array, _ in self.layout.constants)
        return BASE_MEMORY_BYTES + 2 * constants + physical_cores() * ARRAYS_PER_SLICE * 4 * max(slices)


def plan_build(checkpoint: Checkpoint, located: Located, options: BuildOptions) -> Plan:
    """Decide everything about the engine of ``checkpoint``, the weights of the ``located`` directory.

    Raises:
        CheckpointError, UnsupportedModel, WeightMismatch: the checkpoint is not one that can be built.
        BuildError: an option does not fit it.
    """
    options = options.resolved()
    config = ModelConfig.from_hf(located.path)
    check_layers(config, checkpoint)
    check_text_files(located.path)
    max_seq_len = _max_seq_len(options, config)
    assert options.embedding_quant is not None
    assert options.kv_cache_dtype is not None
    schemes = Schemes(_scheme(options, options.quant), _scheme(options, options.embedding_quant))
    inputs = (
        *BATCH_INPUTS,
        *cache_inputs(
            range(config.num_hidden_layers),
            config.num_key_value_heads,
            config.head_dim,
            BLOCK_SIZE,
            options.kv_cache_dtype,
        ),
    )
    graph = build_graph(config, schemes, inputs, max_seq_len)
    shapes = {name: (module.out_features, module.in_features) for name, module in graph.stored.items()}
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


def _scheme(options: BuildOptions, quant: str) -> Scheme:
    return make_scheme(quant, options.group_size, options.symmetric, options.activations)


def _manifest(plan: Plan, scratch: Path, digests: dict[str, str], command: str) -> Manifest:
    assert plan.options.kv_cache_dtype is not None
    used = {(node.domain, node.op_type) for node in plan.graph.model.graph if node.domain == PLUGIN_DOMAIN}
    parts = sorted(path for path in scratch.iterdir() if path.name != MANIFEST_FILE)
    return Manifest(
        format_version=FORMAT_VERSION,
        name=_utf8(plan.located.name),
        model=plan.config.sizes,
        limits=Limits(plan.max_seq_len),
        cache=CacheLayout(BLOCK_SIZE, plan.options.kv_cache_dtype, plan.cache_bytes_per_token),
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
