"""Each scheme alone: what it stores, what it gives back, and that ONNX Runtime reads it the same way."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnxscript import GraphBuilder

from qwen_build.quantization.grid import Grid
from qwen_build.quantization.scheme_table import KERNELS, SCHEMES, SchemeRow, make_scheme
from qwen_build.quantization.schemes import Float32, Fusion, NativeInt, StockInt, dequantize
from qwen_engine import choices
from qwen_engine.choices import WEIGHT_SCALES
from qwen_engine.errors import BuildError
from qwen_plugin import library_path
from qwen_plugin.layout import BITS, GATED_PANELS, GROUP_SIZES, PANEL
from qwen_run.engine_files.stored_rows import READERS, pack, unpack

GRIDS = [
    Grid(row.bits, group_size, symmetric)
    for row in SCHEMES.values()
    if row.bits
    for group_size in GROUP_SIZES
    for symmetric in (True, False)
]
STORES = [row.store(grid, "float32") for row in KERNELS.values() for grid in GRIDS if grid.bits in row.bits]


def name_of(scheme) -> str:
    record = scheme.record
    return f"{record.kernels}-{record.scheme}-g{record.group_size}-{'sym' if record.symmetric else 'asym'}"


every_scheme = pytest.mark.parametrize("scheme", [Float32(), *STORES], ids=name_of)
grouped = pytest.mark.parametrize("scheme", STORES, ids=name_of)
# in_features: multiples of all group sizes, of none, and smaller than a group
widths = pytest.mark.parametrize("in_features", [256, 200, 24])


def weight(shape=(48, 256), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@grouped
@widths
def test_error_is_at_most_half_a_step(scheme, in_features):
    if scheme.grid.bits < 8:
        pytest.skip("grids that are searched for clip, see test_scale_search.py")
    w = weight((48, in_features))
    grid = scheme.grid
    groups = np.pad(w, ((0, 0), (0, -in_features % grid.group_size))).reshape(48, -1, grid.group_size)
    if grid.symmetric:
        step = np.abs(groups).max(axis=-1) / (2 ** (grid.bits - 1) - 1)
    else:
        step = (groups.max(axis=-1).clip(min=0) - groups.min(axis=-1).clip(max=0)) / (2**grid.bits - 1)
    # an asymmetric grid is shifted by up to half a step so that zero lies on it
    bound = np.repeat(step, grid.group_size, axis=1)[:, :in_features] * (0.5 if grid.symmetric else 1)
    # a float16 scale is off by up to 2^-11, and so is what is multiplied with it
    slack = 2.0**-11 * (1 + np.abs(w) / bound) if isinstance(scheme, NativeInt) else 1e-5
    assert (np.abs(dequantize(scheme, scheme.quantize(w), w.shape) - w) <= bound * (1 + slack)).all()


@every_scheme
@widths
def test_stored_tensors_are_the_declared_ones(scheme, in_features):
    stored = {name: (t.shape, t.dtype) for name, t in scheme.quantize(weight((48, in_features))).items()}
    assert stored == {n: (p.shape, p.dtype.numpy()) for n, p in scheme.parts((48, in_features)).items()}
    assert sum(t.nbytes for t in scheme.quantize(weight((48, in_features))).values()) == sum(
        p.size_bytes for p in scheme.parts((48, in_features)).values()
    )


@every_scheme
@widths
def test_a_block_of_rows_is_stored_the_same_in_any_slice(scheme, in_features):
    rows, block = 4 * PANEL - 7, scheme.block_rows
    w = weight((rows, in_features))
    whole, slices = (
        scheme.quantize(w),
        [scheme.quantize(w[a:b]) for a, b in [(0, block), (block, 3 * block), (3 * block, rows)]],
    )
    for part, tensor in whole.items():
        assert np.array_equal(np.concatenate([s[part] for s in slices]), tensor)


@every_scheme
@widths
def test_zeros_and_exact_values_survive(scheme, in_features):
    w = weight((48, in_features))
    w[3] = 0
    w[5] *= 1e-38  # a scale this small has no finite reciprocal
    w[:, 7] = 0
    back = dequantize(scheme, scheme.quantize(w), w.shape)
    assert np.isfinite(back).all()
    assert not back[3].any()
    assert not back[:, 7].any()


@every_scheme
@widths
@pytest.mark.parametrize("bias", [False, True])
def test_runtime_multiplies_with_the_dequantised_weight(scheme, in_features, bias):
    w, x, b = weight((48, in_features)), weight((5, in_features), 1), weight((48,), 2)
    tensors = scheme.quantize(w)
    y = product(
        tensors, x, lambda op, x, values: multiply(scheme, op, x, values, values["bias"] if bias else None, w.shape), b
    )
    expected = x @ dequantize(scheme, tensors, w.shape).T + (b if bias else 0)
    # float32 sums of up to 256 products of standard normals, in another order
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@every_scheme
@widths
def test_runtime_looks_up_the_very_rows_it_multiplies_with(scheme, in_features):
    tensors, ids = scheme.quantize(weight((48, in_features))), np.array([47, 0, 5, 5])
    matrices = {name: t.reshape(len(t), -1) for name, t in tensors.items()}
    shape = 48, in_features
    rows = product(matrices, ids, lambda op, ids, values: scheme.lookup(op, ids, values, shape))
    assert np.array_equal(rows, dequantize(scheme, tensors, shape)[ids])


def multiply(scheme, op, x, values, bias, shape):
    return scheme.linear(op, x, values, bias, shape, Fusion())[0]


def product(tensors, x, build, bias=None):
    """One-node graph: ``build(op, x, initializers)`` run on ``x``."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1, "qwen": 1}, name="g")
    builder = GraphBuilder(graph)
    values = {n: builder.op.initializer(ir.tensor(t), n) for n, t in tensors.items()}
    if bias is not None:
        values["bias"] = builder.op.initializer(ir.tensor(bias), "bias")
    y = build(builder.op, builder.input("x", ir.tensor(x).dtype, list(x.shape)), values)
    y.type = ir.TensorType(ir.DataType.FLOAT)
    builder.add_output(y, "y")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString(), options)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("store", [StockInt, NativeInt])
def test_the_grids_by_hand(store):
    w = np.zeros((1, 32), np.float32)
    w[0, :3] = [7, -3.4, 0.6]
    symmetric = Grid(4, 32, True)
    assert symmetric.round(w).scales[0, 0] == 1  # 7 / 7
    scheme = store(symmetric, "int8")
    stored = scheme.store(symmetric.round(w, scheme.storable))
    assert dequantize(scheme, stored, w.shape)[0, :3].tolist() == [7, -3, 1]
    asymmetric = Grid(4, 32, False)
    w[0, :3] = [10, -5, 0.6]
    rounded = asymmetric.round(w)
    assert (rounded.scales[0, 0], rounded.zero_points[0, 0]) == (1, 5)  # 15 / 15, 5 / 1
    scheme = store(asymmetric, "int8")
    stored = scheme.store(asymmetric.round(w, scheme.storable))
    assert dequantize(scheme, stored, w.shape)[0, :3].tolist() == [10, -5, 1]


def test_q_belongs_to_the_scale_that_is_stored():
    """What is 126.4 steps of the exact scale is 126.6 of one that is smaller by 2^-9."""
    grid = Grid(8, 32, True)
    w = np.zeros((1, 32), np.float32)
    w[0, :2] = [127, 126.4]
    rounded = grid.round(w, lambda scales, zero_points: scales * np.float32(1 - 2**-9))
    assert rounded.q[0, 0, :2].tolist() == [128 + 127, 128 + 127]
    assert grid.round(w).q[0, 0, :2].tolist() == [128 + 127, 128 + 126]


def test_a_weight_beyond_the_scales_of_a_panel():
    largest = 65504 / 2**10 * 7  # float16's largest number, times 2^-10, is the largest scale
    w = np.zeros((40, 64), np.float32)
    w[3, 4] = largest
    scheme = make_scheme("int4", 32, True, "float32", "native")
    assert dequantize(scheme, scheme.quantize(w), w.shape)[3, 4] == pytest.approx(largest)
    w[3, 4] = 1.01 * largest
    with pytest.raises(OverflowError, match="is too large for the native layout"):
        scheme.quantize(w)


@pytest.mark.parametrize("bits", [4, 8])
def test_unpack_after_pack_is_the_identity(bits):
    q = np.random.default_rng(0).integers(0, 1 << bits, (3, 5, 64)).astype(np.uint8)
    assert np.array_equal(unpack(pack(q, bits), bits), q)


def test_who_has_zero_points_unless_asked():
    symmetric = {name: make_scheme(name, 32, None, None, "native").record.symmetric for name in SCHEMES}
    assert symmetric == {"none": True, "int8": True, "int6": False, "int5": False, "int4": False}
    assert not make_scheme("int8", 32, False, None, "native").record.symmetric


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_record_says_how_a_weight_is_stored_and_multiplied(kernels):
    for activations in KERNELS[kernels].activations:
        record = make_scheme("int4", 64, True, activations, kernels).record
        assert (record.scheme, record.bits, record.group_size, record.symmetric) == ("int4", 4, 64, True)
        assert (record.activations, record.kernels) == (activations, kernels)
        assert record.layout == {"native": "panels32", "stock": "rows"}[kernels]


def test_the_choices_are_the_tables():
    assert set(choices.QUANTS) == set(SCHEMES)
    assert set(choices.KERNELS) == set(KERNELS)
    assert choices.GROUP_SIZES == GROUP_SIZES
    assert set(choices.ACTIVATIONS) == {name for row in KERNELS.values() for name in row.activations}


def test_every_layout_can_be_read_back():
    assert {scheme.record.layout for scheme in STORES} | {GATED_PANELS} == set(READERS)


def test_a_row_makes_the_scheme_of_its_name(monkeypatch):
    """One that has nothing to do with grids, too."""
    rows = []
    monkeypatch.setitem(SCHEMES, "other", SchemeRow(0, True, "", lambda *asked: rows.append(asked) or Float32()))
    assert make_scheme("other", 64, None, "int8x2", "native", "group", "token") == Float32()
    ((row, asked),) = rows
    assert row is SCHEMES["other"]
    assert (asked.group_size, asked.activations, asked.activation_scales) == (64, "int8x2", "token")
    assert asked.kernels is KERNELS["native"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3", 32, True, "int8", "native"), "--quant int3 is not one of none, int8, int6, int5, int4"),
        (("int4", 48, True, "int8", "native"), "--group-size 48 is not one of 32, 64, 128"),
        (("int4", 32, True, "int8", "cuda"), "--kernels cuda is not one of native, stock"),
        (("int4", 32, True, "bf16", "native"), "native has no --activations bf16; choose int8 or int8x2 or float32"),
        (("int5", 32, True, "int8", "stock"), "--kernels stock has no weights of 5 bits; use --kernels native"),
        (("int4", 32, True, "int8x2", "stock"), "--kernels stock has no --activations int8x2; choose int8 or float32"),
    ],
)
def test_unknown_choices_are_refused(arguments, message):
    with pytest.raises(BuildError, match=message):
        make_scheme(*arguments)


# ---- Scales that groups share


def test_the_scales_of_an_output_or_of_a_weight_by_hand():
    w = np.zeros((3, 40), np.float32)
    w[:, 0] = [7, 3.5, 0]
    w[0, 39] = 14
    scales = {kind: Grid(4, 32, True, kind).round(w).scales.tolist() for kind in WEIGHT_SCALES}
    assert scales["group"] == [[1, 2], [0.5, 1], [1, 1]]  # 1 where all is 0
    assert scales["channel"] == [[2, 2], [0.5, 0.5], [1, 1]]
    assert scales["tensor"] == [[2, 2], [2, 2], [2, 2]]


@pytest.mark.parametrize("kind", ["channel", "tensor"])
@pytest.mark.parametrize("bits", BITS)
@widths
def test_a_shared_scale_is_stored_and_read_back(bits, kind, in_features):
    w = weight((48, in_features)) * np.geomspace(0.01, 1, 48, dtype=np.float32)[:, None]
    scheme = NativeInt(Grid(bits, 32, True, kind), "float32", "group")
    back = dequantize(scheme, scheme.quantize(w), w.shape)
    largest = np.abs(w).max(axis=1, keepdims=True) if kind == "channel" else np.abs(w).max()
    step = largest / (2 ** (bits - 1) - 1)
    # half a step, and a float16 scale is off by up to 2^-11
    assert np.all(np.abs(back - w) <= step * 0.5 + 2.0**-11 * np.abs(w) + 2.0**-11 * step)
    x = weight((5, in_features), 1)
    y = product(scheme.quantize(w), x, lambda op, x, values: multiply(scheme, op, x, values, None, w.shape))
    np.testing.assert_allclose(y, x @ back.T, rtol=1e-4, atol=1e-4)  # float32 sums in another order


def test_a_block_of_rows_has_the_scales_of_its_channels_in_any_slice():
    w = weight((4 * PANEL - 7, 200))
    scheme = NativeInt(Grid(8, 64, True, "channel"), "int8")
    whole = scheme.quantize(w)["panels"]
    slices = [scheme.quantize(w[a:b])["panels"] for a, b in [(0, PANEL), (PANEL, 4 * PANEL - 7)]]
    assert np.array_equal(np.concatenate(slices), whole)


def test_shared_scales_make_the_grid_symmetric():
    assert make_scheme("int4", 32, None, None, "native", "channel").record.symmetric
    record = make_scheme("int8", 32, None, "int8x2", "native", "tensor", "token").record
    assert (record.weight_scales, record.activation_scales) == ("tensor", "token")
    assert record.words == "int8 per tensor symmetric x int8x2 per token, native"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int8", 32, None, None, "native", "row"), "--weight-scales row is not one of group, channel, tensor"),
        (("int8", 32, None, None, "native", "group", "row"), "--activation-scales row is not one of group, block, t"),
        (("int8", 32, False, None, "native", "channel"), "--weight-scales channel goes with symmetric grids only"),
        (("int8", 32, None, None, "stock", "channel"), "--kernels stock has no --weight-scales channel"),
        (("int8", 32, None, None, "stock", "group", "token"), "--kernels stock has no --activation-scales token"),
        (("int8", 32, None, "float32", "native", "group", "token"), "--activations float32 has no --activation-scales"),
        (
            ("int8", 32, None, None, "native", "group", "block"),
            "--activation-scales block goes with less than 8 bits in",
        ),
        (
            ("int4", 128, None, None, "native", "group", "block"),
            "found int4 in groups of 128 and a scale for each group",
        ),
        (("int4", 32, None, "float32", "native", "group", "block"), "--activations float32 has no --activation-scales"),
        (
            ("int4", 32, None, None, "native", "channel", "block"),
            "found int4 in groups of 32 and a scale for each channel",
        ),
    ],
)
def test_scales_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(BuildError, match=message):
        make_scheme(*arguments)


def test_less_than_8_bits_in_groups_of_32_and_64_have_scales_for_blocks():
    found = {
        (name, size, activations): make_scheme(name, size, None, activations, "native").record.activation_scales
        for name, size, activations in [
            ("int4", 32, None), ("int4", 64, "int8"), ("int4", 128, None), ("int4", 32, "int8x2"),
            ("int4", 32, "float32"), ("int8", 32, None), ("int5", 32, None), ("int6", 64, None), ("int6", 128, None),
        ]
    }  # fmt: skip
    blocks = [key for key, scales in found.items() if scales == "block"]
    assert blocks == [
        *[("int4", 32, None), ("int4", 64, "int8"), ("int4", 32, "int8x2")],
        *[("int5", 32, None), ("int6", 64, None)],
    ]
    assert set(found.values()) == {"block", "group"}
    assert make_scheme("int4", 64, None, None, "native", "group", "group").record.activation_scales == "group"
    assert make_scheme("int4", 32, None, None, "native", "group", "group").record.activation_scales == "group"
    assert make_scheme("int4", 32, None, None, "stock").record.activation_scales == "group"
