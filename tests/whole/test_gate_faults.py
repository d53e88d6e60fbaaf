"""The gate finds planted faults in engines of every kind: the small form of ``benchmarks/gate_faults.py``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from benchmarks.gate_faults import HARMLESS, complaints, judge
from benchmarks.gate_models import build_engine, make_checkpoint
from benchmarks.plant_faults import FILE_FAULTS, KERNEL_FAULTS, OF_ROUNDED_INPUTS, plant, wrong_kernel
from qwen_run.accuracy.weight_checks import compare_weights

pytestmark = pytest.mark.timeout(600)

# Faults that the comparison of the weights cannot see, and what sees them.
ELSEWHERE = {
    "epsilon a tenth": "as_built.kl_mean",
    "template lacks a newline": "chat template",
    "positions off by one from 512 on": "full length",
    "positions off by one from 600 on": "full length",
}
# What names a wrong kernel, of those that name it.
NAMED = {
    "steps of 1 token rolled by 7": "token by token",
    "steps of 2 to 7 tokens noisy": "in pieces",
    "steps of 2 sequences or more 0": "beside others",
    "pieces of odd length noisy": "in pieces",
    "texts after cached blocks noisy": "from cached blocks",
    "logits from position 600 on x 1.02": "full length",
    "int8 kernels x 1.1": "rounding.kl_ratio",
    "int8 kernels noisy": "rounding.kl_ratio",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint("tiny", 0, tmp_path_factory.mktemp("gate") / "checkpoint")


@pytest.fixture(scope="module")
def engine_of(checkpoint, tmp_path_factory) -> Callable[[str], Path]:
    @cache
    def build(scheme: str) -> Path:
        calibration = {"calibration_tokens": 1024} if scheme in ("gptq", "awq", "smoothquant") else {}
        return build_engine(checkpoint, scheme, tmp_path_factory.mktemp("engines") / scheme, **calibration)

    return build


@pytest.fixture(scope="module")
def reference_of(checkpoint, engine_of, tmp_path_factory) -> Callable[[str], Path]:
    """The saved reference of a healthy engine, which passes."""

    @cache
    def save(scheme: str) -> Path:
        directory = tmp_path_factory.mktemp("reports") / scheme
        assert complaints(judge(engine_of(scheme), checkpoint, directory)) == []
        return directory / "reference.npz"

    return save


@pytest.mark.parametrize("scheme", ["none", "int8", "smoothquant", "gptq", "awq"])
def test_the_comparison_of_weights_names_every_fault_of_them(scheme, checkpoint, engine_of, tmp_path):
    assert compare_weights(engine_of(scheme), checkpoint).passed
    missed = []
    for fault in FILE_FAULTS.keys() - ELSEWHERE.keys() - {*HARMLESS}:
        copy = Path(shutil.copytree(engine_of(scheme), tmp_path / "engine"))
        plant(fault, copy)
        if compare_weights(copy, checkpoint).passed:
            missed.append(fault)
        shutil.rmtree(copy)
    assert missed == []


@pytest.mark.parametrize("fault", ELSEWHERE)
def test_faults_of_graph_and_text_are_named(fault, checkpoint, engine_of, tmp_path):
    copy = Path(shutil.copytree(engine_of("int8"), tmp_path / "engine"))
    plant(fault, copy)
    assert compare_weights(copy, checkpoint).passed
    assert ELSEWHERE[fault] in complaints(judge(copy, checkpoint, tmp_path / "report"))


@pytest.mark.parametrize("scheme", ["none", "int8"])
@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_wrong_kernels_are_named(fault, scheme, checkpoint, engine_of, reference_of, tmp_path):
    if fault in OF_ROUNDED_INPUTS and scheme == "none":
        pytest.skip("rounds no inputs")
    reference = reference_of(scheme)
    with wrong_kernel(KERNEL_FAULTS[fault]):
        found = complaints(judge(engine_of(scheme), checkpoint, tmp_path / "report", reference))
    assert NAMED[fault] in found
