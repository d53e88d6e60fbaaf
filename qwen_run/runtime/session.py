"""A graph that ONNX Runtime has loaded, over the pools it updates in place; its errors in our words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

import qwen_plugin
from qwen_engine.errors import EngineError
from qwen_engine.graph_io import TensorSpec
from qwen_engine.manifest import Manifest
from qwen_engine.refused_memory import is_refused_memory, memory_advice
from qwen_run.runtime.native_calls import NATIVE_CALLS

# ONNX Runtime's exceptions have no common base of their own; a bound run raises RuntimeError.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    MemoryError,
    UnicodeDecodeError,  # of a message that quotes what a broken file holds
    *(error for error in vars(ort_errors).values() if isinstance(error, type) and issubclass(error, Exception)),
)


class GraphSession:
    """A loaded graph. One run at a time.

    Attributes:
        input_names: what :meth:`run` may be given, pools among them.
        output_names: every output of the graph.
    """

    def __init__(self, path: Path, manifest: Manifest, threads: int, graph: bytes | None = None) -> None:
        """Load the graph at ``path``, or the bytes ``graph`` of one whose weights lie beside it.

        Raises:
            EngineError: ONNX Runtime refuses it.
        """
        self._directory = path.parent
        try:
            options = _session_options(manifest, threads)
            if graph is not None:
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
                )
            with NATIVE_CALLS.call():
                self._session = onnxruntime.InferenceSession(
                    path if graph is None else graph, options, providers=["CPUExecutionProvider"]
                )
        except _ORT_ERRORS as error:
            raise _engine_error(f"{path} cannot be loaded", error) from error
        self.input_names = {value.name for value in self._session.get_inputs()}
        self.output_names = [output.name for output in self._session.get_outputs()]
        self._binding = onnxruntime.IOBinding(self._session)

    def bind(self, pools: Mapping[str, np.ndarray]) -> None:
        """Let the graph update ``pools``.

        They are bound once; binding them again for every run would cost more than the run's overhead.
        """
        for name, pool in pools.items():
            self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(pool))

    def run(self, inputs: Iterable[tuple[str, np.ndarray]], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """The ``outputs`` by name, the caller's own.

        Raises:
            EngineError: ONNX Runtime or an operator refuses the inputs.
        """
        binding = self._binding
        try:
            for name, value in inputs:
                binding.bind_cpu_input(name, value)
            # Bound anew each time: a bound output keeps the shape of the run before.
            binding.clear_binding_outputs()
            for name in outputs:
                binding.bind_output(name)
            with NATIVE_CALLS.call():
                self._session.run_with_iobinding(binding)
        except _ORT_ERRORS as error:
            raise _engine_error(f"{self._directory} cannot run", error) from error
        values = binding.get_outputs()
        return {name: value.numpy() for name, value in zip(outputs, values, strict=True)}

    def find_faults(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[str]:
        """Where the graph is not as the specs say: both have the same inputs, the graph their outputs and perhaps more.

        Types and shapes are equal.
        """
        given = {value.name: value for value in self._session.get_inputs()}
        made = {value.name: value for value in self._session.get_outputs()}
        complaints = [f"has unknown input {name}" for name in given.keys() - {spec.name for spec in inputs}]
        for specs, found, kind in ((inputs, given, "input"), (outputs, made, "output")):
            for spec in specs:
                value = found.get(spec.name)
                if value is None:
                    complaints.append(f"lacks {kind} {spec.name}")
                elif not _matches(spec, value.type, value.shape):
                    complaints.append(
                        f"has {spec.name} {value.type} {tuple(value.shape)}, expected {spec.dtype} {spec.shape}"
                    )
        return sorted(complaints)


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


def absent_inputs(manifest: Manifest) -> dict[str, np.ndarray]:
    """What a batch without embeddings gives the inputs for them: none, by name."""
    return {
        spec.name: np.zeros((0, *map(int, spec.shape[1:])), spec.dtype)
        for spec in manifest.batch_inputs
        if spec.kind == "embedding"
    }
