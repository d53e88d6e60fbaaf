"""Each scheme alone: what it stores, what it gives back, and that ONNX Runtime reads it the same way."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnxscript import GraphBuilder

from qwen_build.cli import ACTIVATIONS, QUANTS
from qwen_build.cli import GROUP_SIZES as GROUP_SIZE_CHOICES
from qwen_build.quantize import ACCURACY_LEVELS, GROUP_SIZES, SCHEMES, GroupwiseInt, make_scheme, pack, unpack
from qwen_engine.errors import BuildError

ALL = [
    make_scheme(name, group_size, symmetric, "float32")
    for name in SCHEMES
    for group_size in (GROUP_SIZES if SCHEMES[name].bits else GROUP_SIZES[:1])
    for symmetric in ((True, False) if SCHEMES[name].bits else (True,))
]
every_scheme = pytest.mark.parametrize("scheme", ALL, ids=str)
grouped = pytest.mark.parametrize("scheme", [s for s in ALL if isinstance(s, GroupwiseInt)], ids=str)
# in_features: multiples of all group sizes, of none, and smaller than a group
widths = pytest.mark.parametrize("in_features", [256, 200, 24])


def weight(shape=(48, 256), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@grouped
@widths
def test_error_is_at_most_half_a_step(scheme, in_features):
    w = weight((48, in_features))
    tensors = scheme.quantize(w)
    half_step = np.repeat(tensors["scales"] / 2, scheme.group_size, axis=1)[:, :in_features]
    # an asymmetric grid is shifted by up to half a step so that zero lies on it
    bound = half_step * (1 if scheme.symmetric else 2)
    assert (np.abs(scheme.dequantize(tensors, in_features) - w) <= bound * (1 + 1e-5)).all()


@every_scheme
@widths
def test_stored_tensors_are_the_declared_ones(scheme, in_features):
    stored = {name: (t.shape, t.dtype) for name, t in scheme.quantize(weight((48, in_features))).items()}
    assert stored == {n: (p.shape, p.dtype.numpy()) for n, p in scheme.parts(48, in_features).items()}
    assert sum(t.nbytes for t in scheme.quantize(weight((48, in_features))).values()) == sum(
        p.size_bytes for p in scheme.parts(48, in_features).values()
    )


@every_scheme
@widths
def test_a_row_is_stored_the_same_in_any_slice(scheme, in_features):
    w = weight((48, in_features))
    whole, slices = scheme.quantize(w), [scheme.quantize(w[a:b]) for a, b in [(0, 1), (1, 30), (30, 48)]]
    for part, tensor in whole.items():
        assert np.array_equal(np.concatenate([s[part] for s in slices]), tensor)


@every_scheme
@widths
def test_zeros_and_exact_values_survive(scheme, in_features):
    w = weight((48, in_features))
    w[3] = 0
    w[5] *= 1e-38  # a scale this small has no finite reciprocal
    w[:, 7] = 0
    back = scheme.dequantize(scheme.quantize(w), in_features)
    assert np.isfinite(back).all()
    assert not back[3].any()
    assert not back[:, 7].any()


@every_scheme
@widths
@pytest.mark.parametrize("bias", [False, True])
def test_runtime_multiplies_with_the_dequantised_weight(scheme, in_features, bias):
    w, x, b = weight((48, in_features)), weight((5, in_features), 1), weight((48,), 2)
    tensors = scheme.quantize(w)
    y = run(
        tensors, x, lambda op, x, values: scheme.linear(op, x, values, values["bias"] if bias else None, in_features), b
    )
    expected = x @ scheme.dequantize(tensors, in_features).T + (b if bias else 0)
    # float32 sums of up to 256 products of standard normals, in another order
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@every_scheme
@widths
def test_runtime_looks_up_the_very_rows_it_multiplies_with(scheme, in_features):
    tensors, ids = scheme.quantize(weight((48, in_features))), np.array([47, 0, 5, 5])
    matrices = {name: t.reshape(len(t), -1) for name, t in tensors.items()}
    rows = run(matrices, ids, lambda op, ids, values: scheme.lookup(op, ids, values, in_features))
    assert np.array_equal(rows, scheme.dequantize(tensors, in_features)[ids])


def run(tensors, x, build, bias=None):
    """One-node graph: ``build(op, x, initializers)`` run on ``x``."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1}, name="g")
    builder = GraphBuilder(graph)
    values = {n: builder.op.initializer(ir.tensor(t), n) for n, t in tensors.items()}
    if bias is not None:
        values["bias"] = builder.op.initializer(ir.tensor(bias), "bias")
    y = build(builder.op, builder.input("x", ir.tensor(x).dtype, list(x.shape)), values)
    y.type = ir.TensorType(ir.DataType.FLOAT)
    builder.add_output(y, "y")
    session = onnxruntime.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString())
    return session.run(None, {"x": x})[0]


def test_the_grids_by_hand():
    w = np.zeros((1, 32), np.float32)
    w[0, :3] = [7, -3.4, 0.6]
    symmetric = GroupwiseInt(4, 32, True, "int8")
    assert symmetric.quantize(w)["scales"][0, 0] == 1  # 7 / 7
    assert symmetric.dequantize(symmetric.quantize(w), 32)[0, :3].tolist() == [7, -3, 1]
    asymmetric = GroupwiseInt(4, 32, False, "int8")
    w[0, :3] = [10, -5, 0.6]
    tensors = asymmetric.quantize(w)
    assert (tensors["scales"][0, 0], tensors["zero_points"][0, 0]) == (1, 5)  # 15 / 15, 5 / 1
    assert asymmetric.dequantize(tensors, 32)[0, :3].tolist() == [10, -5, 1]


@pytest.mark.parametrize("bits", [4, 8])
def test_unpack_after_pack_is_the_identity(bits):
    q = np.random.default_rng(0).integers(0, 1 << bits, (3, 5, 64)).astype(np.uint8)
    assert np.array_equal(unpack(pack(q, bits), bits), q)


def test_only_int4_has_zero_points_unless_asked():
    symmetric = {name: make_scheme(name, 32, None, "int8").record.symmetric for name in SCHEMES}
    assert symmetric == {"none": True, "int8": True, "int4": False}
    assert not make_scheme("int8", 32, False, "int8").record.symmetric


def test_the_command_line_offers_the_tables():
    assert set(QUANTS) == set(SCHEMES)
    assert tuple(map(int, GROUP_SIZE_CHOICES)) == GROUP_SIZES
    assert set(ACTIVATIONS) == set(ACCURACY_LEVELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3", 32, True, "int8"), "--quant int3 is not one of none, int8, int4"),
        (("int4", 48, True, "int8"), "--group-size 48 is not one of 32, 64, 128"),
        (("int4", 32, True, "bf16"), "--activations bf16 is not one of int8, float32"),
    ],
)
def test_unknown_choices_are_refused(arguments, message):
    with pytest.raises(BuildError, match=message):
        make_scheme(*arguments)
