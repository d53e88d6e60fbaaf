"""``qwen-inspect``: the linears, the tree of the graph, the pictures, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from cases.quantization import ROUTERS
from cases.tiny import FAMILIES
from qwen_engine.errors import EngineError
from qwen_engine.manifest import GRAPH_FILE, LAYERS_GRAPH_FILE, MANIFEST_FILE, WEIGHTS_FILE, Manifest
from qwen_run.commands.inspect import main
from qwen_run.engine_files.onnx_file import OnnxGraph, read_graph
from qwen_run.inspection.graph import GraphBlock, GraphOperator, draw_lines, folded, tree
from qwen_run.inspection.linears import draw_bits, linear_rows, totals
from qwen_run.runtime.stage import Stage


def inspect(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def engine(tiny_checkpoint, build_engine, tmp_path) -> Path:
    """A copy of an engine that a test may damage."""
    import shutil

    return Path(shutil.copytree(build_engine(tiny_checkpoint("qwen2").path), tmp_path / "engine"))


def test_every_linear_is_listed_with_its_bits(tiny_checkpoint, build_engine):
    directory = build_engine(tiny_checkpoint("qwen2-tied").path, group_size=64, exclude=("*.1.mlp.down_proj",))
    manifest = Manifest.read(directory)
    rows = {row.name: row for row in linear_rows(manifest)}
    assert list(rows) == [linear.name for linear in manifest.linears]
    assert rows["model.layers.1.mlp.down_proj"].scheme == "float32"
    assert rows["model.layers.1.mlp.down_proj"].bits_per_weight == 32
    # 80 inputs are a block of two groups of 64, 80 outputs three panels of 32: 4 bits, 16 of a unit, and 4 of a
    # multiple and of a zero point a group
    expected = (128 * 4 + 16 + 2 * 8) * 96
    stored = 8 * rows["model.layers.0.self_attn.o_proj"].stored_bytes
    assert stored == expected
    assert rows["lm_head"].shared


def test_the_engine_may_be_named_as_in_the_other_commands(engine):
    assert inspect("--engine", engine).output == inspect(engine).output
    both = inspect(engine, "--engine", engine)
    assert (both.exit_code, "ENGINE and --engine are the same; give one" in both.output) == (2, True)


def test_totals_count_a_shared_head_once_and_leave_nothing_out(tiny_checkpoint, build_engine):
    for family in FAMILIES:
        checkpoint = tiny_checkpoint(family)
        manifest = Manifest.read(build_engine(checkpoint.path))
        whole = totals(manifest, linear_rows(manifest))
        assert whole.stored_bytes + whole.other_bytes == manifest.parts[WEIGHTS_FILE].size_bytes
        assert whole.other_bytes > 0
        parameters = checkpoint.model.named_parameters()
        expected = [weight for name, weight in parameters if weight.dim() > 1 and not name.endswith(ROUTERS)]
        assert whole.weights == sum(weight.numel() for weight in expected)


def test_the_table_has_a_row_for_each_linear_and_the_totals(engine):
    result = inspect(engine)
    assert result.exit_code == 0, result.output
    for linear in Manifest.read(engine).linears:
        assert f"{linear.name} " in result.stdout
    assert "int4 g32 asymmetric x int8 per block, native" in result.stdout
    assert "bits a weight" in result.stdout
    assert result.stdout.count("MiB") == 4  # the column, both totals, and what a token reads
    assert " error" not in result.stdout
    data = json.loads(inspect(engine, "--json").stdout)
    assert [row["name"] for row in data["linears"]] == [linear.name for linear in Manifest.read(engine).linears]


def test_method_scales_and_error_of_a_calibrated_linear_are_shown(engine):
    manifest = Manifest.read(engine)
    first, *others = manifest.linears
    smoothed = dataclasses.replace(
        first.quantization, scheme="int8", method="smoothquant", weight_scales="channel", activation_scales="static"
    )
    first = dataclasses.replace(first, quantization=smoothed, output_error=0.0125)
    (engine / MANIFEST_FILE).write_text(dataclasses.replace(manifest, linears=(first, *others)).to_json())
    line = next(line for line in inspect(engine).stdout.splitlines() if line.startswith(f"{first.name} "))
    for words in ("smoothquant", "per channel", "static", "1.25%"):
        assert words in line
    row = json.loads(inspect(engine, "--json").stdout)["linears"][0]
    assert row["output_error"] == 0.0125
    assert row["quantization"] == dataclasses.asdict(smoothed)
    assert "output error 1.25%" in draw_bits("", linear_rows(Manifest.read(engine)))


@pytest.mark.parametrize("name", [GRAPH_FILE, LAYERS_GRAPH_FILE])
@pytest.mark.parametrize("options", [{}, {"kernels": "stock"}, {"quant": "none"}, {"exclude": ("*.k_proj",)}], ids=str)
def test_a_graph_is_read_as_onnx_reads_it(name, options, tiny_checkpoint, build_engine):
    path = build_engine(tiny_checkpoint("qwen3").path, **options) / name
    expected = onnx.load(path, load_external_data=False).graph
    graph = read_graph(path)
    assert [node.op_type for node in graph.nodes] == [node.op_type for node in expected.node]
    for node, wanted in zip(graph.nodes, expected.node, strict=True):
        assert (node.name, node.domain) == (wanted.name, wanted.domain)
        assert (node.inputs, node.outputs) == (tuple(wanted.input), tuple(wanted.output))
        values = {a.name: onnx.helper.get_attribute_value(a) for a in wanted.attribute}
        assert node.attributes == {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}
    for tensor in expected.initializer:
        found = graph.initializers[tensor.name]
        assert found.shape == tuple(tensor.dims)
        assert found.dtype == np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).name
    assert len(graph.initializers) == len(expected.initializer)


def operators(block: GraphBlock) -> list[GraphOperator]:
    nested = (operators(child) if isinstance(child, GraphBlock) else [child] for child in block.children)
    return [operator for group in nested for operator in group]


@pytest.mark.parametrize("options", [{}, {"kernels": "stock"}, {"quant": "none"}, {"exclude": ("*.k_proj",)}], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3-tied"])
def test_the_tree_holds_every_operator_where_it_belongs_with_its_shapes(family, options, tiny_checkpoint, build_engine):
    directory = build_engine(tiny_checkpoint(family).path, **options)
    graph, sizes = read_graph(directory / GRAPH_FILE), Manifest.read(directory).model
    root = tree(graph, "tiny")
    assert [operator.op_type for operator in operators(root)] == [node.op_type for node in graph.nodes]
    model, head = root.children[0], root.children[-1]
    layers = [child for child in model.children if getattr(child, "name", "").startswith("layers.")]
    assert [child.name for child in layers] == ["layers.0", "layers.1", "layers.2"]
    for layer in layers:
        attention, mlp = layer.children
        assert (attention.name, mlp.name) == ("self_attn", "mlp")
        queries, keys = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
        (attended,) = [one for one in operators(attention) if one.op_type == "PagedAttention"]
        assert (attended.in_features, attended.out_features) == (queries + 2 * keys, queries)
        assert operators(attention)[-1].out_features == operators(mlp)[-1].out_features == sizes.hidden_size
    assert operators(head)[-1].out_features == sizes.vocab_size


@pytest.mark.parametrize("name", [GRAPH_FILE, LAYERS_GRAPH_FILE])
@pytest.mark.parametrize("options", [{}, {"kernels": "stock"}, {"exclude": ("*.up_proj",)}], ids=str)
def test_what_goes_into_a_product_is_as_wide_as_its_rows(name, options, tiny_checkpoint, build_engine):
    graph = read_graph(build_engine(tiny_checkpoint("qwen3").path, **options) / name)
    products = [one for one in operators(tree(graph, "tiny")) if "K" in one.attributes and one.in_features]
    assert len(products) >= 12  # of three layers four each
    assert [one.in_features for one in products] == [one.attributes["K"] for one in products]


def test_layers_that_are_alike_are_one_and_others_are_not(tiny_checkpoint, build_engine):
    path = tiny_checkpoint("qwen2").path
    alike, apart = (
        folded(tree(read_graph(build_engine(path, **options) / GRAPH_FILE), "tiny"))
        for options in ({}, {"exclude": ("*.1.mlp.down_proj",)})
    )
    assert "│  ├─ layers.0 … layers.2, 3 alike" in draw_lines(alike)
    assert [line for line in draw_lines(apart) if "layers." in line and "─ layers." in line] == [
        "│  ├─ layers.0",
        "│  ├─ layers.1",
        "│  ├─ layers.2",
    ]


def test_lines_show_what_is_in_what():
    operator = GraphOperator("Add", None, None, (), {})
    block = GraphBlock("m", [GraphBlock("a", [operator, operator]), GraphBlock("b", [operator])])
    assert draw_lines(block) == ["m", "├─ a", "│  ├─ Add", "│  └─ Add", "└─ b", "   └─ Add"]


def test_an_operator_of_another_making_has_no_features():
    assert operators(tree(OnnxGraph((), {}), "empty")) == []


def test_the_pictures_are_svg_with_a_cell_for_each_linear(engine, tmp_path):
    for options, words in (([], "bits a weight"), (["--graph"], "PagedAttention")):
        plot = tmp_path / "plot.svg"
        assert inspect(engine, "--plot", plot, *options).exit_code == 0
        root = ElementTree.fromstring(plot.read_text(encoding="utf-8"))
        assert root.tag.endswith("svg")
        assert words in "".join(root.itertext())
    rows = linear_rows(Manifest.read(engine))
    cells = ElementTree.fromstring(draw_bits("<&>", rows)).findall("{http://www.w3.org/2000/svg}g")
    assert len(cells) == len(rows)


def test_the_graph_is_shown_as_text_and_as_json(engine):
    text = inspect(engine, "--graph").stdout
    assert "layers.0 … layers.2, 3 alike" in text
    assert "QuantLinear  80 → 112  panels uint8[4, " in text
    assert "input_layernorm.weight float32[80]" in text
    data = json.loads(inspect(engine, "--graph", "--json").stdout)
    assert [child["name"] for child in data["children"]] == ["model", "lm_head"]


def test_verify_reads_every_part(engine):
    result = inspect(engine, "--verify")
    assert result.exit_code == 0
    assert f"All {len(Manifest.read(engine).parts)} parts verified" in result.stderr
    weights = bytearray((engine / WEIGHTS_FILE).read_bytes())
    weights[100] ^= 1
    (engine / WEIGHTS_FILE).write_bytes(weights)
    assert inspect(engine).exit_code == 0  # says nothing of what is not asked
    result = inspect(engine, "--verify")
    assert result.exit_code == 1
    assert "weights.bin has changed since it was built (its sha256 differs)" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("damage", [b"", b"no onnx", b"\x3a\x05abc", b"\x3b", b"\xff" * 20])
def test_a_graph_that_is_no_onnx_is_refused(damage, tmp_path):
    (tmp_path / GRAPH_FILE).write_bytes(damage)
    with pytest.raises(EngineError, match="is not ONNX; build the engine again"):
        read_graph(tmp_path / GRAPH_FILE)


def test_a_graph_cut_anywhere_is_refused_or_read(engine):
    path = engine / GRAPH_FILE
    whole = path.read_bytes()
    for size in range(0, len(whole), 211):
        path.write_bytes(whole[:size])
        result = inspect(engine, "--graph")
        assert result.exit_code == 1, size
        assert result.stderr.count("\n") == 1


def test_what_is_no_engine_or_cannot_be_written_is_one_line(engine, tmp_path):
    for arguments in ([tmp_path / "nowhere"], [engine, "--plot", tmp_path / "absent" / "x.svg"]):
        result = inspect(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1


def test_an_engine_is_named_either_way(engine):
    by_option = CliRunner().invoke(main, ["--engine", str(engine)])
    assert by_option.exit_code == 0
    assert by_option.stdout == CliRunner().invoke(main, [str(engine)]).stdout
    assert CliRunner().invoke(main, ["--engine", str(engine), str(engine)]).exit_code == 2


@pytest.mark.parametrize("family", ["qwen2-moe", "experts-all", "qwen3"])
def test_experts_are_counted_with_what_a_token_reads_of_them(family, tiny_checkpoint, build_engine):
    directory = build_engine(tiny_checkpoint(family).path)
    found = json.loads(inspect(directory, "--json").stdout)
    sizes = {linear["name"]: linear["stored_bytes"] for linear in found["linears"]}
    own = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    read = sum(sizes.values()) - sizes["model.embed_tokens"] + sizes["model.embed_tokens"] // 131
    text = inspect(directory).stdout
    if family == "qwen3":
        assert found["experts"] is None
        assert found["read_bytes_per_token"] == read
        assert "experts" not in text
        return
    layers, count, chosen = (2, 5, 2) if family == "qwen2-moe" else (3, 4, 4)
    assert found["experts"] == {
        "layers": layers, "num_experts": count, "num_experts_per_tok": chosen,
        "stored_bytes": own, "read_bytes": own * chosen // count,
    }  # fmt: skip
    assert found["read_bytes_per_token"] == read - own + own * chosen // count
    assert f"MiB: {chosen} of {count} a token in each of {layers} layers" in text


def test_stages_are_shown_as_they_are_loaded(tiny_checkpoint, build_engine) -> None:
    """Weights and cache of all stages are those of the engine; a tied table counts where it is read."""
    engine = build_engine(tiny_checkpoint("qwen3-tied").path, quant="int8")
    told = json.loads(CliRunner().invoke(main, [str(engine), "--stages", "3", "--json"]).stdout)["stages"]
    assert [(row["stage"], row["first_layer"], row["last_layer"]) for row in told] == [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    for row in told:
        stage = Stage.load(engine, range(row["first_layer"], row["last_layer"] + 1), 2)
        assert row["weight_bytes"] == stage.weight_bytes
    assert sum(row["cache_bytes_per_token"] for row in told) == Manifest.read(engine).cache.bytes_per_token
    shown = CliRunner().invoke(main, [str(engine), "--stages", "2"]).stdout.splitlines()
    assert shown[0].split() == ["stage", "layers", "weights", "MiB", "cache", "KiB", "a", "token"]
    assert len(shown) == 3
    refused = CliRunner().invoke(main, [str(engine), "--stages", "2", "--graph"])
    assert "--stages stands alone" in refused.stderr
