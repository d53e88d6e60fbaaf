"""Engines of mixtures of experts compute what ``transformers`` computes, whichever experts are asked for."""

from __future__ import annotations

import numpy as np
import pytest

from cases.as_built import as_built, layer_outputs, relative_errors
from cases.experts import fused, loaded, lopsided, rewritten
from cases.quantization import dequantised
from cases.tiny import FAMILIES, MIXTURES, hf_logits, run_alone, run_chunks
from qwen_build.plan.options import MIXES
from qwen_build.quantization.scheme_table import make_scheme
from qwen_engine.errors import CheckpointError
from qwen_engine.graph_io import CHOSEN
from qwen_engine.manifest import LAYERS_GRAPH_FILE, WEIGHTS_FILE, Manifest
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.runtime.engine import Engine

RNG = np.random.default_rng(17)
TOKENS = RNG.integers(0, 131, 90).tolist()
SEQUENCES = [RNG.integers(0, 131, length).tolist() for length in (*[7] * 14, 40, 1)]
MIXED = {name: family for name, family in (FAMILIES | MIXTURES).items() if "num_experts" in family}
every_mixture = pytest.mark.parametrize("family", MIXED)


@every_mixture
def test_float_engine_equals_transformers(family, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint(family)
    engine = Engine.load(build_engine(checkpoint.path, quant="none"), threads=2)
    # float32 sums in another order: 1e-4 of logits that reach 10 and more
    np.testing.assert_allclose(run_alone(engine, TOKENS), checkpoint.logits(TOKENS), rtol=1e-4, atol=1e-4)


@every_mixture
@pytest.mark.parametrize("quant", ["none", "int4"])
def test_both_forms_of_a_checkpoint_give_the_same_bytes(family, quant, tiny_checkpoint, build_engine, tmp_path):
    path = tiny_checkpoint(family).path
    engines = build_engine(path, quant=quant), build_engine(rewritten(path, tmp_path / "fused", fused), quant=quant)
    weights = [(engine / WEIGHTS_FILE).read_bytes() for engine in engines]
    assert weights[0] == weights[1]
    for engine, checkpoint in (engines, (path, tmp_path / "fused")), (engines[::-1], (path, tmp_path / "fused")):
        assert compare_weights(engine[0], checkpoint[0]).passed
        assert compare_weights(engine[0], checkpoint[1]).passed


@pytest.mark.parametrize("quant", ["int8", "int4", "int5", "int6", "int4-mixed"])
@every_mixture
def test_quantised_engine_equals_transformers_with_the_dequantised_weights(
    family, quant, tiny_checkpoint, build_engine
):
    checkpoint = tiny_checkpoint(family)
    options = {"quant": quant, "activations": "float32", "kv_cache_dtype": "float32"}
    directory = build_engine(checkpoint.path, **options)
    assert compare_weights(directory, checkpoint.path).passed
    # the same weights on both sides: what is left is float32 rounding, a little more than unquantised
    expected = as_built(checkpoint, directory)
    logits = np.concatenate([chunk.values for chunk in expected.logits(TOKENS)])
    np.testing.assert_allclose(run_alone(Engine.load(directory, 1), TOKENS), logits, rtol=3e-4, atol=3e-4)
    if quant not in MIXES:  # the reference reads the engine; that what it reads is right is seen without it
        scheme, head = (make_scheme(name, 32, None, "float32", "native") for name in (quant, "int8"))
        model = dequantised(checkpoint.model, scheme, head)
        np.testing.assert_allclose(logits, hf_logits(model, TOKENS), rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("quant", ["int8", "int4", "int5", "int6", "int4-mixed"])
@every_mixture
def test_every_part_rounds_as_it_is_recorded(family, quant, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint(family)
    directory = build_engine(checkpoint.path, quant=quant, kv_cache_dtype="float32")
    found = layer_outputs(directory, TOKENS)
    expected = as_built(checkpoint, directory).hidden_outputs(TOKENS, found, given=found)
    routed = [name for name in found if name.endswith(CHOSEN)]
    sparse = sum(record.name.endswith("experts.down_proj") for record in Manifest.read(directory).linears)
    assert len(routed) == sparse > 0
    for name in routed:
        assert (np.sort(found[name]) == np.sort(expected[name])).mean() > 0.99  # but for two that are equally likely
    errors = relative_errors(
        {name: value for name, value in found.items() if name not in routed},
        {name: value for name, value in expected.items() if name not in routed},
    )
    assert np.median(list(errors.values())) < 1e-6
    assert max(errors.values()) < 5e-3  # one input in the middle between two steps, in one small sub-block


@pytest.mark.parametrize("quant", ["none", "int8", "int4", "int5", "int6", "int4-mixed"])
@pytest.mark.parametrize("family", [name for name in MIXED if name != "experts-unbiased"])
def test_bits_depend_on_nothing_but_the_sequence(family, quant, tiny_checkpoint, build_engine):
    """Alone, sixteen at once, token by token, in pieces, with one, two and four threads, and in the layers graph."""
    directory = build_engine(tiny_checkpoint(family).path, quant=quant)
    alone = [run_alone(Engine.load(directory, threads=1), sequence) for sequence in SEQUENCES]
    rest = [[6] * 14 + [0, 0], *([[0] * 14 + [13, 0]] * 3)]
    schedules = [
        [list(map(len, SEQUENCES))],
        [[1] * 14 + [1, 1], *rest],
        [[1] * 14 + [40, 1], *([[1] * 14 + [0, 0]] * 6)],
    ]
    same = np.testing.assert_array_equal
    if quant == "none":  # the stock float32 product sums in another order for one row than for several

        def same(found, expected):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    for threads in (1, 2, 4):
        engine = Engine.load(directory, threads=threads)
        for schedule in schedules:
            for expected, found in zip(alone, run_chunks(engine, SEQUENCES, schedule), strict=True):
                same(found, expected)
    layers = Engine.load(directory, threads=2, graph=LAYERS_GRAPH_FILE)
    same(run_alone(layers, SEQUENCES[14]), alone[14])


@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe", "experts-many"])
def test_an_expert_with_all_tokens_and_one_with_none(family, tiny_checkpoint, build_engine, tmp_path):
    checkpoint = loaded(rewritten(tiny_checkpoint(family).path, tmp_path / "lopsided", lopsided))
    directory = build_engine(checkpoint.path, quant="none")
    for name, chosen in layer_outputs(directory, TOKENS).items():
        if name.endswith(CHOSEN):
            assert (chosen == 0).any(axis=1).all(), name
            assert not (chosen == MIXED[family]["num_experts"] - 1).any(), name
    found = run_alone(Engine.load(directory, threads=2), TOKENS)
    np.testing.assert_allclose(found, checkpoint.logits(TOKENS), rtol=1e-4, atol=1e-4)
    rounded = build_engine(checkpoint.path, quant="int4")
    one, two = Engine.load(rounded, threads=1), Engine.load(rounded, threads=2)
    pieces, _ = run_chunks(two, [TOKENS, SEQUENCES[14]], [[1, 0], [60, 39], *([[1, 1]]), [28, 0]])
    assert np.array_equal(pieces, run_alone(one, TOKENS))


def test_an_expert_that_panels_cannot_hold_is_named_and_can_stay_float(tiny_checkpoint, build_engine, tmp_path):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"

    def enlarged(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][5, 7] = 1e6
        return tensors

    path = rewritten(tiny_checkpoint("qwen3-moe").path, tmp_path / "large", enlarged)
    with pytest.raises(
        CheckpointError, match=r"experts\.3\.down_proj\.weight: .*use --exclude '\*\.mlp\.experts\.\*'$"
    ):
        build_engine(path, quant="int4")
    manifest = Manifest.read(build_engine(path, quant="int4", exclude=("*.mlp.experts.*",)))
    assert {one.quantization.bits for one in manifest.linears if ".mlp.experts." in one.name} == {32}
