"""The benchmark of schemes: its options are ones of ``qwen-build``, and its figures those of the engines."""

from __future__ import annotations

import shlex

import numpy as np
import pytest

from benchmarks.scheme_report import family, is_same_grid, plot, table_lines
from benchmarks.schemes import GROUPS, Comparison, speeds, weight_error
from cases.tiny import hf_logits, run_alone
from qwen_build.cli import main as qwen_build
from qwen_run.accuracy.both_sides import following_tokens
from qwen_run.accuracy.logits import FullLogits, compare
from qwen_run.runtime.engine import Engine

SCHEMES = {name: options for group in GROUPS.values() for name, options in group.items()}


def test_every_scheme_has_a_name_and_options_of_its_own():
    others = {group: schemes for group, schemes in GROUPS.items() if group != "choice"}
    options = [one for schemes in others.values() for one in schemes.values()]
    assert len({name for schemes in others.values() for name in schemes}) == len(options) == len(set(options))
    assert len(set(GROUPS["choice"].values())) == len(GROUPS["choice"])
    assert all(SCHEMES[name] == one for schemes in GROUPS.values() for name, one in schemes.items())


@pytest.mark.parametrize("options", SCHEMES.values())
def test_qwen_build_knows_the_options(options):
    sizes = dict.fromkeys(SCHEMES, "100.00MB")
    context = qwen_build.make_context("qwen-build", shlex.split(options.format_map(sizes)))
    assert context.params["quant"] in options


@pytest.fixture(scope="module")
def measured(tiny_checkpoint, build_engine, tmp_path_factory):
    """A checkpoint, a way to build it, and what is measured of its engines on two windows of random tokens."""
    checkpoint = tiny_checkpoint("qwen2")
    windows = np.random.default_rng(0).integers(131, size=(2, 600))
    comparison = Comparison(
        build_engine(checkpoint.path, quant="none"), windows, [], 2, tmp_path_factory.mktemp("logits")
    )

    def measure(**options):
        directory = build_engine(checkpoint.path, **options)
        return comparison.measure(directory, []) | {
            "weight_error": weight_error(directory, checkpoint.path), "build_s": 1.0,
        }  # fmt: skip

    return checkpoint, windows, measure


def test_figures_are_those_of_both_sides_logits(measured, build_engine):
    checkpoint, windows, measure = measured
    found = measure(quant="int4")["metrics"]
    engine = Engine.load(build_engine(checkpoint.path, quant="int4"))
    expected = [
        compare(FullLogits(hf_logits(checkpoint.model, window)), run_alone(engine, window), following_tokens(window))
        for window in windows.tolist()
    ]
    kl = np.concatenate([positions.kl for positions in expected])
    log_likelihood = np.concatenate([positions.log_likelihood for positions in expected])
    # the reference is another float engine, whose sums have another order
    assert found["original.kl_mean"][0] == pytest.approx(kl.mean(), rel=1e-3)
    assert found["original.perplexity"][0] == pytest.approx(np.exp(-log_likelihood.mean()), rel=1e-6)


def test_weights_on_the_grid_are_told_from_rounded_ones(measured, build_engine):
    checkpoint, windows, measure = measured
    results = {"float32": measure(quant="none"), "int8 g32": measure(quant="int8"), "int4 g32": measure(quant="int4")}
    assert results["float32"]["weight_error"] == 0
    assert 1e-3 < results["int8 g32"]["weight_error"] < results["int4 g32"]["weight_error"] / 8
    assert not any(is_same_grid(*row) for row in results.items())
    results["int4 g32"]["weight_error"] = 2e-4
    assert is_same_grid("int4 g32", results["int4 g32"])
    engines = {"float32": build_engine(checkpoint.path, quant="none")}
    assert min(speeds(engines, windows[0], 2, rounds=2)["float32"]) > 0
    results["float32"]["speeds"] = (1000.0, 10.0)
    rows = list(table_lines(results))
    assert [row.split("|")[-4:-2] for row in rows[2:]] == [[" 1000 ", " 10.0 "], ["  ", "  "], ["  ", "  "]]
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["float32", "int8 g32", "int4 g32 *"]
    assert "int8" in plot(results)
    assert "int4" not in plot(results)


def test_series_of_the_plot():
    families = {family(name) for name in SCHEMES}
    assert {
        "float32",
        "int8",
        "smoothquant",
        "int4 rtn",
        "int4 awq",
        "int4 gptq",
        "int4 auto",
        "auto",
        "int5",
        "int6",
    } == families
