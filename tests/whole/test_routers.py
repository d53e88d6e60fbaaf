"""``qwen-summarize`` on mixtures of experts: healthy engines pass, and routers that choose otherwise show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from cases.chat_checkpoint import WORDS, write_chat_checkpoint
from qwen_run.accuracy.both_sides import equal_choices
from qwen_run.accuracy.metrics import router_agreement
from qwen_run.accuracy.report import Report
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.commands.summarize import main


@pytest.fixture(scope="module", params=["qwen2-moe", "qwen3-moe"])
def checkpoint(request, tmp_path_factory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", request.param).path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"document": " ".join(rng.choice(WORDS, 40))}) + "\n" for _ in range(6)))
    return path


def summarised(engine: Path, checkpoint: Path, dataset: Path, report: Path, *options: str) -> tuple[int, Report]:
    arguments = ["--engine", engine, "--checkpoint", checkpoint, "--dataset", dataset, "--report", report]
    arguments += ["--max-new-tokens", 4, "--threads", 1, "--no-cost", *options]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, Report.read(report / "report.json")


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_a_healthy_engine_passes_with_its_routers_in_the_report(quant, checkpoint, dataset, build_engine, tmp_path):
    engine = build_engine(checkpoint, quant=quant)
    least = {"none": 1.0, "int8": 0.9, "int4": 0.5}[quant]
    code, report = summarised(
        engine, checkpoint, dataset, tmp_path, "--threshold", f"router.same_experts>={least}",
        "--threshold", "as_built.kl_mean<=1e-5",
    )  # fmt: skip
    assert code == 0, report.verdicts
    assert all(check.passed for check in report.checks), report.checks
    assert [router.name for router in report.routers] == [f"model.layers.{layer}.mlp.gate" for layer in (1, 2)]
    metric = report.metric("router.same_experts")
    assert metric is not None
    assert metric.value == pytest.approx(np.mean([router.same_experts for router in report.routers]))
    assert (metric.value == 1) == (quant == "none")
    assert "Routers" in (tmp_path / "report.html").read_text()


def test_routers_of_another_model_fail(checkpoint, dataset, build_engine, tmp_path):
    """The gate reads weights by itself: one router's rows in another order are not the checkpoint's."""
    other = tmp_path / "other"
    other.mkdir()
    for path in checkpoint.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.2.mlp.gate.weight"] = tensors["model.layers.2.mlp.gate.weight"][::-1].copy()
    save_file(tensors, other / "model.safetensors")
    engine = build_engine(other, quant="none")
    check = compare_weights(engine, checkpoint)
    assert not check.passed
    assert "model.layers.2.mlp.gate.weight" in check.message


def test_sets_are_compared_whatever_their_order():
    ours, theirs = np.int32([[0, 1], [2, 1], [3, 0]]), np.int32([[1, 0], [1, 2], [3, 1]])
    other = {"a.gate.experts": ours, "a": np.zeros((3, 2))}, {"a.gate.experts": theirs, "a": np.ones((3, 2))}
    assert equal_choices(*other) == {"a.gate": 2}
    (metric,) = router_agreement([{"tokens": 4, "a": 3, "b": 4}, {"tokens": 2, "a": 1, "b": 2}])
    assert (metric.name, metric.value, metric.n) == ("router.same_experts", 10 / 12, 2)
    assert router_agreement([]) == []
