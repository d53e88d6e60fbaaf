"""What rounding one unit costs: probes against transformers, schemes that were not run, and going on after a stop."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest

from cases.tiny import DENSE, hf_logits
from qwen_build.auto.sensitivity import Probing, decision_units, kl_divergence, output_error, rounded
from qwen_build.calibration.factor_search import as_multiplied
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build
from qwen_build.graph.layers import SchemeChoice
from qwen_build.plan.options import BuildOptions
from qwen_build.quantization.scheme_table import make_scheme
from qwen_run.accuracy.logits import FullLogits, compare

PROBE = make_scheme("int4", 64, False, "float32", "native")
TOKENS = np.random.default_rng(3).integers(0, 131, (2, 40))


def test_kl_is_that_of_the_reports():
    rng = np.random.default_rng(1)
    reference = rng.normal(0, 3, (5, 131)).astype(np.float32)
    others = reference + rng.normal(0, 1, (3, 5, 131)).astype(np.float32) * np.float32([[[1]], [[0.1]], [[1e-3]]])
    expected = [compare(FullLogits(reference), other, np.full(5, -1)).kl for other in others]
    np.testing.assert_allclose(kl_divergence(reference, others), np.transpose(expected), rtol=1e-7)
    assert kl_divergence(reference, reference[None] + 7).max() < 1e-12  # float32 rounds the sum


@pytest.mark.parametrize("family", DENSE)
def test_units_are_the_weights_of_the_graph(family, tiny_checkpoint):
    path = tiny_checkpoint(family).path
    config = ModelConfig.from_hf(path)
    scheme = make_scheme("int4", 64, True, None, "native")
    units = decision_units(config, {}, (scheme,))
    with Checkpoint.open(path) as checkpoint:
        options = BuildOptions(quant="int4", group_size=64, symmetric=True, embedding_quant="int4")
        plan = plan_build(checkpoint, resolve_checkpoint(str(path)), options)
    stored = {linear.name: linear.stored_bytes for linear in plan.linears}
    if config.tie_word_embeddings:
        del stored["lm_head"]
    assert {unit.name: unit.stored_bytes(scheme) for unit in units} == stored
    names = [linear for unit in units for linear in unit.linears]
    assert len(names) == len(set(names)) == 3 * 7 + 2


def test_what_is_decided_stands_alone(tiny_checkpoint):
    config = ModelConfig.from_hf(tiny_checkpoint("qwen2-tied").path)
    float_, schemes = make_scheme("none", 32, None, None, "native"), (PROBE, PROBE)
    fixed = {"model.layers.1.self_attn.k_proj": SchemeChoice(float_), "lm_head": SchemeChoice(float_)}
    units = {unit.name: unit for unit in decision_units(config, fixed, schemes)}
    assert units["lm_head"].schemes == units["model.layers.1.self_attn.k_proj"].schemes == (float_,)
    assert units["model.embed_tokens"].linears == ("model.embed_tokens",)
    assert units["model.layers.1.self_attn.q_proj"].schemes == schemes
    assert "model.layers.1.self_attn.qkv_proj" not in units
    assert units["model.layers.0.self_attn.qkv_proj"].schemes == schemes


def probing(path: Path, checkpoint: Checkpoint, scratch: Path, schemes=(PROBE,)) -> Probing:
    config = ModelConfig.from_hf(path)
    return Probing(checkpoint, config, decision_units(config, {}, schemes), PROBE, TOKENS, scratch)


@pytest.mark.parametrize("family", DENSE)
def test_a_probe_is_the_kl_of_one_altered_unit(family, tiny_checkpoint, tmp_path):
    import torch

    tiny = tiny_checkpoint(family)
    with Checkpoint.open(tiny.path) as checkpoint:
        measured = probing(tiny.path, checkpoint, tmp_path)
        found = {unit.name: kl for unit, (kl,) in zip(measured.units, measured.measure(), strict=True)}
    exact = [tiny.logits(ids) for ids in TOKENS]
    for unit in measured.units:
        expected = 0.0
        for part in [[linear] for linear in unit.linears] if unit.layer is None else [unit.linears]:
            model = copy.deepcopy(tiny.model)
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # no longer tied
            for linear in part:
                weight = model.get_submodule(linear).weight
                weight.data = torch.tensor(rounded(PROBE, weight.detach().numpy()))
            pairs = [(one, hf_logits(model, ids)) for one, ids in zip(exact, TOKENS, strict=True)]
            expected += float(np.mean([kl_divergence(one, other[None]) for one, other in pairs]))
        assert found[unit.name] == pytest.approx(expected, rel=2e-3), unit.name  # float32 sums in another order


def test_schemes_that_were_not_run_follow_from_their_output_errors(tiny_checkpoint, tmp_path):
    """Against probes of those schemes: the quadratic term alone is not the whole, but it puts them in order."""
    path = tiny_checkpoint("qwen2").path
    others = [make_scheme("int4", 32, False, "float32", "native"), make_scheme("int8", 64, None, "float32", "native")]
    with Checkpoint.open(path) as checkpoint:
        measured = probing(path, checkpoint, tmp_path, (*others, make_scheme("none", 32, None, None, "native")))
        (tmp_path / "probes").mkdir()
        measured.scratch = tmp_path / "probes"
        predicted = np.array(measured.measure())
        for i, scheme in enumerate(others):
            (tmp_path / str(i)).mkdir()
            measured.probe, measured.scratch = scheme, tmp_path / str(i)
            run = np.array(measured.measure())[:, i]
            np.testing.assert_allclose(predicted[:, i], run, rtol=0.6)
            assert predicted[:, i].sum() == pytest.approx(run.sum(), rel=0.2)
    assert not predicted[:, 2].any()


def test_rounding_the_input_counts():
    rng = np.random.default_rng(5)
    weight, inputs = (rng.normal(size=(n, 64)).astype(np.float32) for n in (48, 30))
    exact, coarse = (make_scheme("int8", 32, None, precision, "native") for precision in ("float32", "int8"))
    assert output_error(coarse, weight, inputs) > 1.5 * output_error(exact, weight, inputs) > 0
    # an error spread evenly over a step s is s^2 / 12; int8 steps are 1/127 of a group's largest, about 2.1 for 32
    assert output_error(exact, weight, inputs) == pytest.approx((2.1 / 127) ** 2 / 12, rel=0.3)
    assert output_error(make_scheme("none", 32, None, None, "native"), weight, inputs) == 0
    # calibration improves weights alone; what both add is the error of the product as the engine computes it
    assert output_error(exact, weight, inputs, left=0.25) == pytest.approx(output_error(exact, weight, inputs) / 4)
    assert output_error(coarse, weight, inputs, left=0.25) > 0.5 * output_error(coarse, weight, inputs)
    product = as_multiplied(inputs, np.abs(inputs).max(axis=0), coarse) @ rounded(coarse, weight).T
    expected = np.square(product - inputs @ weight.T).sum() / np.square(inputs @ weight.T).sum()
    assert output_error(coarse, weight, inputs) == pytest.approx(expected, rel=0.1)


def test_a_measurement_goes_on_where_it_stopped(tiny_checkpoint, tmp_path):
    path, whole = tiny_checkpoint("qwen3").path, tmp_path / "whole"
    whole.mkdir()
    with Checkpoint.open(path) as checkpoint:
        reference = probing(path, checkpoint, whole)
        done: list[int] = []
        expected = reference.measure(done.append)
        assert sum(done) == reference.work
        for stop in range(len(done)):
            scratch = tmp_path / str(stop)
            scratch.mkdir()
            calls = itertools.count()

            def interrupt(_: int, calls=calls, stop=stop) -> None:
                if next(calls) == stop:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                probing(path, checkpoint, scratch).measure(interrupt)
            kept = {file.name: file.stat().st_mtime_ns for file in scratch.iterdir()}
            assert probing(path, checkpoint, scratch).measure() == expected
            rewritten = {file.name for file in scratch.iterdir() if kept.get(file.name) != file.stat().st_mtime_ns}
            assert not rewritten & kept.keys()
