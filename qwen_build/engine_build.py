"""From a checkpoint to an engine directory, in two steps: plan everything, then write it.

A plan costs no weight and no disk; it holds every decision, so ``--dry-run`` shows exactly what a build
writes. The engine is written beside its final place and renamed, so that an interrupted build leaves
nothing that looks like an engine.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen_build.calibration.calibrate import Calibration, calibrated, output_errors
from qwen_build.calibration.plan import plan_calibration
from qwen_build.calibration.results import CalibratedSource, calibrated_layout
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.endings import SOURCES as ENDING_SOURCES
from qwen_build.checkpoint.endings import read_ending
from qwen_build.checkpoint.files import digest_files
from qwen_build.checkpoint.locate import Located
from qwen_build.checkpoint.text_files import SOURCES, TextFiles, read_text_files
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.graph.architecture import layer_kind, module_parts
from qwen_build.graph.layers import Schemes, StoredModule
from qwen_build.graph.model import Graph, build_graph
from qwen_build.graph.weight_map import AnySource, Source, check_layers, map_weights
from qwen_build.plan.options import BuildOptions, ResolvedOptions
from qwen_build.plan.rope_options import rope_given, rope_override
from qwen_build.plan.scheme_plan import as_stored, padding_notes, plan_schemes
from qwen_build.writing.output import check_output, engine_directory, resolved
from qwen_build.writing.weights_file import (
    ARRAYS_PER_SLICE,
    SLICE_ELEMENTS,
    Layout,
    plan_layout,
    write_graph,
    write_weights,
)
from qwen_engine import __version__
from qwen_engine.errors import BuildError
from qwen_engine.extents import EXTENTS_FILE
from qwen_engine.graph_io import BATCH_INPUTS, EMBEDDING, HEAD, PLUGIN_DOMAIN, TensorSpec, embeds_inputs
from qwen_engine.manifest import (
    FORMAT_VERSION,
    GRAPH_FILE,
    ITEM_BYTES,
    LAYERS_GRAPH_FILE,
    MANIFEST_FILE,
    MIN_SEQ_LEN,
    WEIGHTS_FILE,
    CacheLayout,
    Limits,
    LinearPart,
    LinearRecord,
    Manifest,
    MergedAdapter,
    Operator,
    Origin,
)
from qwen_engine.tasks import GENERATE, POOLING_FILE, output_of
from qwen_plugin import OPERATORS
from qwen_run.engine_files.checksums import measure_extents, measure_part
from qwen_run.runtime.machine import physical_cores

# resident memory of the interpreter and its libraries, before any weight
BASE_MEMORY_BYTES = 200_000_000


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first weight is read."""

    located: Located
    options: ResolvedOptions
    config: ModelConfig
    schemes: Schemes
    graph: Graph
    sources: dict[str, AnySource]
    layout: Layout
    inputs: tuple[TensorSpec, ...]
    calibration: Calibration | None
    text: TextFiles
    dtype: str
    max_seq_len: int
    rope_scaling: str | None  # JSON of the rope object that was asked for in place of the checkpoint's
    notes: tuple[str, ...]  # what of the checkpoint is left unread or read in another way, a sentence each
    stored_as: str | None = None  # what became of the linears of a checkpoint that is quantised already

    @property
    def linears(self) -> tuple[LinearRecord, ...]:
        """Every linear and embedding; a tied head is listed with the bytes it shares."""
        return tuple(self._linear(name.removesuffix(".weight"), module) for name, module in self.graph.stored.items())

    def _linear(self, name: str, module: StoredModule) -> LinearRecord:
        rows, columns = module.shape
        return LinearRecord(
            name,
            in_features=columns,
            out_features=rows,
            parts=tuple(LinearPart(*part) for part in module_parts(name, rows, self.config)),
            quantization=dataclasses.replace(module.record, method=self._method(f"{name}.weight")),
            stored_bytes=sum(part.size_bytes for part in module.scheme.parts(module.shape).values()),
        )

    def _method(self, name: str) -> str:
        source, method = self.sources[name], self.graph.stored[name].scheme.record.method
        if source.packed:
            return "imported"
        linear = source.shapes[0][0].removesuffix(".weight")
        if self.calibration and linear in self.calibration.schemes:
            return self.calibration.names[self.calibration.schemes[linear].grid.bits]
        return method

    @property
    def head_is_shared(self) -> bool:
        """Whether the head reads the bytes of the embedding."""
        head, embedding = (self.graph.stored.get(f"{name}.weight") for name in (HEAD, EMBEDDING))
        return bool(self.config.tie_word_embeddings and head and embedding and head.scheme == embedding.scheme)

    @property
    def cache_bytes_per_token(self) -> int:
        states = [spec for spec in self.inputs if spec.kind == "paged_state"]
        block_bytes = sum(ITEM_BYTES[spec.dtype] * math.prod(map(int, spec.shape[1:])) for spec in states)
        return block_bytes // self.options.block_size

    @property
    def work(self) -> int:
        """What :func:`write_engine` has to do: the bytes it writes, and ``step_work`` for each step of calibration."""
        steps = self.calibration.steps(self.config) if self.calibration else 0
        return self.layout.size_bytes + steps * self.step_work

    @property
    def step_work(self) -> int:
        """A step of calibration takes about as long as writing so many bytes."""
        return 20 * self.layout.size_bytes // self.calibration.steps(self.config) if self.calibration else 0

    @property
    def build_memory_bytes(self) -> int:
        """Estimate of the build's peak resident memory."""
        slices = [max(SLICE_ELEMENTS, weight.scheme.block_rows * weight.shape[-1]) for weight in self.layout.weights]
        constants = sum(array.nbytes for array, _ in self.layout.constants)
        writing = 2 * constants + physical_cores() * ARRAYS_PER_SLICE * 4 * max(slices)
        calibrating = self.calibration.memory_bytes(self.config) if self.calibration else 0
        return BASE_MEMORY_BYTES + max(writing, calibrating)


def plan_build(checkpoint: Checkpoint, located: Located, options: BuildOptions) -> Plan:
    """Decide everything about the engine of ``checkpoint``, the weights of the ``located`` directory.

    Raises:
        CheckpointError, UnsupportedModel, WeightMismatch: the checkpoint is not one that can be built.
        BuildError: an option does not fit it.
    """
    config = checkpoint.adapted(ModelConfig.from_hf(located.path, rope_override(options)))
    ending = read_ending(located.path, config.hidden_size, options.task)
    config = dataclasses.replace(config, ending=ending)
    check_layers(config, checkpoint)
    filled = as_stored(options, config, checkpoint).resolved()
    text = read_text_files(located.path, config)
    max_seq_len = _max_seq_len(filled, config)
    schemes = plan_schemes(filled, config, checkpoint)
    embeds = embeds_inputs(config.hidden_size) if filled.inputs_embeds else ()
    inputs = (*BATCH_INPUTS, *embeds, *_states(filled, config))
    graph = build_graph(config, schemes, inputs, max_seq_len)
    shapes: dict[str, tuple[int, ...]] = {name: module.shape for name, module in graph.stored.items()}
    scales = [name for name in graph.plain if name.endswith(".input_scale")]  # no checkpoint has them
    shapes |= {name: tuple(value.shape) for name, value in graph.plain.items() if name not in scales}
    mapped = map_weights(shapes, checkpoint, config, options.ignore_tensors)
    sources = mapped.sources | {name: Source(((name, (1,)),)) for name in scales}
    plan = Plan(
        located=located,
        options=filled,
        config=config,
        schemes=schemes,
        graph=graph,
        sources=sources,
        layout=plan_layout(graph, sources),
        inputs=inputs,
        calibration=plan_calibration(filled, config, schemes, located.path),
        text=text,
        dtype=checkpoint.dtype,
        max_seq_len=max_seq_len,
        rope_scaling=rope_given(options, located.path),
        notes=(*config.notes, *text.notes, *checkpoint.notes, *mapped.notes),
    )
    notes = (*plan.notes, *padding_notes(plan.linears))
    return dataclasses.replace(plan, notes=notes, stored_as=_stored_as(checkpoint, plan.linears))


def _stored_as(checkpoint: Checkpoint, linears: Sequence[LinearRecord]) -> str | None:
    """How many linears of a quantised checkpoint the engine has bit for bit, and how many otherwise."""
    if checkpoint.format is None:
        return None
    counts: Counter[str] = Counter()
    for linear in linears:
        for part in linear.parts:
            packed = checkpoint.packed.get(f"{part.name}.weight", checkpoint.packed.get(f"{EMBEDDING}.weight"))
            if linear.quantization.method == "imported":
                exact = packed is None or packed.exact
                counts["stored bit for bit" if exact else "with the same integers, scales rounded to float16"] += 1
            else:
                counts["rounded as --quant says" if linear.quantization.group_size else "float32"] += 1
    return f"linears of the {checkpoint.format.name} checkpoint: {', '.join(f'{n} {how}' for how, n in counts.items())}"


def write_engine(
    plan: Plan,
    checkpoint: Checkpoint,
    output: Path,
    replace: bool = False,
    command: str = "",
    advance: Callable[[int], object] = lambda _: None,
) -> Manifest:
    """Write the engine to the directory ``output``.

    Where it calibrates and is interrupted, the layers that are finished are kept beside ``output`` for the next time.

    Args:
        replace: if ``output`` is an engine, put the new one in its place; else it must not exist.
        command: what the user typed, kept in the manifest.
        advance: called with what was newly done of ``plan.work``.

    Raises:
        BuildError: ``output`` exists, the disk is full, or it cannot be written.
        CheckpointError: a weight cannot be read or is not finite.
    """
    check_output(output, replace)
    with (
        _calibrated(plan, checkpoint, resolved(output), advance) as (layout, errors),
        engine_directory(output, replace) as scratch,
        _digests(plan, checkpoint) as digests,
    ):
        write_weights(layout, checkpoint, scratch / WEIGHTS_FILE, advance)
        extents = measure_extents(scratch / WEIGHTS_FILE, layout.groups)
        (scratch / EXTENTS_FILE).write_text(extents.to_json(), encoding="utf-8")
        write_graph(plan.graph, plan.layout, scratch / GRAPH_FILE)
        exposing = build_graph(plan.config, plan.schemes, plan.inputs, plan.max_seq_len, expose=True)
        write_graph(exposing, plan.layout, scratch / LAYERS_GRAPH_FILE)
        for name, content in plan.text.contents.items():
            (scratch / name).write_bytes(content)
        if plan.config.task != GENERATE:
            (scratch / POOLING_FILE).write_text(plan.config.ending.pooling.to_json(), encoding="utf-8")
        linears = _measured(plan, layout, errors)
        manifest = _manifest(plan, linears, scratch, digests(), _adapters(checkpoint), command)
        (scratch / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _states(options: ResolvedOptions, config: ModelConfig) -> Iterator[TensorSpec]:
    """What the layers keep between runs, layer after layer."""
    for layer in range(config.num_hidden_layers):
        yield from layer_kind(config, layer).states(config, layer, options.block_size, options.kv_cache_dtype)


def _max_seq_len(options: ResolvedOptions, config: ModelConfig) -> int:
    most, why, trained = config.longest
    chosen = most if options.max_seq_len is None else options.max_seq_len
    if chosen > most:
        advice = f"; --yarn {max(2, math.ceil(chosen / trained))} stretches them" if trained else ""
        raise BuildError(f"--max-seq-len {chosen} is more than the {most} tokens {why}{advice}")
    if chosen < MIN_SEQ_LEN:
        raise BuildError(f"{chosen} is too short a sequence for a prompt and an answer, expected {MIN_SEQ_LEN} or more")
    return chosen


@contextmanager
def _calibrated(
    plan: Plan, checkpoint: Checkpoint, target: Path, advance: Callable[[int], object]
) -> Iterator[tuple[Layout, dict[str, tuple[float, float]]]]:
    """The plan's layout with calibrated weights, and the errors of their outputs, see ``calibrate.output_errors``."""
    if plan.calibration is None:
        yield plan.layout, {}
        return

    def advance_steps(steps: int) -> None:
        advance(steps * plan.step_work)

    with calibrated(plan.calibration, plan.config, checkpoint, target, advance_steps) as directory:
        yield calibrated_layout(plan.layout, directory), output_errors(directory, plan.config)


def _measured(plan: Plan, layout: Layout, errors: Mapping[str, tuple[float, float]]) -> Iterator[LinearRecord]:
    """The linears of ``plan``, with what calibration made of them."""
    folded = {weight.source.shapes for weight in layout.weights if isinstance(weight.source, CalibratedSource)}
    for linear in plan.linears:
        shapes = plan.sources[f"{linear.name}.weight"].shapes
        pairs = [errors[name] for name in (weight.removesuffix(".weight") for weight, _ in shapes) if name in errors]
        if pairs:
            error, whole = map(sum, zip(*pairs, strict=True))
            linear = dataclasses.replace(linear, output_error=math.sqrt(error / whole) if whole else 0.0)
        elif shapes in folded:
            linear = dataclasses.replace(linear, quantization=dataclasses.replace(linear.quantization, method="folded"))
        yield linear


def _manifest(
    plan: Plan,
    linears: Iterable[LinearRecord],
    scratch: Path,
    digests: dict[str, str],
    adapters: tuple[MergedAdapter, ...],
    command: str,
) -> Manifest:
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
        outputs=(output_of(plan.config.task, plan.config.width),),
        linears=tuple(linears),
        operators=tuple(Operator(domain, name, OPERATORS[domain, name]) for domain, name in sorted(used)),
        eos_token_ids=plan.text.eos_token_ids,
        parts={path.name: measure_part(path) for path in parts},
        origin=Origin(
            checkpoint=_utf8(plan.located.source),
            revision=plan.located.revision,
            dtype=plan.dtype,
            sha256=digests,
            rope_scaling=plan.rope_scaling,
            adapters=adapters,
            builder_version=__version__,
            command=_utf8(command),
        ),
    )


def _adapters(checkpoint: Checkpoint) -> tuple[MergedAdapter, ...]:
    """The adapters in the weights, as the manifest records them."""
    return tuple(
        MergedAdapter(_utf8(str(adapter.directory)), adapter.weight, digest_files(adapter.paths))
        for adapter in checkpoint.adapters
    )


def _utf8(text: str) -> str:
    """``text`` of the command line or a path, where bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(text).decode("utf-8", "replace")


@contextmanager
def _digests(plan: Plan, checkpoint: Checkpoint) -> Iterator[Callable[[], dict[str, str]]]:
    """sha256 of the checkpoint's files, computed while the weights are written; call what it yields for the result."""
    paths = [
        *checkpoint.files,
        *(p for n in ("config.json", *SOURCES, *ENDING_SOURCES) if (p := plan.located.path / n).is_file()),
    ]
    stopped = threading.Event()

    def stop_when_told(_: int) -> None:
        if stopped.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1, "digests") as pool:
        future = pool.submit(digest_files, paths, stop_when_told, plan.located.path)
        try:
            yield future.result
        finally:
            stopped.set()
