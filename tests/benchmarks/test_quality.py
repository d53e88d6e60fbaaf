"""KL against bytes: fronts, the importance of inputs, errors by kind, and checkpoints in other coordinates."""

from __future__ import annotations

import doctest
import shlex
import sys

import numpy as np
import pytest

from benchmarks import quality_report, rotate
from benchmarks.quality import (
    MATRIX,
    OURS,
    TEXTS,
    TYPES,
    calibrates,
    errors_by_kind,
    input_importance,
    text_windows,
)
from benchmarks.quality_report import CALIBRATED, ROUNDED, error_lines, front_at, plot, table_lines
from benchmarks.texts import by_hash, library_documents
from cases.tiny import hf_logits
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.cli import main as qwen_build
from qwen_engine.errors import QwenError
from qwen_run.accuracy.datasets import Document, half_of
from qwen_run.text.tokenizer import Tokenizer

SCHEMES = [options for group in OURS.values() for options in group.values()]


@pytest.mark.parametrize("options", SCHEMES)
def test_qwen_build_knows_the_options(options):
    options = options.format_map(dict.fromkeys(OURS["rounded"], "9.50MB"))
    assert qwen_build.make_context("qwen-build", shlex.split(options)).params["quant"] in options


def test_what_reads_a_text_is_what_is_called_calibrated():
    assert {group: {calibrates(options) for options in own.values()} for group, own in OURS.items()} == {
        "rounded": {False}, "calibrated": {True},
    }  # fmt: skip


def test_examples_in_docstrings():
    for module in (quality_report, rotate):
        assert doctest.testmod(module).failed == 0


def test_families_and_types_are_those_of_the_report():
    assert [f"ours {group}" for group in OURS] == [ROUNDED, CALIBRATED]
    assert set(MATRIX) < set(TYPES)
    assert next(iter(TEXTS)) == "wikitext2"


def result(family, size, kl, errors=None):
    return {
        "family": family, "bytes": size, "errors": errors,
        "wikitext2": {"kl": (kl, kl, kl), "top1": (0.9, 0.9, 0.9)},
    }  # fmt: skip


def test_a_row_is_held_against_our_front_at_its_bytes():
    results = {
        "small": result(ROUNDED, 1e6, 0.1, {"q_proj": [0.01, 4.4]}),
        "worse": result(ROUNDED, 1.5e6, 0.2),
        "large": result(ROUNDED, 2e6, 0.001),
        "Q4": result("llama.cpp", 1.5e6, 0.02, {"q_proj": [0.02, 4.5]}),
    }
    rows = list(table_lines(["wikitext2"], results))
    assert rows[-1].split("|")[-3:-1] == [" 0.50 ", "  "]
    assert rows[2].split("|")[-3:-1] == ["  ", "  "]
    assert list(error_lines(results))[2:] == ["| small | 1.00e-02 at 4.40 |", "| Q4 | 2.00e-02 at 4.50 |"]
    assert "llama.cpp" in plot("wikitext2", results)
    assert front_at([(1, 0.1), (2, 0.01)], 3) is None


def test_windows_are_of_the_text(tiny_checkpoint, tmp_path):
    from cases.calibration import letter_tokenizer, letters

    letter_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    documents = [Document("a", letters(300, 1), None), Document("b", letters(300, 2), None)]
    windows = text_windows(tokenizer, documents, 3, 100)
    ids = tokenizer.encode(letters(300, 1)) + tokenizer.encode(letters(300, 2))
    np.testing.assert_array_equal(windows, np.array(ids).reshape(6, 100)[[0, 2, 5]])
    with pytest.raises(QwenError, match="6 windows of 100 tokens, not 7"):
        text_windows(tokenizer, documents, 7, 100)


def test_the_library_has_two_halves():
    halves = {half: library_documents(half) for half in ("calibration", "evaluation")}
    texts = [{one.document for one in half} for half in halves.values()]
    assert min(len(one) for one in texts) > 50
    assert not texts[0] & texts[1]
    assert by_hash(halves["evaluation"][::-1]) == by_hash(halves["evaluation"])
    assert half_of("x") in halves


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_importance_is_the_mean_square_of_what_a_matrix_reads(family, tiny_checkpoint):
    import torch

    tiny = tiny_checkpoint(family)
    config = ModelConfig.from_hf(tiny.path)
    sequences = np.random.default_rng(0).integers(config.vocab_size, size=(2, 50))
    found = input_importance(tiny.path, config, sequences)
    seen = {}
    down = tiny.model.model.layers[1].mlp.down_proj
    hook = down.register_forward_hook(lambda module, read, output: seen.update(x=read[0].detach().numpy()))
    with torch.no_grad():
        tiny.model(torch.tensor(sequences))
    hook.remove()
    expected = np.square(seen["x"]).reshape(-1, down.in_features).mean(axis=0)
    np.testing.assert_allclose(found["blk.1.ffn_down.weight"], expected, rtol=1e-3)


def test_errors_are_those_of_all_linears_of_a_kind(tiny_checkpoint):
    tiny = tiny_checkpoint("qwen2")
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    with Checkpoint.open(tiny.path) as checkpoint:
        weights = {name: checkpoint.read(f"{name}.weight") for name in names}
    stored = ((name, slice(0, len(weight)), 0.9 * weight) for name, weight in weights.items())
    found = errors_by_kind(tiny.path, stored, dict(zip(names, (4.0, 6.0), strict=True)))
    assert found == {"up_proj": [pytest.approx(0.01, rel=1e-4), pytest.approx(5.0)]}


@pytest.mark.parametrize("width", [None, 96])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2-tied"])
def test_a_rotated_checkpoint_computes_the_same(family, width, tiny_checkpoint, tmp_path, monkeypatch, build_engine):
    pytest.importorskip("safetensors")
    from cases.tiny import run_alone
    from qwen_run.runtime.engine import Engine

    tiny = tiny_checkpoint(family)
    turned = tmp_path / "turned"
    wider = ["--width", str(width)] if width else []
    monkeypatch.setattr(sys, "argv", ["rotate", str(tiny.path), str(turned), "--residual", "--values", *wider])
    rotate.main()
    token_ids = np.random.default_rng(0).integers(100, size=40).tolist()
    engine = Engine.load(build_engine(turned, quant="none"))
    np.testing.assert_allclose(run_alone(engine, token_ids), hf_logits(tiny.model, token_ids), rtol=1e-3, atol=1e-3)
