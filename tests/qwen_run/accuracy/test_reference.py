"""Hugging Face as the reference: the checkpoint as it is, rounded as an engine rounds it, one sub-block at a time."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper
from onnxscript import GraphBuilder

from cases.as_built import MIXED, as_built, layer_outputs, relative_errors
from cases.packed import CASES
from cases.processes import run_python
from cases.tiny import FAMILIES, hf_logits, run_alone
from qwen_build.quantization.scheme_table import KERNELS, make_scheme
from qwen_build.quantization.schemes import Fusion, Scheme, dequantize
from qwen_engine.errors import CheckpointError, EngineError
from qwen_engine.manifest import GRAPH_FILE, MANIFEST_FILE, WEIGHTS_FILE, Manifest
from qwen_plugin import library_path
from qwen_plugin.layout import GROUP_SIZES
from qwen_run.accuracy.recipe import Recipe
from qwen_run.accuracy.reference import CHUNK_TOKENS, HuggingFace
from qwen_run.accuracy.rounded_inputs import ROUNDING_STEPS, round_activations
from qwen_run.engine_files.float_activations import with_float_activations
from qwen_run.runtime.engine import Engine

TOKENS = np.random.default_rng(5).integers(0, 131, 2 * CHUNK_TOKENS + 7).tolist()

every_family = pytest.mark.parametrize("family", FAMILIES)


def joined(chunks) -> np.ndarray:
    return np.concatenate([chunk.values for chunk in chunks])


def all_logits(reference: HuggingFace, token_ids: list[int]) -> np.ndarray:
    return joined(reference.logits(token_ids))


@every_family
def test_the_original_is_what_transformers_says(family, tiny_checkpoint):
    checkpoint = tiny_checkpoint(family)
    chunks = list(HuggingFace(checkpoint.path, 1).logits(TOKENS))
    assert [len(chunk) for chunk in chunks] == [CHUNK_TOKENS, CHUNK_TOKENS, 7]
    # the same program; only the head's product is cut in chunks
    np.testing.assert_allclose(joined(chunks), checkpoint.logits(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_checkpoint_computes_in_float32(dtype, tiny_checkpoint):
    checkpoint = tiny_checkpoint("qwen3", dtype)
    logits = all_logits(HuggingFace(checkpoint.path, 1), TOKENS[:9])
    np.testing.assert_allclose(logits, checkpoint.logits(TOKENS[:9]), rtol=1e-5, atol=1e-5)


def test_greedy_continuation_is_that_of_generate(tiny_checkpoint):
    checkpoint = tiny_checkpoint("qwen2")
    expected = checkpoint.model.generate(
        torch.tensor([TOKENS[:20]]), attention_mask=torch.ones(1, 20), max_new_tokens=12, do_sample=False
    )[0, 20:].tolist()
    reference = HuggingFace(checkpoint.path, 1)
    assert reference.continuation(TOKENS[:20], 12, frozenset()) == expected
    assert list(reference.stream(TOKENS[:20], 3, frozenset())) == expected[:3]


def test_a_stop_token_is_the_last(tiny_checkpoint):
    reference = HuggingFace(tiny_checkpoint("qwen2").path, 1)
    free = reference.continuation(TOKENS[:20], 12, frozenset())
    stop = next(token for token in free if token != free[0])
    assert reference.continuation(TOKENS[:20], 12, {stop}) == free[: free.index(stop) + 1]


def model_of(node: onnx.NodeProto) -> bytes:
    return helper.make_model(helper.make_graph([node], "one node", [], [])).SerializeToString()


def product(scheme: Scheme, weight: np.ndarray) -> tuple[bytes, np.ndarray]:
    """A graph that multiplies with a quantised weight, and what that weight dequantises to."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1, "qwen": 1}, name="product")
    builder = GraphBuilder(graph)
    tensors = scheme.quantize(weight)
    values = {name: builder.op.initializer(ir.tensor(tensor), name) for name, tensor in tensors.items()}
    x = builder.input("x", ir.DataType.FLOAT, [None, weight.shape[1]])
    y, _ = scheme.linear(builder.op, x, values, None, weight.shape, Fusion())
    y.type = ir.TensorType(ir.DataType.FLOAT)
    builder.add_output(y, "y")
    model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    return model, dequantize(scheme, tensors, weight.shape)


def run_graph(model: bytes, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(model, options).run(None, {"x": x})[0]


ROUNDING = [(kernels, name) for kernels, row in KERNELS.items() for name in row.activations if name in ROUNDING_STEPS]


@pytest.mark.parametrize(("kernels", "activations"), ROUNDING)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("rows", [1, 40])
def test_activations_are_rounded_as_the_operator_rounds_them(kernels, activations, bits, group_size, rows):
    """Inputs at and beside the middle between two steps, where every other way to round gives other numbers."""
    rng = np.random.default_rng(bits * group_size + rows)
    features, most = 2 * group_size + 16, ROUNDING_STEPS[activations]  # the last group is shorter
    weight = rng.standard_normal((48, features)).astype(np.float32)
    largest = rng.uniform(0.01, 5, (rows, 1)).astype(np.float32)
    steps = rng.integers(1 - most, most - 1, (rows, features)) + 0.5
    x = (steps * (largest.astype(np.float64) / most)).astype(np.float32)
    x[:, ::group_size] = largest
    x[0, :group_size] = 0

    model, dequantised = product(make_scheme(f"int{bits}", group_size, False, activations, kernels), weight)
    rounded = round_activations(torch, torch.tensor(x), group_size, most).numpy()
    exact = rounded.astype(np.float64) @ dequantised.astype(np.float64).T
    error = np.linalg.norm(run_graph(model, x) - exact) / np.linalg.norm(exact)
    # float32 sums; without rounding 5e-3 (int8x2: 2e-5), with ties away from 0 or by division a few times less
    assert error < 1e-6


@pytest.mark.parametrize(("kernels", "activations"), ROUNDING)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_graph_can_be_told_not_to_round_activations(kernels, activations, bits):
    rng = np.random.default_rng(bits)
    scheme = make_scheme(f"int{bits}", 32, False, activations, kernels)
    model, dequantised = product(scheme, rng.standard_normal((16, 64)).astype(np.float32))
    x = rng.standard_normal((5, 64)).astype(np.float32)
    exact = x.astype(np.float64) @ dequantised.astype(np.float64).T
    exact_size = np.abs(exact).max()
    assert np.abs(run_graph(model, x) - exact).max() > exact_size / ROUNDING_STEPS[activations] / 10
    assert np.abs(run_graph(with_float_activations(model), x) - exact).max() < 1e-6 * exact_size


@every_family
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_as_built_is_the_engine_to_float_precision(family, quant, symmetric, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint(family)
    options = {"quant": quant, "symmetric": symmetric, "kv_cache_dtype": "float32", "activations": "float32"}
    directory = build_engine(checkpoint.path, **options)
    logits = run_alone(Engine.load(directory, threads=1), TOKENS)
    # the tolerance of the parity tests: the same weights, sums in another order
    np.testing.assert_allclose(all_logits(as_built(checkpoint, directory), TOKENS), logits, rtol=3e-4, atol=3e-4)


EXACT = {"kv_cache_dtype": "float32", "activations": "float32"}


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3"])
@pytest.mark.parametrize("mixed", MIXED)
def test_as_built_is_a_mixed_engine_to_float_precision(mixed, family, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint(family)
    directory = build_engine(checkpoint.path, **MIXED[mixed], **EXACT)
    logits = run_alone(Engine.load(directory, threads=1), TOKENS)
    np.testing.assert_allclose(all_logits(as_built(checkpoint, directory), TOKENS), logits, rtol=3e-4, atol=3e-4)


PACKED = [CASES[0], *(case for case in CASES if case.order), CASES[-5]]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_weights_are_both_references(case, kernels, pack, build_engine):
    packed = pack(case)
    directory = build_engine(packed.path, kernels=kernels, embedding_quant="int8", **EXACT)
    logits = run_alone(Engine.load(directory, threads=1), TOKENS)
    np.testing.assert_allclose(all_logits(as_built(packed, directory), TOKENS), logits, rtol=3e-4, atol=3e-4)
    original = all_logits(HuggingFace(packed.path, 1), TOKENS)
    # the same program with the same weights; only the head's product is cut in chunks
    np.testing.assert_allclose(original, hf_logits(packed.model, TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
def test_activations_are_rounded_in_the_order_of_the_groups(kernels, pack, build_engine):
    packed = pack(next(case for case in CASES if case.order))
    directory = build_engine(packed.path, kernels=kernels, activations="int8", kv_cache_dtype="float32")
    found = layer_outputs(directory, TOKENS[:60])
    isolated = relative_errors(found, as_built(packed, directory).hidden_outputs(TOKENS[:60], found, given=found))
    # measured 7e-7 at most, see also below; rounded in the model's own order, half of them are 3e-3 to 1.4e-2
    assert np.median(list(isolated.values())) < 1e-6
    assert max(isolated.values()) < 2e-3


@pytest.mark.parametrize("quant", ["none", "int8"])
@pytest.mark.parametrize("kv_cache_dtype", ["float16", "int8"])
def test_as_built_rounds_keys_and_values(quant, kv_cache_dtype, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint("qwen2")
    directory = build_engine(checkpoint.path, quant=quant, kv_cache_dtype=kv_cache_dtype, activations="float32")
    logits = run_alone(Engine.load(directory, threads=1), TOKENS)

    def distance(recipe: Recipe) -> float:
        return float(np.abs(all_logits(HuggingFace(checkpoint.path, 1, recipe), TOKENS) - logits).mean())

    recipe = Recipe.read(directory)
    # a key on the edge between two steps still falls on either side; most do not
    assert distance(recipe) < 0.3 * distance(replace(recipe, cache_dtype="float32"))


def test_a_tied_head_is_rounded_once_and_the_file_stays_as_it_is(tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint("qwen2-tied")
    weights = checkpoint.path / "model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).digest()
    model = as_built(checkpoint, build_engine(checkpoint.path, quant="int4", embedding_quant="int4"))._model
    scheme = make_scheme("int4", 32, False, None, "native")
    embedding = checkpoint.model.model.embed_tokens.weight.detach().numpy()
    once = dequantize(scheme, scheme.quantize(embedding), embedding.shape)
    assert np.array_equal(model.model.embed_tokens.weight.detach().numpy(), once)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert hashlib.sha256(weights.read_bytes()).digest() == before


def test_the_digest_of_a_recipe_tells_engines_apart(tiny_checkpoint, build_engine):
    path = tiny_checkpoint("qwen2").path
    options = [{"quant": "int8"}, {"quant": "int4"}, {"quant": "int4", "symmetric": True}, {"quant": "none"}]
    options += [{"quant": "int8", "kv_cache_dtype": "float32"}, {"quant": "int8", "activations": "float32"}]
    recipes = [Recipe.read(build_engine(path, **option)) for option in options]
    assert len({recipe.digest for recipe in recipes}) == len(recipes)
    assert recipes[0].with_float_activations().digest == recipes[-1].digest


def test_the_digest_tells_calibrated_weights_apart(tiny_checkpoint, build_engine, tmp_path):
    manifest = Manifest.read(build_engine(tiny_checkpoint("qwen2").path, quant="int4"))

    def digest(weights_sha256: str, output_error: float | None) -> str:
        parts = {**manifest.parts, WEIGHTS_FILE: replace(manifest.parts[WEIGHTS_FILE], sha256=weights_sha256)}
        linears = (replace(manifest.linears[0], output_error=output_error), *manifest.linears[1:])
        (tmp_path / MANIFEST_FILE).write_text(replace(manifest, parts=parts, linears=linears).to_json())
        return Recipe.read(tmp_path).digest

    assert digest("aa", 0.1) != digest("bb", 0.1)
    assert digest("aa", None) == digest("bb", None)  # the checkpoint decides them


@every_family
def test_hidden_outputs_are_those_of_the_layers_graph(family, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint(family)
    found = layer_outputs(build_engine(checkpoint.path, quant="none"), TOKENS[:60])
    errors = relative_errors(found, HuggingFace(checkpoint.path, 1).hidden_outputs(TOKENS[:60], found))
    assert max(errors.values()) < 1e-5


@every_family
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_one_sub_block_at_a_time_rounded_activations_agree_too(family, quant, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint(family)
    directory = build_engine(checkpoint.path, quant=quant, kv_cache_dtype="float32")
    found, reference = layer_outputs(directory, TOKENS[:60]), as_built(checkpoint, directory)
    isolated = relative_errors(found, reference.hidden_outputs(TOKENS[:60], found, given=found))
    running = relative_errors(found, reference.hidden_outputs(TOKENS[:60], found))
    assert np.median(list(isolated.values())) < 1e-6
    assert max(isolated.values()) < 2e-3  # one input in the middle between two steps, in one small sub-block
    assert max(isolated.values()) <= max(running.values())


@pytest.mark.parametrize("fault", ["model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj", "model.norm"])
def test_a_faulty_sub_block_stands_out_alone(fault, tiny_checkpoint, build_engine):
    """Weights 5 % too large, under the noise of int4 and rounded activations."""
    checkpoint = tiny_checkpoint("qwen2")
    directory = build_engine(checkpoint.path, quant="int4")
    reference = as_built(checkpoint, directory)
    with torch.no_grad():
        reference._model.get_submodule(fault).weight *= 1.05
    found = layer_outputs(directory, TOKENS[:60])
    errors = relative_errors(found, reference.hidden_outputs(TOKENS[:60], found, given=found))
    worst = fault.removesuffix(".down_proj").removesuffix(".o_proj")
    assert errors.pop(worst) == pytest.approx(0.05 / 1.05, rel=0.05)
    assert max(errors.values()) < 5e-3


def test_what_transformers_cannot_load_is_an_error_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(CheckpointError, match="transformers cannot load") as refusal:
        HuggingFace(tmp_path, 1)
    assert "\n" not in str(refusal.value)


def test_loading_says_nothing_on_stderr(tiny_checkpoint):
    script = (
        "import sys; from pathlib import Path; from qwen_run.accuracy.reference import HuggingFace; "
        "print(len(HuggingFace(Path(sys.argv[1]), 1).continuation([1, 2, 3], 4, frozenset())))"
    )
    done = run_python(script, tiny_checkpoint("qwen2-tied", "bfloat16", True).path)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("4", "", 0)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_only_the_precision_of_products_is_changed(kernels, activations, tiny_checkpoint, build_engine):
    options = {"quant": "int4", "kernels": kernels, "activations": activations}
    graph = (build_engine(tiny_checkpoint("qwen2").path, **options) / GRAPH_FILE).read_bytes()
    expected = onnx.load_from_string(graph)
    changed = 0
    for node in expected.graph.node:
        for attribute in node.attribute:
            if (node.op_type, attribute.name) == ("MatMulNBits", "accuracy_level"):
                attribute.i, changed = 1, changed + 1
            if (node.op_type, attribute.name) == ("QuantLinear", "precision"):
                attribute.s, changed = b"float32", changed + 1
    assert changed == 3 * 4 + 1
    assert onnx.load_from_string(with_float_activations(graph)) == expected


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (b"not a graph", "is not ONNX"),
        (model_of(helper.make_node("QuantLinear", ["x"], ["y"], precision="int3")), "in an unknown way"),
        (model_of(helper.make_node("MatMulNBits", ["x"], ["y"], accuracy_level=2)), "in an unknown way"),
        (model_of(helper.make_node("QuantLinear", ["x"], ["y"], precision="int8"))[:-9], "is not ONNX"),
    ],
)
def test_a_graph_whose_precision_cannot_be_changed(graph, message):
    with pytest.raises(EngineError, match=message):
        with_float_activations(graph)
