"""From a checkpoint to an engine directory, in two steps: plan everything, then write it.

A plan costs no weight and no disk; it holds every decision, so ``--dry-run`` shows exactly what a build
writes. The engine is written beside its final place and renamed, so that an interrupted build leaves
nothing that looks like an engine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_build.calibrate import METHODS, Calibration, IntScheme, calibrate, output_errors
from qwen_build.calibrated_layers import CalibratedSource, calibrated_layout
from qwen_build.calibration_text import read_sequences
from qwen_build.checkpoint import Checkpoint, digest_files, read_json
from qwen_build.config import ModelConfig, token_ids
from qwen_build.export import ARRAYS_PER_SLICE, SLICE_ELEMENTS, Layout, plan_layout, write_graph, write_weights
from qwen_build.layers import Schemes
from qwen_build.locate import Located
from qwen_build.model import Graph, build_graph
from qwen_build.output import check_output, engine_directory, resolved, resumable_beside
from qwen_build.packed import PackedFormat, PackedSource
from qwen_build.per_linear import Rule, choose, excluding, packed_choices
from qwen_build.quantize import Scheme, make_scheme
from qwen_build.smoothquant import DEFAULT_ALPHA
from qwen_build.weight_map import EMBEDDING, HEAD, LAYER, AnySource, Source, check_layers, linear_names, map_weights
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

# choices of ``int4_method``, and those of ``quant`` that calibrate -> the scheme they round to: rows of METHODS
INT4_METHODS, CALIBRATED = ("rtn", "awq", "gptq"), {"smoothquant": "int8"}

# resident memory of the interpreter and its libraries, before any weight
BASE_MEMORY_BYTES = 200_000_000


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; None means the default that goes with ``quant``.

    ``quant`` None is int4, or what the checkpoint is stored in. ``exclude`` are patterns of linears to keep float,
    ``quant_config`` schemes of others, see :mod:`qwen_build.per_linear`.

    A float engine keeps embedding and cache in float32, so that it equals Hugging Face; a quantised one
    stores the embedding in int8 and the cache in float16, whose error is far below that of its linears.
    The default of ``activations`` goes with ``kernels``, see ``quantize.KERNELS``. ``weight_scales`` and
    ``activation_scales`` are those of the linears that ``quant`` speaks of: embedding, head and what ``quant_config``
    names have a scale for each group. ``alpha`` is that of "smoothquant", from 0 to 1, or "auto".
    ``block_size`` is tokens a cache block: attention over long contexts is a tenth slower with 32 and hardly faster
    with 128, see ``benchmarks/results/attention.md``.
    """

    quant: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    kernels: str = "native"
    activations: str | None = None
    weight_scales: str | None = None
    activation_scales: str | None = None
    embedding_quant: str | None = None
    kv_cache_dtype: str | None = None
    max_seq_len: int | None = None
    block_size: int = 64
    exclude: tuple[str, ...] = ()
    quant_config: tuple[Rule, ...] = ()
    alpha: float | Literal["auto"] | None = None
    int4_method: str | None = None
    calibration: Path | None = None
    calibration_tokens: int | None = None

    def resolved(self) -> BuildOptions:
        """The options with every default filled in but ``max_seq_len``, which the checkpoint decides."""
        exact = self.quant == "none"
        fields = vars(self) | {
            "quant": self.quant or "int4",
            "group_size": self.group_size or DEFAULT_GROUP_SIZE,
            "weight_scales": self.weight_scales or "group",
            "activation_scales": self.activation_scales or "group",
            "alpha": DEFAULT_ALPHA if self.alpha is None and self.quant == "smoothquant" else self.alpha,
            "int4_method": self.int4_method or "rtn",
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
    calibration: Calibration | None
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
                quantization=dataclasses.replace(module.scheme.record, method=self._method(name)),
                stored_bytes=sum(part.size_bytes for part in module.scheme.parts(module.shape).values()),
            )
            for name, module in self.graph.stored.items()
        )

    def _method(self, name: str) -> str:
        source, method = self.sources[name], self.graph.stored[name].scheme.record.method
        if isinstance(source, PackedSource):
            return "imported"
        linear = source.shapes[0][0].removesuffix(".weight")
        if self.calibration and linear in self.calibration.schemes:
            return self.calibration.names[self.calibration.schemes[linear].grid.bits]
        return method

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
    scales = [name for name in graph.plain if name.endswith(".input_scale")]  # no checkpoint has them
    shapes |= {name: tuple(value.shape) for name, value in graph.plain.items() if name not in scales}
    sources = map_weights(shapes, checkpoint, config)
    sources |= {name: Source(((name, (1,)),)) for name in scales}
    return Plan(
        located=located,
        options=options,
        config=config,
        schemes=schemes,
        graph=graph,
        sources=sources,
        layout=plan_layout(graph, sources),
        inputs=inputs,
        calibration=_calibration(options, config, schemes, located.path),
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
        write_graph(plan.graph, plan.layout, scratch / GRAPH_FILE)
        exposing = build_graph(plan.config, plan.schemes, plan.inputs, plan.max_seq_len, expose=True)
        write_graph(exposing, plan.layout, scratch / LAYERS_GRAPH_FILE)
        for name in TEXT_FILES:
            if (plan.located.path / name).is_file():
                shutil.copyfile(plan.located.path / name, scratch / name)
        manifest = _manifest(plan, _measured(plan, layout, errors), scratch, digests(), command)
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
    for name in ("quant", "group_size", "symmetric", "weight_scales"):
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
    _check_scales(options)
    scales = {"weight_scales": options.weight_scales, "activation_scales": options.activation_scales}
    packed = {}
    if config.packed:
        grid = config.packed.grid
        quantised = scheme(config.packed.quant, group_size=grid.group_size, symmetric=grid.symmetric, **scales)
        packed = packed_choices(config, checkpoint, quantised)
    rules = (*excluding(options.exclude), *options.quant_config)
    return Schemes(
        scheme("none" if config.packed else CALIBRATED.get(options.quant, options.quant), **scales),
        scheme(options.embedding_quant),
        choose(linear_names(config), packed, rules, scheme_of),
    )


def _check_scales(options: BuildOptions) -> None:
    """Refuse scales that the weights do not have, or that only calibration finds."""
    for name, calibrated in (("weight_scales", "tensor"), ("activation_scales", "static")):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if options.quant == "none" and value != "group":
            raise BuildError(f"{option} {value} says how integers are scaled, --quant none has none; leave one out")
        if value == calibrated and options.quant not in CALIBRATED:
            raise BuildError(f"{option} {value} needs calibration; add --quant {' or '.join(CALIBRATED)}")


def _check_smoothing(options: BuildOptions, schemes: Iterable[IntScheme]) -> None:
    """Refuse an ``alpha`` that nobody reads or that is no such number, and smoothing for which no input is rounded."""
    if options.quant != "smoothquant":
        if options.alpha is not None:
            raise BuildError(f"--alpha {options.alpha} is of no use, nothing is smoothed; add --quant smoothquant")
        return
    if options.alpha != "auto" and not (isinstance(options.alpha, int | float) and 0 <= options.alpha <= 1):
        raise BuildError(f"--alpha is {options.alpha!r}, expected a number from 0 to 1, or auto")
    if all(scheme.grid.bits != 8 or scheme.activations == "float32" for scheme in schemes):
        raise BuildError(
            "--quant smoothquant has nothing to smooth, no linear layer becomes int8 with rounded inputs here; "
            "leave --activations, --exclude and --quant-config out, or smoothquant"
        )


def _calibration(options: BuildOptions, config: ModelConfig, schemes: Schemes, directory: Path) -> Calibration | None:
    """What calibrates the linears of the decoder layers; None if all of them are rounded to the nearest."""
    assert options.quant is not None
    assert options.int4_method is not None
    if options.int4_method not in INT4_METHODS:
        raise BuildError(f"--int4-method {options.int4_method} is not one of {', '.join(INT4_METHODS)}")
    choices = {name: schemes.of(name) for name in linear_names(config) if LAYER.match(name)}
    own = {name: choice.scheme for name, choice in choices.items() if not choice.packed}
    rounded = {name: scheme for name, scheme in own.items() if isinstance(scheme, IntScheme)}
    names = {4: options.int4_method, 8: options.quant if options.quant in CALIBRATED else options.int4_method}
    found = {scheme.grid.bits for scheme in rounded.values()}
    _check_smoothing(options, rounded.values())
    if options.int4_method != "rtn" and 4 not in found:
        raise BuildError(
            f"--int4-method {options.int4_method} has nothing to round, no linear layer becomes int4 here; "
            "leave it out or choose --quant int4"
        )
    if all(names[bits] == "rtn" for bits in found):
        for option in ("calibration", "calibration_tokens"):
            if getattr(options, option) is not None:
                name = option.replace("_", "-")
                raise BuildError(f"--{name} is of no use, nothing calibrates; add --int4-method gptq or leave it out")
        return None
    methods = {bits: METHODS[name](options) for bits, name in names.items()}
    sequences = read_sequences(directory, config, options.calibration, options.calibration_tokens)
    return Calibration(names, methods, sequences, rounded)


@contextmanager
def _calibrated(
    plan: Plan, checkpoint: Checkpoint, target: Path, advance: Callable[[int], object]
) -> Iterator[tuple[Layout, dict[str, tuple[float, float]]]]:
    """The plan's layout with calibrated weights, and the errors of their outputs, see ``calibrate.output_errors``."""
    if plan.calibration is None:
        yield plan.layout, {}
        return
    decisive = [repr(plan.options), repr(plan.config), digest_files(checkpoint.files), __version__, FORMAT_VERSION]
    key = hashlib.sha256(json.dumps(decisive).encode() + plan.calibration.sequences.tobytes()).hexdigest()[:16]
    with resumable_beside(target, key) as directory:
        calibrate(plan.calibration, plan.config, checkpoint, directory, lambda steps: advance(steps * plan.step_work))
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
    plan: Plan, linears: Iterable[LinearRecord], scratch: Path, digests: dict[str, str], command: str
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
        outputs=(logits_output(plan.config.vocab_size),),
        linears=tuple(linears),
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
