"""``--quant auto``: a scheme for every linear, so that the engine is as small, or as accurate, as its user asked.

The KL that every choice causes is predicted (``sensitivity.py``), the best choices within the budget are picked, and
that engine is built and measured through the runtime. What the prediction missed corrects the budget of the next one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from qwen_build.auto.report import CHOICES_FILE, REPORT_FILE, AutoReport, Trial, megabytes, rebuild_command, to_html
from qwen_build.auto.sensitivity import Probing, Unit, decision_units, kept, kl_divergence
from qwen_build.calibration.layer_runner import LayerRunner, embed, logits, read_layer
from qwen_build.calibration.text import read_halves
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.files import digest_files
from qwen_build.checkpoint.locate import Located
from qwen_build.checkpoint.safetensors import Checkpoint
from qwen_build.engine_build import plan_build, write_engine
from qwen_build.plan.options import BuildOptions
from qwen_build.plan.rules import Rule, excluding, write_rules
from qwen_build.quantization.schemes import Scheme, make_scheme
from qwen_build.writing.output import check_output, engine_directory, resumable_beside
from qwen_build.writing.weights_file import write_graph
from qwen_engine import __version__
from qwen_engine.errors import BuildError
from qwen_engine.manifest import GRAPH_FILE, MANIFEST_FILE, Manifest
from qwen_plugin.layout import GROUP_SIZES
from qwen_run.accuracy.both_sides import engine_logits
from qwen_run.engine_files.checksums import measure_part
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.machine import physical_cores

# quant and symmetric of the schemes to choose from, each with every group size; and float
_CANDIDATES = (("int4", False), ("int4", True), ("int8", True))
# quant, group size and symmetric of a probe: in the middle of those of int4, whose errors matter most
_PROBE = ("int4", 64, False)

# --int4-method where none is asked for
_METHOD = "gptq"
# What a method leaves of the squared error of rounding to nearest: 0.30 of the KL of a small Qwen2 with int4 g32.
# It weighs rounded weights against rounded inputs; being wrong about it is corrected like the rest.
_LEFT = {"gptq": 0.3}

# Sequences of 512 tokens that probes run. With the demo, choices by 512 tokens have 0.3 to 1.2 % more KL than those by
# 1,024 others, as these see it.
_PROBED = 1
# Sequences of either text that engines are measured with.
_MEASURED = 8

# Steps that a budget is cut into.
_STEPS = 1 << 16
# Engines that are built before the smallest within the budget is taken.
_MOST_TRIALS = 6
# An engine with this share of its budget is not improved upon; a corrected budget aims at the second share.
_GOOD_ENOUGH, _AIM = 0.93, 0.97

# label, length -> a context with a function to call with what is newly done of the length
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


def cheapest(
    costs: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], limit: float
) -> tuple[int, ...] | None:
    """Choose an option of every unit: of the choices whose weights sum to ``limit`` at most, the one that costs least.

    This is the multiple-choice knapsack problem, by dynamic programming (Kellerer, Pferschy and Pisinger, Knapsack
    Problems, 2004, ch. 11.5) over what is used of the limit in 65,536 steps. Weights are rounded up to whole steps: the
    limit holds, and at most a step a unit of it is wasted.

    Args:
        costs: of the options of each unit.
        weights: likewise.

    Returns:
        The index of the option of each unit; None if even the lightest are too heavy.

    >>> cheapest([[9, 5, 2], [9, 3]], weights=[[0, 1, 4], [0, 2]], limit=4)
    (1, 1)
    """
    spare = limit - sum(map(min, weights))
    if spare < 0:
        return None
    least = np.zeros(_STEPS + 1)  # the least cost of the units so far, by the steps they may use
    taken: list[tuple[np.ndarray, list[int]]] = []
    for cost, weight in zip(costs, weights, strict=True):
        extra = [one - min(weight) for one in weight]
        steps = [math.ceil(one / spare * _STEPS) if 0 < one <= spare else _STEPS * (one > 0) for one in extra]
        table = np.full((len(cost), _STEPS + 1), np.inf)
        for row, one, used, more in zip(table, cost, steps, extra, strict=True):
            if more <= spare:
                np.add(least[: _STEPS + 1 - used], one, out=row[used:])
        taken.append((table.argmin(axis=0), steps))
        least = table.min(axis=0)
    left, chosen = _STEPS, []
    for best, steps in reversed(taken):
        chosen.append(int(best[left]))
        left -= steps[chosen[-1]]
    return tuple(reversed(chosen))


@dataclass(frozen=True)
class Text:
    """Sequences int64 (S, L), and what the last layer of the float model makes of them, float32 (S, L, hidden_size)."""

    name: str
    token_ids: np.ndarray
    states: np.ndarray


@dataclass
class SchemeSearch:
    """The engines that were tried so far, and how another one is.

    Attributes:
        options: those of every engine, ``int4_method`` and the text it needs included.
        kl: the KL predicted of each unit and each of its schemes.
        texts: what engines are measured with, the calibration text and the one held out.
        scratch: where measurements and the best engine are kept.
    """

    checkpoint: Checkpoint
    located: Located
    options: BuildOptions
    units: Sequence[Unit]
    kl: Sequence[Sequence[float]]
    texts: tuple[Text, Text]
    scratch: Path
    command: str
    progress: Progress
    trials: list[Trial] = dataclasses.field(default_factory=list)

    @cached_property
    def stored_bytes(self) -> list[list[int]]:
        return [[unit.stored_bytes(scheme) for scheme in unit.schemes] for unit in self.units]

    @property
    def report_bytes(self) -> int:
        """More than what is written beside the engine's other parts will take."""
        return 20_000 + 600 * len(self.units)

    def within_kl(self, max_kl: float) -> Trial:
        """The smallest engine found whose KL is at most ``max_kl`` on both texts.

        Raises:
            BuildError: not even the most accurate one is within it.
        """
        pairs = [list(zip(*pair, strict=True)) for pair in zip(self.kl, self.stored_bytes, strict=True)]
        most_accurate = tuple(options.index(min(options)) for options in pairs)
        low, high, limit = 0.0, math.inf, max_kl  # predicted KLs: known to be within, known to be beyond, to try next
        best: Trial | None = None
        while True:
            choice = cheapest(self.stored_bytes, self.kl, limit)
            if len(self.trials) >= _MOST_TRIALS or choice is None or choice in [trial.choice for trial in self.trials]:
                if best is not None:
                    return best
                choice = most_accurate
            trial = self.trial(choice)
            if trial.kl <= max_kl:
                if best is None or trial.size_bytes < best.size_bytes:
                    best = trial
                low = max(low, trial.predicted_kl)
                if trial.kl >= _GOOD_ENOUGH * max_kl or not trial.predicted_kl:
                    return best
            elif choice == most_accurate:
                self._remove_all_but(None)
                raise BuildError(
                    f"--max-kl {max_kl:g} cannot be reached: the most accurate engine, {megabytes(trial.size_bytes)}, "
                    f"has a KL of {trial.kl:.2g}; allow that much"
                )
            else:
                high = min(high, trial.predicted_kl)
            self._remove_all_but(best)
            limit = self._predicted_for(_AIM * max_kl)
            if not low < limit < high:
                limit = math.sqrt(low * high) if low else high / 2

    def _predicted_for(self, kl: float) -> float:
        """What an engine that measures ``kl`` is predicted, by the power law through the last two that were tried."""
        last, power = self.trials[-1], 1.0
        if len(self.trials) > 1 and (before := self.trials[-2]).predicted_kl != last.predicted_kl:
            ratio = math.log(last.kl / before.kl) / math.log(last.predicted_kl / before.predicted_kl)
            power = min(max(ratio, 0.5), 2.0)
        return float(last.predicted_kl * (kl / last.kl) ** (1 / power))

    def within_bytes(self, max_bytes: int) -> Trial:
        """The most accurate engine found of at most ``max_bytes``, all files together.

        That is the one predicted to be; or, as predictions are some percent off, the best one of those that store all
        linears of the layers alike, where it measures better.

        Raises:
            BuildError: the smallest one is larger.
        """
        smallest = tuple(sizes.index(min(sizes)) for sizes in self.stored_bytes)
        others = self._other_bytes(smallest)
        every = [range(len(unit.schemes)) for unit in self.units]
        while True:
            choice = self._most_accurate(every, max_bytes - others)
            if choice is None:
                least = others + sum(map(min, self.stored_bytes))
                raise BuildError(
                    f"--max-size is {megabytes(max_bytes)}, the smallest engine has {megabytes(least)}; allow as much"
                )
            best = self.trial(choice)
            if best.size_bytes <= max_bytes:
                break
            others += best.size_bytes - max_bytes
            self._remove_all_but(None)
        alike = [self._most_accurate(some, max_bytes - others) for some in self._alike()]
        fitting = [choice for choice in alike if choice is not None]
        if fitting and (choice := min(fitting, key=self._predicted)) != best.choice:
            other = self.trial(choice)
            if other.size_bytes <= max_bytes and other.kl < best.kl:
                best = other
        self._remove_all_but(best)
        return best

    def _most_accurate(self, allowed: Sequence[Sequence[int]], limit: int) -> tuple[int, ...] | None:
        """The choice of ``allowed`` schemes of each unit that is predicted to be, of at most ``limit`` stored bytes."""
        costs, weights = (
            [[values[i] for i in some] for values, some in zip(table, allowed, strict=True)]
            for table in (self.kl, self.stored_bytes)
        )
        picked = cheapest(costs, weights, limit)
        return None if picked is None else tuple(some[i] for some, i in zip(allowed, picked, strict=True))

    def _alike(self) -> Iterator[Sequence[Sequence[int]]]:
        """For every scheme: it alone for the layers' units that have a choice, and all for the others."""
        every = [range(len(unit.schemes)) for unit in self.units]
        chosen = [unit.layer is not None and len(unit.schemes) > 1 for unit in self.units]
        for scheme in range(max(map(len, every))):
            yield [[scheme] if one else some for one, some in zip(chosen, every, strict=True)]

    def _predicted(self, choice: Sequence[int]) -> float:
        return sum(kl[i] for kl, i in zip(self.kl, choice, strict=True))

    def trial(self, choice: tuple[int, ...]) -> Trial:
        """Build and measure the engine of a choice."""
        label = f"Trying engine {len(self.trials) + 1}"
        measured = kept(self.scratch / f"{self._directory(choice).name}.json", lambda: self._measure(choice, label))
        self.trials.append(Trial(choice, self._predicted(choice), **measured))
        return self.trials[-1]

    def engine(self, choice: tuple[int, ...], label: str) -> Path:
        """The directory of the engine of a choice, built if it is not there."""
        directory = self._directory(choice)
        if not directory.exists():
            plan = plan_build(self.checkpoint, self.located, self.options_of(choice))
            with self.progress(label, plan.work) as advance:
                write_engine(plan, self.checkpoint, directory, command=self.command, advance=advance)
        return directory

    def rules(self, choice: tuple[int, ...]) -> tuple[Rule, ...]:
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

    def options_of(self, choice: tuple[int, ...]) -> BuildOptions:
        """What builds the engine of a choice."""
        layers = [
            unit.schemes[i].record.scheme for unit, i in zip(self.units, choice, strict=True) if unit.layer is not None
        ]
        options = self.options if "int4" in layers else without_calibration(self.options)
        return dataclasses.replace(options, quant=None, exclude=(), quant_config=self.rules(choice))

    def _remove_all_but(self, best: Trial | None) -> None:
        """Engines that lost; what they measured stays."""
        for trial in self.trials:
            if trial is not best:
                shutil.rmtree(self._directory(trial.choice), ignore_errors=True)

    def _directory(self, choice: tuple[int, ...]) -> Path:
        # A directory further down, because building locks the one around the engine, and the search holds its own.
        return self.scratch / "engines" / hashlib.sha256(repr(self.options_of(choice)).encode()).hexdigest()[:16]

    def _measure(self, choice: tuple[int, ...], label: str) -> dict[str, float]:
        directory = self.engine(choice, label)
        engine = Engine.load(directory)
        config = ModelConfig.from_hf(self.located.path)
        kl = []
        for text in self.texts:
            with self.progress(f"{label}, {text.name}", text.token_ids.size) as advance:
                kl.append(measure_kl(engine, text, self.checkpoint, config, advance))
        size_bytes = sum(path.stat().st_size for path in directory.iterdir()) + self.report_bytes
        return {"calibration_kl": kl[0], "held_out_kl": kl[1], "size_bytes": size_bytes}

    def _other_bytes(self, choice: tuple[int, ...]) -> int:
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


def build_auto(
    checkpoint: Checkpoint,
    located: Located,
    options: BuildOptions,
    output: Path,
    max_kl: float | None = None,
    max_bytes: int | None = None,
    replace: bool = False,
    command: str = "",
    progress: Progress = lambda label, length: nullcontext(lambda done: None),
) -> AutoReport:
    """Write the best engine within a budget to ``output``, and beside its other parts what was chosen and why.

    Where this is interrupted, what it measured is kept beside ``output`` for the next time.

    Args:
        options: their ``exclude`` and ``quant_config`` decide the linears that they name.
        max_kl: the smallest engine of this KL; mean of KL(float || engine) in nats, on calibration text and other text.
        max_bytes: or the most accurate engine of this size, all its files together.

    Raises:
        BuildError: an option does not go with auto, the text is too short, or no engine is within the budget.
    """
    check_output(output, replace)
    config = ModelConfig.from_hf(located.path)
    check_options(options, config, max_kl, max_bytes)
    plain = plan_build(checkpoint, located, dataclasses.replace(without_calibration(options), quant="int8"))
    options, calibration_ids, held_out_ids, held_out = split_text(options, located.path, config, plain.max_seq_len)
    units = decision_units(config, plain.schemes.exceptions, candidates(options))
    probe, left = (
        make_scheme(*_PROBE, kernels=options.kernels, activations="float32"),
        _LEFT.get(options.int4_method or "", 1.0),
    )
    spread = np.linspace(0, len(calibration_ids) - 1, min(_PROBED, len(calibration_ids))).astype(int)
    decisive = [digest_files(checkpoint.files), repr(units), repr(probe), repr(options), __version__]
    texts = [("calibration text", calibration_ids[:_MEASURED]), ("held-out text", held_out_ids[:_MEASURED])]
    hashed = hashlib.sha256(json.dumps(decisive).encode())
    for ids in (calibration_ids, held_out_ids):
        hashed.update(ids.tobytes())
    with resumable_beside(output, hashed.hexdigest()[:16]) as scratch:
        probes = scratch / "probes"
        probes.mkdir(exist_ok=True)
        probing = Probing(checkpoint, config, units, probe, calibration_ids[spread], probes, left)
        with progress("Probing every linear", probing.work) as advance:
            kl = kept(scratch / "sensitivity.json", lambda: probing.measure(advance))
        shutil.rmtree(probes)
        work = sum(ids.size for _, ids in texts) * config.num_hidden_layers
        with progress("Running the float model", work) as advance:
            read = [Text(name, ids, float_states(checkpoint, config, ids, advance)) for name, ids in texts]
        search = SchemeSearch(checkpoint, located, options, units, kl, (read[0], read[1]), scratch, command, progress)
        if max_kl is not None:
            best = search.within_kl(max_kl)
        else:
            assert max_bytes is not None
            best = search.within_bytes(max_bytes)
        rebuild = rebuild_command(search.options_of(best.choice), located.source, output / CHOICES_FILE)
        budget = f"KL of at most {max_kl:g}" if max_kl is not None else f"at most {megabytes(max_bytes or 0)}"
        tokens = read[1].token_ids.size
        report = AutoReport(located.name, units, kl, best, search.trials, budget, held_out, tokens, rebuild)
        engine = search.engine(best.choice, "Building the best again")
        files = {CHOICES_FILE: write_rules(search.rules(best.choice)), REPORT_FILE: to_html(report)}
        with engine_directory(output, replace) as new:
            for path in engine.iterdir():
                path.rename(new / path.name)
            add_parts(new, files)
    return report


def check_options(options: BuildOptions, config: ModelConfig, max_kl: float | None, max_bytes: int | None) -> None:
    """Refuse what contradicts ``--quant auto``.

    Raises:
        BuildError: names the option.
    """
    if (max_kl is None) == (max_bytes is None):
        found = "neither" if max_kl is None else "both"
        raise BuildError(f"--quant auto keeps to either --max-kl or --max-size, found {found}; give one")
    for name in ("group_size", "symmetric", "embedding_quant", "weight_scales", "activation_scales", "alpha"):
        if (value := getattr(options, name)) is not None:
            option = "--symmetric or --asymmetric" if name == "symmetric" else f"--{name.replace('_', '-')} {value}"
            raise BuildError(f"--quant auto makes the choice of {option} for each linear; leave it out")
    if config.packed is not None:
        raise BuildError(
            f"--quant auto has nothing to choose, the checkpoint is stored as {config.packed.method} "
            f"{config.packed.quant} already; leave it out or build from the float checkpoint"
        )


def candidates(options: BuildOptions) -> tuple[Scheme, ...]:
    """The schemes to choose from, float last."""
    chosen = [(quant, size, symmetric) for quant, symmetric in _CANDIDATES for size in GROUP_SIZES]
    return tuple(
        make_scheme(*one, kernels=options.kernels, activations=options.activations)
        for one in [*chosen, ("none", GROUP_SIZES[0], None)]
    )


def split_text(
    options: BuildOptions, directory: Path, config: ModelConfig, max_seq_len: int
) -> tuple[BuildOptions, np.ndarray, np.ndarray, str]:
    """The text to calibrate with, and other text to verify with, see :func:`qwen_build.calibration.text.read_halves`.

    Returns:
        The options of the engines, which calibrate with the former alone; both texts, token ids int64 (S, L); and what
        the latter is, in words.

    Raises:
        BuildError: the text is too short.
    """
    text = options.calibration
    sequences, held_out, words = read_halves(directory, config, text, options.calibration_tokens, _MEASURED)
    method = options.int4_method or _METHOD
    options = dataclasses.replace(options, int4_method=method)
    if method == "rtn":
        options = without_calibration(options)
    elif text is not None:
        options = dataclasses.replace(options, calibration_tokens=sequences.size)
    shortened = min(sequences.shape[1], max_seq_len)
    return options, sequences[:, :shortened], held_out[:, :shortened], words


def add_parts(engine: Path, files: Mapping[str, str]) -> None:
    """Make files of these names and texts parts of an engine."""
    for name, text in files.items():
        (engine / name).write_text(text, encoding="utf-8")
    manifest = Manifest.read(engine)
    parts = dict(manifest.parts) | {name: measure_part(engine / name) for name in files}
    manifest = dataclasses.replace(manifest, parts=dict(sorted(parts.items())))
    (engine / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
