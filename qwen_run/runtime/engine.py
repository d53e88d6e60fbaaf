"""An engine directory opened: the checked parts, the ONNX Runtime session, the cache, one run of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import qwen_plugin
from qwen_engine.errors import EngineError, shown
from qwen_engine.json_output import is_utf8
from qwen_engine.manifest import ENGINES, GRAPH_FILE, MANIFEST_FILE, Manifest
from qwen_run.engine_files.checksums import check_operators, check_parts
from qwen_run.engine_files.float_activations import with_float_activations
from qwen_run.runtime.capacity import choose_capacity, warn_of_shorter, with_limit
from qwen_run.runtime.kv_cache import KVCache
from qwen_run.runtime.machine import available_bytes, physical_cores
from qwen_run.runtime.session import GraphSession, absent_inputs


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

    def __init__(self, directory: Path, manifest: Manifest, session: GraphSession, cache: KVCache) -> None:
        self.directory = directory
        self.manifest = manifest
        self.cache = cache
        self._session = session
        session.bind(cache.pools)
        self._input_names = [spec.name for spec in manifest.batch_inputs]
        self._absent = absent_inputs(manifest)

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
        check_counts(threads=threads, num_blocks=num_blocks, cache_bytes=cache_bytes, max_seq_len=max_seq_len)
        manifest = read_manifest(directory)
        if graph not in manifest.parts:
            raise EngineError(f"{directory} has no part {graph}; build the engine again")
        threads = threads or physical_cores()
        check_parts(directory, manifest, threads)
        check_operators(directory, manifest)
        capacity = choose_capacity(
            manifest, available_bytes(), num_blocks=num_blocks, cache_bytes=cache_bytes, max_seq_len=max_seq_len
        )
        path = directory / graph
        session = GraphSession(
            path, manifest, threads, with_float_activations(path.read_bytes()) if float_activations else None
        )
        if complaints := session.find_faults(manifest.inputs, manifest.outputs):
            raise EngineError(f"{path} {'; '.join(complaints)}; build the engine again")
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
        return self._run(batch, self._session.output_names)

    def _run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        values = ((name, getattr(batch, name)) for name in self._input_names)
        given = ((name, self._absent[name] if value is None else value) for name, value in values)
        return self._session.run(given, outputs)


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


def check_counts(threads: int | None, **counts: int | None) -> None:
    """
    Raises:
        EngineError: one of them is no count.
    """
    for name, value in {"threads": threads, **counts}.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise EngineError(f"{name} is {shown(value)}, expected a whole number, 1 or more")
    if threads is not None and threads > qwen_plugin.MOST_THREADS:
        raise EngineError(f"threads is {threads}, expected {qwen_plugin.MOST_THREADS} or fewer")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an engine that this runtime can run.

    Raises:
        EngineError: there is none, or it has a state that lies in no cache block: this runtime keeps, shares and moves
            blocks alone.
    """
    if not is_utf8(str(directory)):  # ONNX Runtime takes no other path
        raise EngineError(f"{str(directory)!r} is not a UTF-8 path; rename it")
    manifest = Manifest.read(directory)
    if others := [state.name for state in manifest.states if state.kind != "paged_state"]:
        raise EngineError(
            f"{directory} has states of whole sequences ({', '.join(others[:4])}{', ...' if others[4:] else ''}), this "
            "runtime keeps what lies in cache blocks; run it with a newer qwen-engine"
        )
    return manifest
