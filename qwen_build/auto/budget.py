"""A search for the best engine within a budget: what to try next, after what was tried."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qwen_build.auto.knapsack import cheapest
from qwen_build.auto.report import Trial, megabytes
from qwen_build.auto.sensitivity import Unit
from qwen_engine.errors import BuildError

# Engines that are built before the smallest within the budget is taken.
MOST_TRIALS = 6
# An engine with this share of its budget is not improved upon; a corrected budget aims at the second share.
_GOOD_ENOUGH, _AIM = 0.93, 0.97

# the index of the scheme of each unit
Choice = tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """What an engine turned out to be: see :class:`~qwen_build.auto.report.Trial`."""

    calibration_kl: float
    held_out_kl: float
    size_bytes: int


class Engines(Protocol):
    """The engines of a search."""

    def measure(self, choice: Choice, number: int) -> Measured:
        """Build and measure the engine of ``choice``, the ``number``-th that is tried."""

    def other_bytes(self, choice: Choice) -> int:
        """About what the engine of ``choice`` takes besides the stored bytes of its units, not less."""

    def remove(self, choice: Choice) -> None:
        """Give back the disk that the engine of ``choice`` takes; what it measured stays."""


@dataclass
class SchemeSearch:
    """A search over the schemes of all units.

    Attributes:
        kl: predicted of each unit and each of its schemes.
        trials: the engines that were tried.
    """

    units: Sequence[Unit]
    kl: Sequence[Sequence[float]]
    stored_bytes: Sequence[Sequence[int]]
    engines: Engines
    trials: list[Trial] = field(default_factory=list)

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
            if len(self.trials) >= MOST_TRIALS or choice is None or choice in [trial.choice for trial in self.trials]:
                if best is not None:
                    return best
                choice = most_accurate
            trial = self.trial(choice)
            if trial.kl <= max_kl:
                if best is None or trial.size_bytes < best.size_bytes:
                    best = trial
                low = max(low, trial.predicted_kl)
                if trial.kl >= _GOOD_ENOUGH * max_kl or not trial.predicted_kl:
                    self._remove_all_but(best)
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
        others = self.engines.other_bytes(smallest)
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

    def _most_accurate(self, allowed: Sequence[Sequence[int]], limit: int) -> Choice | None:
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

    def trial(self, choice: Choice) -> Trial:
        """Build and measure the engine of a choice."""
        measured = self.engines.measure(choice, len(self.trials) + 1)
        trial = Trial(
            choice, self._predicted(choice), measured.calibration_kl, measured.held_out_kl, measured.size_bytes
        )
        self.trials.append(trial)
        return trial

    def _remove_all_but(self, best: Trial | None) -> None:
        for trial in self.trials:
            if trial is not best:
                self.engines.remove(trial.choice)
