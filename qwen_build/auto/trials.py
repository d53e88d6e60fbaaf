"""The engines that ``--quant auto`` tries: built from a choice of schemes, and measured through the runtime."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from qwen_build.auto.budget import Choice, Measured
from qwen_build.auto.sensitivity import Unit, kept, kl_divergence
from qwen_build.calibration.layer_runner import LayerRunner, embed, logits, read_layer
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.locate import Located
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build, write_engine
from qwen_build.plan.options import BuildOptions
from qwen_build.plan.rope_options import rope_override
from qwen_build.plan.rules import Rule, excluding
from qwen_build.quantization.scheme_table import COARSE
from qwen_build.writing.weights_file import write_graph
from qwen_engine.manifest import GRAPH_FILE
from qwen_run.accuracy.both_sides import engine_logits
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.machine import physical_cores

# label, length -> a context with a function to call with what is newly done of the length
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True)
class Text:
    """Sequences int64 (S, L), and what the last layer of the float model makes of them, float32 (S, L, hidden_size)."""

    name: str
    token_ids: np.ndarray
    states: np.ndarray


@dataclass(frozen=True)
class BuiltEngines:
    """The engines of one search, see :class:`~qwen_build.auto.budget.Engines`.

    Attributes:
        options: those of every engine, ``int4_method`` and the text it needs included.
        texts: what engines are measured with, the calibration text and the one held out.
        scratch: where measurements and the best engine are kept.
    """

    checkpoint: Checkpoint
    located: Located
    options: BuildOptions
    units: Sequence[Unit]
    texts: tuple[Text, Text]
    scratch: Path
    command: str
    progress: Progress

    @cached_property
    def stored_bytes(self) -> list[list[int]]:
        """Of each unit and each of its schemes."""
        return [[unit.stored_bytes(scheme) for scheme in unit.schemes] for unit in self.units]

    @property
    def report_bytes(self) -> int:
        """More than what is written beside the engine's other parts will take."""
        return 20_000 + 600 * len(self.units)

    def measure(self, choice: Choice, number: int) -> Measured:
        label = f"Trying engine {number}"
        found = kept(self.scratch / f"{self._directory(choice).name}.json", lambda: self._measure(choice, label))
        return Measured(**found)

    def remove(self, choice: Choice) -> None:
        shutil.rmtree(self._directory(choice), ignore_errors=True)

    def other_bytes(self, choice: Choice) -> int:
        """What the engine of a choice takes besides its units; that of its manifest and larger graph is estimated."""
        plan = plan_build(self.checkpoint, self.located, self.options_of(choice))
        graph = self.scratch / GRAPH_FILE
        write_graph(plan.graph, plan.layout, graph)
        return (
            plan.layout.size_bytes
            - sum(sizes[i] for sizes, i in zip(self.stored_bytes, choice, strict=True))
            + sum(map(len, plan.text.contents.values()))
            + int(2.2 * graph.stat().st_size)
            + 2 * self.report_bytes
        )

    def engine(self, choice: Choice, label: str) -> Path:
        """The directory of the engine of a choice, built if it is not there."""
        directory = self._directory(choice)
        if not directory.exists():
            plan = plan_build(self.checkpoint, self.located, self.options_of(choice))
            with self.progress(label, plan.work) as advance:
                write_engine(plan, self.checkpoint, directory, command=self.command, advance=advance)
        return directory

    def rules(self, choice: Choice) -> tuple[Rule, ...]:
        """The user's own, and one for each linear they do not decide."""
        chosen = [
            Rule(
                "--quant auto",
                linear,
                stored.scheme,
                stored.group_size or None,
                stored.symmetric if stored.group_size else None,
            )
            for unit, i in zip(self.units, choice, strict=True)
            if len(unit.schemes) > 1
            for stored in [unit.schemes[i].record]
            for linear in unit.linears
        ]
        return (*excluding(self.options.exclude), *self.options.quant_config, *chosen)

    def options_of(self, choice: Choice) -> BuildOptions:
        """What builds the engine of a choice."""
        layers = [
            unit.schemes[i].record.scheme for unit, i in zip(self.units, choice, strict=True) if unit.layer is not None
        ]
        options = self.options if not set(COARSE).isdisjoint(layers) else without_calibration(self.options)
        return dataclasses.replace(options, quant=None, exclude=(), quant_config=self.rules(choice))

    def _directory(self, choice: Choice) -> Path:
        # A directory further down, because building locks the one around the engine, and the search holds its own.
        return self.scratch / "engines" / hashlib.sha256(repr(self.options_of(choice)).encode()).hexdigest()[:16]

    def _measure(self, choice: Choice, label: str) -> dict[str, float]:
        directory = self.engine(choice, label)
        engine = Engine.load(directory)
        config = self.checkpoint.adapted(ModelConfig.from_hf(self.located.path, rope_override(self.options)))
        kl = []
        for text in self.texts:
            with self.progress(f"{label}, {text.name}", text.token_ids.size) as advance:
                kl.append(measure_kl(engine, text, self.checkpoint, config, advance))
        size_bytes = sum(path.stat().st_size for path in directory.iterdir()) + self.report_bytes
        return {"calibration_kl": kl[0], "held_out_kl": kl[1], "size_bytes": size_bytes}


def measure_kl(
    engine: Engine,
    text: Text,
    checkpoint: Checkpoint,
    config: ModelConfig,
    advance: Callable[[int], object] = lambda _: None,
) -> float:
    """The mean KL(float || engine) over all positions of ``text``, in nats."""
    total = 0.0
    for token_ids, states in zip(text.token_ids, text.states, strict=True):
        start = 0
        for found in engine_logits(engine, token_ids):
            expected = logits(checkpoint, config, states[start : start + len(found)])
            total += float(kl_divergence(expected, found[None]).sum())
            start += len(found)
            advance(len(found))
    return total / text.token_ids.size


def float_states(
    checkpoint: Checkpoint, config: ModelConfig, token_ids: np.ndarray, advance: Callable[[int], object]
) -> np.ndarray:
    """What the last layer of the float model makes of ``token_ids`` (S, L): float32 (S, L, hidden_size)."""
    sequences, length = token_ids.shape
    states = embed(checkpoint, config, token_ids.ravel()).reshape(sequences, length, -1)
    runner = LayerRunner(config, length, physical_cores())
    for layer in range(config.num_hidden_layers):
        weights = read_layer(checkpoint, config, layer)
        for i, hidden in enumerate(states):
            states[i] = runner.run(layer, weights, hidden, [length], with_inputs=False).output
            advance(length)
    return states


def without_calibration(options: BuildOptions) -> BuildOptions:
    """``options`` of a build that rounds to the nearest."""
    return dataclasses.replace(options, int4_method=None, calibration=None, calibration_tokens=None)
