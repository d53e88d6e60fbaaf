"""Some layers of an engine: cut out of it when it is loaded, with the pools and the weights of these layers alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from qwen_engine.errors import EngineError
from qwen_engine.graph_io import TensorSpec
from qwen_engine.manifest import GRAPH_FILE, Manifest
from qwen_engine.regular_files import read_regular
from qwen_run.engine_files.checksums import check_operators, check_stage
from qwen_run.engine_files.stage_graph import StageGraph, check_layers, stage_graph
from qwen_run.runtime.engine import Batch, check_counts, read_manifest
from qwen_run.runtime.kv_cache import Edit, Pools
from qwen_run.runtime.machine import physical_cores
from qwen_run.runtime.session import GraphSession, absent_inputs


def even_cuts(num_layers: int, num_stages: int) -> list[range]:
    """The layers of each of ``num_stages`` stages, as equal in number as can be.

    Raises:
        EngineError: there are more stages than layers.

    >>> even_cuts(5, 2)
    [range(0, 2), range(2, 5)]
    """
    if not 1 <= num_stages <= num_layers:
        raise EngineError(
            f"{num_stages} stages are asked for, expected 1 to {num_layers}, as many as the engine has layers"
        )
    edges = [num_layers * index // num_stages for index in range(num_stages + 1)]
    return [range(*edge) for edge in pairwise(edges)]


class Stage:
    """Layers of an engine, ready to run. Make one with :meth:`load`.

    Attributes:
        directory: where the engine lies.
        manifest: what ``engine.json`` says of the whole engine.
        layers: which this stage has.
        weight_bytes: of the weights file that it reads.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, graph: StageGraph, session: GraphSession, pools: Pools
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.layers = graph.layers
        self.weight_bytes = graph.weight_bytes
        self._graph = graph
        self._session = session
        self._pools = pools
        session.bind(pools.arrays)
        self._input_names = [spec.name for spec in manifest.batch_inputs if spec.name in session.input_names]
        self._absent = absent_inputs(manifest)

    @classmethod
    def load(
        cls, directory: Path, layers: range, num_blocks: int, threads: int | None = None, *, checks_others: bool = False
    ) -> Stage:
        """Open ``layers`` of the engine in ``directory``. Of its weights only those are mapped and checked, or need be
        there.

        Args:
            num_blocks: blocks of the pools, the same for all stages.
            threads: threads of one run, and of the check; the physical cores this process may use if None.
            checks_others: check the engine's other files too, such as what text goes through.

        Raises:
            EngineError: there are no such layers, the graph cannot be cut there, a part is missing or changed, or the
                system refuses the memory.
        """
        check_counts(threads=threads, num_blocks=num_blocks)
        manifest = read_manifest(directory)
        check_layers(layers, manifest.model.num_hidden_layers)
        threads = threads or physical_cores()
        path = directory / GRAPH_FILE
        graph = read_stage_graph(path, layers, manifest)
        check_stage(directory, manifest, graph.stretches, threads, others=checks_others)
        check_operators(directory, manifest)
        session = GraphSession(path, manifest, threads, graph.model)
        states = stage_states(manifest, layers)
        outputs = [_hidden(graph.hidden_out, manifest) if graph.hidden_out else manifest.output]
        inputs = [spec for spec in manifest.batch_inputs if spec.name in session.input_names]
        inputs += [*states, *([_hidden(graph.hidden_in, manifest)] if graph.hidden_in else [])]
        if complaints := session.find_faults(inputs, outputs):
            raise EngineError(f"{path}, cut to layers {layers}, {'; '.join(complaints)}; build the engine again")
        return cls(directory, manifest, graph, session, Pools(states, num_blocks))

    def apply(self, edits: Iterable[Edit]) -> None:
        """Do to the pools what has happened to blocks since the last batch."""
        for edit in edits:
            self._pools.apply(edit)

    def run(self, batch: Batch, hidden: np.ndarray | None) -> np.ndarray:
        """Feed ``batch``, writing its keys and values to the pools.

        Args:
            hidden: what the stage before gave, float32 (T, hidden_size); None for the first.

        Returns:
            float32 (T, hidden_size) for the next stage; of the last what the engine gives, (L, width).

        Raises:
            EngineError: ONNX Runtime or an operator refuses the batch.
        """
        values = ((name, getattr(batch, name)) for name in self._input_names)
        given = [(name, self._absent[name] if value is None else value) for name, value in values]
        if self._graph.hidden_in is not None:
            assert hidden is not None, "a stage behind the first gets what the one before gave"
            given.append((self._graph.hidden_in, hidden))
        output = self._graph.hidden_out or self.manifest.output.name
        result = self._session.run(given, [output])[output]
        expected = len(batch.input_ids), self.manifest.model.hidden_size
        if self._graph.hidden_out is not None and (result.shape != expected or result.dtype != np.float32):
            raise EngineError(
                f"layer {self.layers[-1]} of {self.directory} gives {result.dtype} {result.shape}, expected float32 "
                f"{expected}; run it whole, without stages"
            )
        return result


def stage_states(manifest: Manifest, layers: range) -> Sequence[TensorSpec]:
    """What ``layers`` keep from one run to the next."""
    return [spec for spec in manifest.states if spec.layer in layers]


def _hidden(name: str, manifest: Manifest) -> TensorSpec:
    return TensorSpec(name, "token", "float32", ("T", manifest.model.hidden_size))


def read_stage_graph(path: Path, layers: range, manifest: Manifest) -> StageGraph:
    """``layers`` of the graph at ``path``.

    Raises:
        EngineError: it cannot be read, or not be cut there.
    """
    try:
        return stage_graph(read_regular(path), layers, manifest)
    except OSError as error:
        raise EngineError(
            f"{path} cannot be read: {error.strerror}; build the engine again or copy it again"
        ) from error
