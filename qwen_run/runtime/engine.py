"""An engine directory opened: the checked parts, the ONNX Runtime session, the cache, one run of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

import qwen_plugin
from qwen_engine.errors import EngineError, shown
from qwen_engine.graph_io import TensorSpec
from qwen_engine.json_output import is_utf8
from qwen_engine.manifest import ENGINES, GRAPH_FILE, MANIFEST_FILE, Manifest
from qwen_engine.refused_memory import is_refused_memory, memory_advice
from qwen_run.engine_files.checksums import check_operators, check_parts
from qwen_run.engine_files.float_activations import with_float_activations
from qwen_run.runtime.capacity import choose_capacity, warn_of_shorter, with_limit
from qwen_run.runtime.kv_cache import KVCache
from qwen_run.runtime.machine import available_bytes, physical_cores
from qwen_run.runtime.native_calls import NATIVE_CALLS

# ONNX Runtime's exceptions have no common base of their own; a bound run raises RuntimeError.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    MemoryError,
    UnicodeDecodeError,  # of a message that quotes what a broken file holds
    *(error for error in vars(ort_errors).values() if isinstance(error, type) and issubclass(error, Exception)),
)


@dataclass(frozen=True, eq=False)
class Batch:
    """The new tokens of S sequences, one after the other: ``BATCH_INPUTS`` of ``qwen_engine.graph_io``, by name.

    The last two are for engines that take embeddings; None is no embedding.
    """

    input_ids: np.ndarray  # int64 (T,)
    cumulative_lengths: np.ndarray  # int32 (S+1,): sequence s owns tokens [c[s], c[s+1])
    past_lengths: np.ndarray  # int32 (S,): tokens of s already in the cache
    block_table: np.ndarray  # int32 (S, max_blocks): cache blocks of s, in order
    logits_indices: np.ndarray  # int64 (L,): which of the T tokens get logits
    inputs_embeds: np.ndarray | None = None  # float32 (E, hidden_size), in place of what is looked up
    embeds_indices: np.ndarray | None = None  # int64 (E,): which of the T tokens these are


class Engine:
    """One graph, its weights and its cache, ready to run. Make one with :meth:`load`.

    Attributes:
        directory: where the engine lies.
        manifest: what ``engine.json`` says.
        cache: the pools the graph updates in place.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, session: onnxruntime.InferenceSession, cache: KVCache
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.cache = cache
        self._session = session
        self._input_names = [spec.name for spec in manifest.batch_inputs]
        # What a batch that has none of them brings.
        self._absent = {
            spec.name: np.zeros((0, *map(int, spec.shape[1:])), spec.dtype)
            for spec in manifest.batch_inputs
            if spec.kind == "embedding"
        }
        self._output_names = [output.name for output in session.get_outputs()]
        # The pools are bound once; binding them again for every run would cost more than the run's overhead.
        self._binding = onnxruntime.IOBinding(session)
        for name, pool in cache.pools.items():
            self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(pool))

    @classmethod
    def load(
        cls,
        directory: Path,
        threads: int | None = None,
        num_blocks: int | None = None,
        graph: str = GRAPH_FILE,
        float_activations: bool = False,
        cache_bytes: int | None = None,
        max_seq_len: int | None = None,
    ) -> Engine:
        """Open the engine in ``directory``; everything is checked before memory is taken.

        Args:
            threads: threads of one run, and of the check of the files; the physical cores this process may use if None.
            num_blocks: blocks of the cache pool; chosen from the free memory if None.
            graph: ``layers.onnx`` to see the output of every sub-block with :meth:`run_layers`.
            float_activations: compute in float32 what the engine rounds to int8 on its way into a product: far
                slower, for measuring everything else.
            cache_bytes: memory of the cache pool, where ``num_blocks`` is not given.
            max_seq_len: most tokens of a sequence; what the engine was built for if None, or what the pool holds
                where that is less, which a warning tells. ``manifest.limits`` then says it.

        Raises:
            EngineError: a part is missing or changed, the plugin lacks an operator, the graph is not what the
                manifest says, or the pool does not hold ``max_seq_len`` tokens.
        """
        _check_counts(threads=threads, num_blocks=num_blocks, cache_bytes=cache_bytes, max_seq_len=max_seq_len)
        if not is_utf8(str(directory)):  # ONNX Runtime takes no other path
            raise EngineError(f"{str(directory)!r} is not a UTF-8 path; rename it")
        manifest = Manifest.read(directory)
        if graph not in manifest.parts:
            raise EngineError(f"{directory} has no part {graph}; build the engine again")
        threads = threads or physical_cores()
        check_parts(directory, manifest, threads)
        check_operators(directory, manifest)
        _check_states(directory, manifest)
        capacity = choose_capacity(
            manifest, available_bytes(), num_blocks=num_blocks, cache_bytes=cache_bytes, max_seq_len=max_seq_len
        )
        try:
            options = _session_options(manifest, threads)
            source: Path | bytes = directory / graph
            if float_activations:
                source = with_float_activations((directory / graph).read_bytes())
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(directory.resolve())
                )
            with NATIVE_CALLS.call():
                session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except _ORT_ERRORS as error:
            raise _engine_error(f"{directory / graph} cannot be loaded", error) from error
        _check_graph(directory / graph, session, manifest)
        cache = KVCache(manifest.states, manifest.cache.block_size, capacity.num_blocks)
        if max_seq_len is None and capacity.max_seq_len < manifest.limits.max_seq_len:
            warn_of_shorter(manifest, capacity)
        return cls(directory, with_limit(manifest, capacity.max_seq_len), session, cache)

    def run(self, batch: Batch) -> np.ndarray:
        """Feed ``batch``, writing its keys and values to the cache.

        Returns:
            what the graph ends in, float32 (L, width), the caller's own: logits (L, vocab_size) where it writes text.

        Raises:
            EngineError: ONNX Runtime or an operator refuses the batch.
        """
        name = self.manifest.output.name
        return self._run(batch, [name])[name]

    def run_layers(self, batch: Batch) -> dict[str, np.ndarray]:
        """As :meth:`run`, and return every output of the graph by name: all sub-blocks of ``layers.onnx``."""
        return self._run(batch, self._output_names)

    def _run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        binding = self._binding
        try:
            for name in self._input_names:
                value = getattr(batch, name)
                binding.bind_cpu_input(name, self._absent[name] if value is None else value)
            # Bound anew each time: a bound output keeps the shape of the run before.
            binding.clear_binding_outputs()
            for name in outputs:
                binding.bind_output(name)
            with NATIVE_CALLS.call():
                self._session.run_with_iobinding(binding)
        except _ORT_ERRORS as error:
            raise _engine_error(f"{self.directory} cannot run", error) from error
        values = binding.get_outputs()
        return {name: value.numpy() for name, value in zip(outputs, values, strict=True)}


def newest_engine(root: Path = ENGINES) -> Path:
    """The directory in ``root`` whose ``engine.json`` was written last.

    Raises:
        EngineError: there is none.
    """
    written = {}
    for path in root.glob(f"[!.]*/{MANIFEST_FILE}"):  # a hidden one is still being built
        with suppress(FileNotFoundError):
            written[path.parent] = path.stat().st_mtime_ns
    if not written:
        raise EngineError(f"no engine in {root}; make one with qwen-build, or name one with --engine")
    return max(written, key=written.__getitem__)


def _session_options(manifest: Manifest, threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    # The plugin's operators have threads of their own; beside them there is a Gather.
    is_stock = any(linear.quantization.kernels == "stock" for linear in manifest.linears)
    options.intra_op_num_threads = threads if is_stock else 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal: an error is raised with the same text
    options.enable_mem_pattern = False  # it keeps a plan for every combination of shapes ever seen
    # The arena keeps 27 MB more of a prompt of 512 tokens (0.5B) than malloc, and makes nothing faster.
    options.enable_cpu_mem_arena = False
    # Threads of stock operators that wait for the next node spin, but briefly. A token of the demo engine (int4,
    # --kernels stock, 2 threads) takes 12.3 ms with the default of about 1 ms, 12.1 with 20 us, 12.5 without; beside
    # two busy processes 30, 25 and 25.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    if manifest.operators:
        qwen_plugin.register(options, threads)
    return options


def _check_counts(threads: int | None, **counts: int | None) -> None:
    """Refuse what is no count."""
    for name, value in {"threads": threads, **counts}.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise EngineError(f"{name} is {shown(value)}, expected a whole number, 1 or more")
    if threads is not None and threads > qwen_plugin.MOST_THREADS:
        raise EngineError(f"threads is {threads}, expected {qwen_plugin.MOST_THREADS} or fewer")


def _check_states(directory: Path, manifest: Manifest) -> None:
    """Refuse an engine with a state that lies in no cache block: this runtime keeps, shares and moves blocks alone."""
    if others := [state.name for state in manifest.states if state.kind != "paged_state"]:
        raise EngineError(
            f"{directory} has states of whole sequences ({', '.join(others[:4])}{', ...' if others[4:] else ''}), this "
            "runtime keeps what lies in cache blocks; run it with a newer qwen-engine"
        )


def _check_graph(path: Path, session: onnxruntime.InferenceSession, manifest: Manifest) -> None:
    """Agree both ways: the graph has the manifest's inputs and no others, and its outputs; types and shapes equal."""
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    complaints = [f"has unknown input {name}" for name in inputs.keys() - {spec.name for spec in manifest.inputs}]
    for specs, found, kind in ((manifest.inputs, inputs, "input"), (manifest.outputs, outputs, "output")):
        for spec in specs:
            value = found.get(spec.name)
            if value is None:
                complaints.append(f"lacks {kind} {spec.name}")
            elif not _matches(spec, value.type, value.shape):
                complaints.append(
                    f"has {spec.name} {value.type} {tuple(value.shape)}, expected {spec.dtype} {spec.shape}"
                )
    if complaints:
        raise EngineError(f"{path} {'; '.join(sorted(complaints))}; build the engine again")


def _matches(spec: TensorSpec, ort_type: str, shape: Sequence[int | str | None]) -> bool:
    sizes = [
        (wanted, size)
        for wanted, size in zip(spec.shape, shape, strict=False)
        if isinstance(wanted, int) and isinstance(size, int)
    ]
    name = {"float32": "float"}.get(spec.dtype, spec.dtype)  # where ONNX Runtime's name is not NumPy's
    return ort_type == f"tensor({name})" and len(shape) == len(spec.shape) and all(a == b for a, b in sizes)


def _engine_error(what: str, error: Exception) -> EngineError:
    """``what`` fails with ``error``: the sentence of ONNX Runtime's message, without the codes before it."""
    text = error.object.decode(errors="replace") if isinstance(error, UnicodeDecodeError) else str(error)
    lines = text.splitlines() or [type(error).__name__]
    advice = f"; {memory_advice()}" if is_refused_memory(error) else ""
    return EngineError(f"{what}: {lines[0].split(' : ')[-1].strip()}{advice}")
