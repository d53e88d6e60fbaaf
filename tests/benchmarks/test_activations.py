"""The benchmark of activations: its distances are those of the logits it is given."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks import activations
from benchmarks.activations import Distance, distance, table_lines
from benchmarks.command import run

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(3, 2, (5, 40)).astype(np.float32)
FOLLOWING = RNG.integers(40, size=5)


def test_a_constant_added_to_a_position_is_no_distance():
    found = distance([(LOGITS, LOGITS + np.arange(5, dtype=np.float32)[:, None], FOLLOWING)])
    assert found.distance < 1e-6
    assert abs(found.kl) < 1e-12


def test_distance_is_relative_and_over_all_chunks():
    centred = LOGITS - LOGITS.mean(-1, keepdims=True)
    chunks = [(LOGITS[:2], LOGITS[:2] + 0.25 * centred[:2]), (LOGITS[2:], LOGITS[2:] - 0.25 * centred[2:])]
    found = distance((*chunk, FOLLOWING[: len(chunk[0])]) for chunk in chunks)
    assert found.distance == pytest.approx(0.25, rel=1e-5)
    assert found.kl > 0


def test_a_row_of_the_table_has_the_ratio_of_int8x2_and_float32():
    found = {"int8": Distance(0.06, 1e-2), "int8x2": Distance(6e-4, 2e-6), "float32": Distance(5e-4, 1e-6)}
    *_, row = table_lines({"int4": {"float16": found}})
    assert row == "| int4 | float16 | 6.00e-02 | 6.00e-04 | 5.00e-04 | 1.00e-02 | 2.00e-06 | 1.00e-06 | 1.2 × |"


@pytest.mark.slow
def test_the_report_orders_what_rounds_more_and_less(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Through the command, on a tiny random model."""
    checkpoint = tiny_checkpoint("qwen2-tied").path
    monkeypatch.setattr(activations, "held_out_windows", lambda *_: RNG.integers(131, size=(2, 60)))
    monkeypatch.setattr(activations.Tokenizer, "load", lambda _: None)
    command = ["int8", "--checkpoint", str(checkpoint), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["activations", *command])
    activations.main()
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| int8 |")]
    distances = {cells[1]: [float(cell) for cell in cells[2:5]] for cells in table}
    assert list(distances) == ["float16", "int8", "float32"]
    for int8, int8x2, _ in distances.values():
        assert int8 > int8x2
    assert distances["float32"][2] < 1e-5  # sums in another order
    assert distances["float32"][1] < distances["float16"][1] < distances["int8"][1]


def test_unknown_weights_are_refused(capsys):
    with pytest.raises(SystemExit):
        activations.parse_arguments(["int5"])
    assert "no weights int5; choose from int4, int8" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["activations", "--checkpoint", "/nowhere"])
    with pytest.raises(SystemExit, match=r"^Error: no such directory: '/nowhere'; give a Hugging Face directory"):
        run(activations.main)
