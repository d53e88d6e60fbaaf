"""Tensors without a place in the graph: the harmless ones are named and passed over, others only if asked."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_build.checkpoint.safetensors_file import write_safetensors
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.graph.leftovers import HARMLESS, pass_over
from qwen_engine.errors import BuildError

ONE, ZERO = np.ones(2, np.float32), np.zeros(2, np.float32)


def left_over(directory, tensors, ignored=()):
    """What of ``tensors`` is passed over where the graph needs ``needed`` alone, and what is said."""
    write_safetensors(directory / "model.safetensors", {"needed": ONE, **tensors}, "float32")
    with Checkpoint.open(directory) as checkpoint:
        return pass_over({"needed"}, checkpoint, ignored)


@pytest.mark.parametrize("pattern", HARMLESS)
def test_harmless_tensors_are_named_and_passed_over(pattern, tmp_path):
    name = pattern.replace("*", "model.layers.0.self_attn.") if pattern.startswith("*") else pattern.replace("*", "x")
    passed, (note,) = left_over(tmp_path, {name: ONE})
    assert passed == {name}
    assert note == f"{name} is left out: {HARMLESS[pattern]}."


def test_a_bias_of_zeros_adds_nothing_and_another_does(tmp_path):
    tensors = {"lm_head.bias": ZERO, "model.layers.0.self_attn.o_proj.bias": np.array([0, 1e-30], np.float32)}
    passed, notes = left_over(tmp_path, tensors)
    assert passed == {"lm_head.bias"}
    assert notes == ("lm_head.bias is left out: biases of nothing but zeros.",)


def test_unknown_tensors_stay_unless_they_are_to_be_ignored(tmp_path):
    tensors = {"visual.patch.weight": ONE, "visual.norm.weight": ONE, "model.layers.9.mlp.up_proj.weight": ONE}
    assert left_over(tmp_path, tensors) == (frozenset(), ())
    passed, notes = left_over(tmp_path, tensors, ["visual.*"])
    assert passed == {"visual.patch.weight", "visual.norm.weight"}
    assert notes == ()


def test_patterns_must_match_something_that_nobody_needs(tmp_path):
    with pytest.raises(BuildError, match=r"'visuel\.\*' matches no tensor of the checkpoint; leave it out"):
        left_over(tmp_path, {"visual.norm.weight": ONE}, ["visuel.*"])
    with pytest.raises(BuildError, match=r"'\*' matches needed, which the graph needs"):
        left_over(tmp_path, {"visual.norm.weight": ONE}, ["*"])
