"""What storing some of a model's linears coarsely costs, in KL: the figures that ``--quant auto`` chooses by.

Let e be what rounding adds to a linear's output, J the derivative of the logits by it, and F the Fisher information of
their softmax. The first term of KL in e is the second (Kullback, Information Theory and Statistics, 1959, ch. 2.6):

    KL(float || rounded) = 1/2 eT JT F J e + O(|e|^3)

Two things follow. The errors of two linears are as often alike in sign as not, so on average the mixed terms of a sum
vanish: **the KLs of linears add.** And two ways to round one linear spread their errors over the same directions, so
their KLs are to each other as the mean squares of their e: **one probe a linear is enough**, its other schemes follow
from their output errors, which cost a product each. What this leaves out, a search finds by building and measuring.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from qwen_build.calibration.factor_search import as_multiplied
from qwen_build.calibration.layer_runner import LayerRunner, embed, final_norm, logits, read_layer
from qwen_build.calibration.results import new_array
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.graph.architecture import LAYER, layer_kind
from qwen_build.graph.layers import SchemeChoice
from qwen_build.quantization.schemes import IntScheme, Scheme
from qwen_engine.graph_io import EMBEDDING, HEAD
from qwen_run.engine_files.stored_rows import WeightShape
from qwen_run.runtime.machine import physical_cores

# An output error is that of so many inputs and so many of a linear's outputs, both evenly spread.
_SAMPLE_TOKENS, _SAMPLE_ROWS = 256, 1024
# Logits in memory at a time.
_LOGITS = 1 << 26


@dataclass(frozen=True)
class Unit:
    """Linears that are stored alike: those that the graph has as one weight.

    Attributes:
        name: of the weight in the graph; of the embedding, where the head shares its bytes.
        layer: None for embedding and head.
        linears: by the names they have in the checkpoint.
        stored: (out_features, in_features) of the weights that the graph has for them.
        schemes: to choose from.
    """

    name: str
    layer: int | None
    linears: tuple[str, ...]
    stored: tuple[WeightShape, ...]
    schemes: tuple[Scheme, ...]

    def stored_bytes(self, scheme: Scheme) -> int:
        """What the unit takes of the engine's weights, but for alignment."""
        return sum(part.size_bytes for shape in self.stored for part in scheme.parts(shape).values())


def decision_units(config: ModelConfig, fixed: Mapping[str, SchemeChoice], schemes: tuple[Scheme, ...]) -> list[Unit]:
    """The units of a model: those of each layer in turn, the ones that may be fused first.

    Args:
        fixed: linears whose scheme is decided already, which keeps them apart from others.
        schemes: those of all the rest.
    """
    units = []

    def add(fused: str, layer: int | None, shapes: Mapping[str, WeightShape], shared: bool = False) -> None:
        """A unit of the linears with these shapes, their bytes ``shared`` or side by side; or one for each of them."""
        if any(name in fixed for name in shapes):
            for name, shape in shapes.items():
                units.append(Unit(name, layer, (name,), (shape,), (fixed[name].scheme,) if name in fixed else schemes))
        else:
            rows, columns = [shape[0] for shape in shapes.values()], next(iter(shapes.values()))[1]
            stored = (rows[0] if shared else sum(rows), columns)
            units.append(Unit(fused, layer, tuple(shapes), (stored,), schemes))

    vocabulary = (config.vocab_size, config.hidden_size)
    if config.tie_word_embeddings:
        add(EMBEDDING, None, {EMBEDDING: vocabulary, HEAD: vocabulary}, shared=True)
    else:
        add(EMBEDDING, None, {EMBEDDING: vocabulary})
    for layer in range(config.num_hidden_layers):
        path, kind = f"model.layers.{layer}", layer_kind(config, layer)
        alone = {linear.name: (linear,) for linear in kind.linears if not linear.fused}
        for name, linears in {**kind.fused, **alone}.items():
            add(f"{path}.{name}", layer, {f"{path}.{linear.name}": linear.shape(config) for linear in linears})
    if not config.tie_word_embeddings:
        add(HEAD, None, {HEAD: vocabulary})
    return units


@dataclass(eq=False)
class Probing:
    """A measurement of the KL that each unit causes. What it finished is kept, so that another one goes on there.

    Attributes:
        probe: the scheme that is run, its inputs as they are.
        token_ids: int64 (sequences, tokens).
        scratch: a directory for the other attributes alone.
        left: what calibration leaves of the squared error of rounding to the nearest in the layers' linears, from 0
            to 1; 1 where nothing calibrates.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    units: Sequence[Unit]
    probe: Scheme
    token_ids: np.ndarray
    scratch: Path
    left: float = 1.0

    @cached_property
    def _layers(self) -> list[list[Unit]]:
        """The units of each layer."""
        return [[unit for unit in self.units if unit.layer == i] for i in range(self.config.num_hidden_layers)]

    @cached_property
    def _models(self) -> list[int]:
        """States behind each layer: those of the float model, of another embedding, and of every unit up to there."""
        return [2 + sum(map(len, self._layers[: i + 1])) for i in range(self.config.num_hidden_layers)]

    @property
    def work(self) -> int:
        """What :meth:`measure` does in all: tokens through a layer, or through the head."""
        return (sum(self._models) + self._models[-1] + 1) * self.token_ids.size

    def measure(self, advance: Callable[[int], object] = lambda _: None) -> list[list[float]]:
        """The mean KL(float || one unit stored so), in nats, of every unit and each of its schemes.

        Args:
            advance: called with what is newly done of :attr:`work`.
        """
        ratios = self._run_layers(advance)
        ratios |= kept(self.scratch / "head.json", self._head_ratios)
        kl = self._run_head(advance)
        readers = [[unit.name] if unit.layer is not None else unit.linears for unit in self.units]
        return [
            [sum(kl[name] * ratios[name][i] for name in names) for i in range(len(unit.schemes))]
            for unit, names in zip(self.units, readers, strict=True)
        ]

    def _run_layers(self, advance: Callable[[int], object]) -> dict[str, list[float]]:
        """Run every model to the end of the last layer: a layer is read once, and all models go through it.

        Returns:
            Of the embedding and the units of layers, see :func:`_ratios`.
        """
        embedded = embed(self.checkpoint, self.config, self.token_ids.ravel())
        if not any(self.scratch.glob("states-*.npy")):
            self._write_states(0, [embedded, rounded(self.probe, embedded)], models=2)
        runner = LayerRunner(self.config, self.token_ids.shape[1], physical_cores())
        errors = [lookup_error(scheme, embedded) for scheme in self.units[0].schemes]
        ratios = {EMBEDDING: _ratios(errors, lookup_error(self.probe, embedded))}
        for layer, models in enumerate(self._models):
            if (path := self._states_file(layer)).exists():
                self._run_layer(layer, runner)
                path.unlink()
            ratios |= kept(self.scratch / f"layer-{layer}.json")
            advance(models * self.token_ids.size)
        return ratios

    def _run_layer(self, layer: int, runner: LayerRunner) -> None:
        """Write the ratios of the units of ``layer``, and the states behind it."""
        before = np.load(self._states_file(layer), mmap_mode="r")
        weights = read_layer(self.checkpoint, self.config, layer)
        lengths = [self.token_ids.shape[1]] * len(self.token_ids)
        exact = runner.run(layer, weights, before[0], lengths)
        inputs = {f"{one.name}.weight": exact.inputs[one.reads.name] for one in layer_kind(self.config, layer).linears}
        names = [[f"{LAYER.sub('', linear)}.weight" for linear in unit.linears] for unit in self._layers[layer]]

        def ratios() -> Iterator[tuple[str, list[float]]]:
            for unit, own in zip(self._layers[layer], names, strict=True):
                pairs = [(_evenly(weights[name], _SAMPLE_ROWS), _evenly(inputs[name], _SAMPLE_TOKENS)) for name in own]
                probed = sum(output_error(self.probe, *pair) for pair in pairs)
                errors = [sum(output_error(scheme, *pair, self.left) for pair in pairs) for scheme in unit.schemes]
                yield unit.name, _ratios(errors, probed)

        def states() -> Iterator[np.ndarray]:
            yield exact.output
            for hidden in before[1:]:
                yield runner.run(layer, weights, hidden, lengths, with_inputs=False).output
            for own in names:
                altered = weights | {name: rounded(self.probe, weights[name]) for name in own}
                yield runner.run(layer, altered, before[0], lengths, with_inputs=False).output

        kept(self.scratch / f"layer-{layer}.json", lambda: dict(ratios()))
        self._write_states(layer + 1, states(), self._models[layer])

    def _write_states(self, layer: int, states: Iterable[np.ndarray], models: int) -> None:
        """The input of ``layer`` in each model, float32 (models, T, hidden_size); a file that is there is whole."""
        path = self._states_file(layer)
        shape = (models, self.token_ids.size, self.config.hidden_size)
        file = new_array(path.with_suffix(".new"), shape)
        for i, hidden in enumerate(states):
            file[i] = hidden
        path.with_suffix(".new").replace(path)

    def _float_states(self) -> np.ndarray:
        """What the last layer of the float model puts out, float32 (T, hidden_size)."""
        return np.asarray(np.load(self._states_file(len(self._layers)), mmap_mode="r")[0])

    def _states_file(self, layer: int) -> Path:
        return self.scratch / f"states-{layer}.npy"

    def _head_ratios(self) -> dict[str, list[float]]:
        unit = next(unit for unit in self.units if HEAD in unit.linears)
        inputs = final_norm(self.checkpoint, self.config, _evenly(self._float_states(), _SAMPLE_TOKENS))
        name = EMBEDDING if self.config.tie_word_embeddings else HEAD
        rows = self.config.vocab_size
        weight = np.concatenate(
            [
                self.checkpoint.read(f"{name}.weight", int(row), int(row) + 1)
                for row in np.linspace(0, rows - 1, min(rows, _SAMPLE_ROWS))
            ]
        )
        errors = [output_error(scheme, weight, inputs) for scheme in unit.schemes]
        return {HEAD: _ratios(errors, output_error(self.probe, weight, inputs))}

    def _run_head(self, advance: Callable[[int], object]) -> dict[str, float]:
        """The mean KL(float || model) of every probe, by its unit or linear."""
        states = np.load(self._states_file(len(self._layers)), mmap_mode="r")  # (models, T, H)
        tokens, models = self.token_ids.size, len(states)
        step = max(1, _LOGITS // (models * self.config.vocab_size))
        sums = np.zeros(models - 1)
        for start in range(0, tokens, step):
            hidden = np.ascontiguousarray(states[:, start : start + step])
            sums += kept(self.scratch / f"kl-{start}.json", partial(self._kl, hidden))
            advance(models * hidden.shape[1])
        names = [EMBEDDING, *(unit.name for units in self._layers for unit in units)]
        kl = dict(zip(names, sums / tokens, strict=True))
        head = kept(self.scratch / "kl-head.json", self._head_kl)
        advance(tokens)
        return kl | {HEAD: head}

    def _kl(self, hidden: np.ndarray) -> list[float]:
        """The sum of KL(first model || model) over the tokens of ``hidden`` (models, T, H)."""
        values = logits(self.checkpoint, self.config, hidden.reshape(-1, hidden.shape[-1]))
        values = values.reshape(*hidden.shape[:2], -1)
        return [float(one) for one in kl_divergence(values[0], values[1:]).sum(axis=0)]

    def _head_kl(self) -> float:
        """The mean KL(float || the probe's head alone)."""
        states = self._float_states()
        step, total = max(1, _LOGITS // (2 * self.config.vocab_size)), 0.0
        for start in range(0, len(states), step):
            hidden = states[start : start + step]
            altered = logits(self.checkpoint, self.config, hidden, partial(rounded, self.probe))
            total += float(kl_divergence(logits(self.checkpoint, self.config, hidden), altered[None]).sum())
        return total / len(states)


def kl_divergence(reference: np.ndarray, others: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(other)) in nats, float64 (T, others).

    Rounding a single linear causes KLs far below those that reports speak of, which ``accuracy/metrics.py`` computes
    together with all else they say of a row: this takes no difference of large numbers.

    Args:
        reference: logits float32 (T, vocab_size).
        others: float32 (others, T, vocab_size).
    """
    kl = np.empty((len(reference), len(others)))
    for t, row in enumerate(reference.astype(np.float64)):
        p = np.exp(row - row.max())
        p /= p.sum()
        for i, other in enumerate(others[:, t]):
            # log sum p exp(d) - sum p d for the differences d of the logits, without a difference of large numbers
            d = other - row
            d -= (p * d).sum()
            kl[t, i] = np.log((p * np.exp(d, out=d)).sum())
    return np.maximum(kl, 0)  # rounding may leave a sum of nothing at -1e-16


def rounded(scheme: Scheme, weight: np.ndarray) -> np.ndarray:
    """The weight float32 that an engine multiplies with where ``weight`` (out_features, in_features) is stored so."""
    if isinstance(scheme, IntScheme):
        return scheme.grid.values(scheme.round(weight), weight.shape[1])
    return weight


def output_error(scheme: Scheme, weight: np.ndarray, inputs: np.ndarray, left: float = 1.0) -> float:
    """What rounding does to a linear's output: ``(|(V - W) x|**2 + |V (x' - x)|**2) / |W x|**2``.

    Args:
        weight: W float32 (out_features, in_features); V is the rounded one.
        inputs: x of some tokens, float32 (T, in_features); x' are those that the operator multiplies.
        left: the share of the first term that calibrated rounding leaves.
    """
    if not isinstance(scheme, IntScheme):
        return 0.0
    stored = rounded(scheme, weight)
    seen = as_multiplied(inputs, np.abs(inputs).max(axis=0), scheme)
    squares = [
        np.square(product).sum(dtype=np.float64)
        for product in (inputs @ weight.T, inputs @ (stored - weight).T, (seen - inputs) @ stored.T)
    ]
    return float((left * squares[1] + squares[2]) / squares[0]) if squares[0] else 0.0


def lookup_error(scheme: Scheme, rows: np.ndarray) -> float:
    """``|V - W|**2 / |W|**2`` of some rows W of an embedding."""
    whole = np.square(rows).sum(dtype=np.float64)
    return float(np.square(rounded(scheme, rows) - rows).sum(dtype=np.float64) / whole) if whole else 0.0


def kept(path: Path, compute: Callable[[], Any] = lambda: None) -> Any:
    """The value in the JSON file ``path``; if there is none, that of ``compute``, written to it."""
    if not path.exists():
        new = path.with_suffix(".new")
        new.write_text(json.dumps(compute()), encoding="utf-8")
        new.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


def _ratios(errors: Sequence[float], probed: float) -> list[float]:
    """The errors, one a scheme, as multiples of the probe's; 0 where the probe is exact."""
    return [error / probed if probed else 0.0 for error in errors]


def _evenly(array: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of the rows (n, ...), the first and the last among them, at about equal distances."""
    return array[np.linspace(0, len(array) - 1, min(len(array), count)).astype(np.int64)]
