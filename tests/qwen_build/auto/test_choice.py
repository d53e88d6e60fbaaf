"""The choice of ``--quant auto``, held against every other one, and a search in what is predicted of engines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_build.auto import knapsack
from qwen_build.auto.budget import MOST_TRIALS, Measured, SchemeSearch
from qwen_build.auto.knapsack import cheapest
from qwen_build.auto.sensitivity import Unit
from qwen_build.quantization.scheme_table import make_scheme
from qwen_build.quantization.schemes import Scheme
from qwen_engine.errors import BuildError

numbers = st.integers(0, 50)


@st.composite
def problems(draw) -> tuple[list[list[int]], list[list[int]], int]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    costs, weights = ([draw(st.lists(numbers, min_size=n, max_size=n)) for n in sizes] for _ in range(2))
    return costs, weights, draw(st.integers(0, 150))


def sums(table: list[list[int]]) -> np.ndarray:
    """The sum of every choice there is."""
    return np.array([sum(choice) for choice in itertools.product(*table)])


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_choice_within_the_limit_is_cheaper(problem):
    costs, weights, limit = problem
    within = sums(weights) <= limit
    chosen = cheapest(costs, weights, limit)
    if chosen is None:
        assert not within.any()
        return
    assert sum(w[i] for w, i in zip(weights, chosen, strict=True)) <= limit
    # a step a unit is wasted at most, and whole numbers are further apart
    spare = limit - sum(map(min, weights))
    strictly = sums(weights) <= limit - len(weights) * spare / knapsack.STEPS
    assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= sums(costs)[strictly].min(initial=10**9)
    assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) >= sums(costs)[within].min()


def test_a_limit_that_is_met_exactly_is_used():
    rng = np.random.default_rng(2)
    for _ in range(20):
        costs, weights = (rng.integers(0, 64, (4, 3)).tolist() for _ in range(2))
        for row in weights:
            row[0] = 0
        chosen = cheapest(costs, weights, 128)  # weights are whole numbers of steps
        assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) == sums(costs)[sums(weights) <= 128].min()


def test_many_small_weights_do_not_add_up_to_more_than_the_limit():
    chosen = cheapest([[1, 0]] * 600, [[0, 1]] * 600, 400.5)
    assert 0.9 * 400 < sum(chosen) <= 400


def make_scheme_of(i: int) -> Scheme:
    return make_scheme(("int4", "int8")[i % 2], (32, 64, 128)[i // 2], True, None, "native")


class ScriptedEngines:
    """Engines that need not be built: their KLs are a power of what was predicted, and the texts differ."""

    def __init__(self, power: float, calibration: float, held_out: float):
        rng = np.random.default_rng(7)
        self.stored_bytes = np.sort(rng.integers(100, 10_000, (30, 5)), axis=1)[:, ::-1].tolist()
        kl = np.sort(rng.gamma(0.3, 1e-3, (30, 5)), axis=1)
        kl[:, 0] = 0
        self.kl = kl.tolist()
        self.power, self.calibration, self.held_out = power, calibration, held_out
        self.alike = 1.0  # what engines whose layers are stored alike have of the KL that others would
        self.kept: set[tuple[int, ...]] = set()

    def measure(self, choice: tuple[int, ...], number: int) -> Measured:
        self.kept.add(choice)
        predicted = sum(kl[i] for kl, i in zip(self.kl, choice, strict=True))
        size = sum(sizes[i] for sizes, i in zip(self.stored_bytes, choice, strict=True))
        actual = (predicted**self.power + 1e-7) * (self.alike if len(set(choice[1:])) == 1 else 1)
        return Measured(self.calibration * actual, self.held_out * actual, size + 5000)

    def other_bytes(self, choice: tuple[int, ...]) -> int:
        return 3000  # it guesses less than there will be

    def remove(self, choice: tuple[int, ...]) -> None:
        self.kept.discard(choice)

    def search(self) -> SchemeSearch:
        units = [Unit(str(i), i or None, (), (), tuple(map(make_scheme_of, range(5)))) for i in range(30)]
        return SchemeSearch(units, self.kl, self.stored_bytes, self)


factors = st.floats(0.1, 10)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.8, 1.25), factors, factors, st.sampled_from([1e-3, 1e-2, 0.1]))
def test_a_search_ends_close_below_its_budget_on_both_texts(power, calibration, held_out, max_kl):
    engines = ScriptedEngines(power, calibration, held_out)
    search = engines.search()
    best = search.within_kl(max_kl)
    assert max(best.calibration_kl, best.held_out_kl) <= max_kl
    assert len(search.trials) <= MOST_TRIALS + 1
    assert engines.kept <= {best.choice}  # no other engine takes disk
    beyond = [trial.size_bytes for trial in search.trials if trial.kl > max_kl]
    assert best.size_bytes == min(trial.size_bytes for trial in search.trials if trial.kl <= max_kl)
    assert all(best.size_bytes > size for size in beyond)
    smallest = sum(min(sizes) for sizes in search.stored_bytes) + 5000
    assert best.kl > 0.6 * max_kl or best.size_bytes == smallest


def test_a_kl_out_of_reach_is_told():
    search = ScriptedEngines(1, 1, 3).search()
    with pytest.raises(
        BuildError, match=r"--max-kl 1e-07 cannot be reached: .* MB, has a KL of 3e-07; allow that much"
    ):
        search.within_kl(1e-7)


def test_a_size_holds_for_what_was_written():
    search = ScriptedEngines(1, 1, 1).search()
    least, most = (sum(map(one, search.stored_bytes)) for one in (min, max))
    for size in (least + 5000, (least + most) // 2, most + 5000):
        assert 0.99 * size < search.within_bytes(size).size_bytes <= size
    with pytest.raises(BuildError, match=r"--max-size is 0\.1 MB, the smallest engine has 0\.1 MB"):
        search.within_bytes(least + 4999)


def test_layers_stored_alike_are_taken_where_they_measure_better():
    search = ScriptedEngines(1, 1, 1).search()
    size = sum(sizes[2] for sizes in search.stored_bytes) + 5000
    mixed = search.within_bytes(size)
    assert len(set(mixed.choice[1:])) > 1
    assert mixed.kl == min(trial.kl for trial in search.trials if trial.size_bytes <= size)
    engines = ScriptedEngines(1, 1, 1)
    engines.alike = 1e-3
    search = engines.search()
    best = search.within_bytes(size)
    assert set(best.choice[1:]) == {2}
    assert best.size_bytes <= size
    assert best.kl < mixed.kl
