"""Schemes by linear: which pattern decides, what stays fused, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from cases.tiny import DENSE, hf_logits, run_alone
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.cli import main
from qwen_build.engine_build import Plan, plan_build
from qwen_build.plan.options import MIXES, BuildOptions
from qwen_build.plan.rules import Rule, read_rules
from qwen_build.plan.scheme_plan import plan_schemes
from qwen_build.quantization.scheme_table import make_scheme
from qwen_build.quantization.schemes import dequantize
from qwen_engine.choices import MIXED
from qwen_engine.errors import BuildError
from qwen_engine.manifest import GRAPH_FILE, LAYERS_GRAPH_FILE
from qwen_run.runtime.engine import Engine

TOKENS = np.random.default_rng(6).integers(0, 131, 50).tolist()


def plan(directory: Path, **options) -> Plan:
    with Checkpoint.open(directory) as checkpoint:
        return plan_build(checkpoint, resolve_checkpoint(str(directory)), BuildOptions(**options))


def schemes(directory: Path, **options) -> dict[str, str]:
    """Linear -> its scheme and group size."""
    linears = plan(directory, **options).linears
    return {linear.name: f"{linear.quantization.scheme}-{linear.quantization.group_size}" for linear in linears}


def rule(pattern: str, quant: str, **options) -> Rule:
    return Rule("rules.json", pattern, quant, **options)


def test_the_first_pattern_decides_and_the_rest_is_as_the_options_say(tiny_checkpoint):
    rules = rule("model.layers.1.mlp.down_proj", "int8", group_size=128), rule("*.layers.1.*", "int8")
    found = schemes(tiny_checkpoint("qwen2").path, exclude=("*.o_proj", "lm_head"), quant_config=rules, group_size=64)
    assert found == {
        "model.embed_tokens": "int8-64",
        **{f"model.layers.{i}.self_attn.qkv_proj": f"int{4 if i != 1 else 8}-64" for i in range(3)},
        **{f"model.layers.{i}.self_attn.o_proj": "none-0" for i in range(3)},
        **{f"model.layers.{i}.mlp.gate_up_proj": f"int{4 if i != 1 else 8}-64" for i in range(3)},
        **{f"model.layers.{i}.mlp.down_proj": "int4-64" if i != 1 else "int8-128" for i in range(3)},
        "lm_head": "none-0",
    }


def test_a_mix_has_more_bits_where_errors_cost_most(tiny_checkpoint):
    untied, tied = (schemes(tiny_checkpoint(name).path, quant="int4-mixed") for name in ("qwen2", "qwen2-tied"))
    layers = {
        f"model.layers.{i}.{name}": f"{quant}-32"
        for i in range(3)
        for name, quant in {
            "self_attn.qkv_proj": "int6", "self_attn.o_proj": "int4",
            "mlp.gate_up_proj": "int4", "mlp.down_proj": "int5",
        }.items()
    }  # fmt: skip
    assert untied == {"model.embed_tokens": "int4-32", **layers, "lm_head": "int6-32"}
    assert tied == {"model.embed_tokens": "int6-32", **layers, "lm_head": "int6-32"}


def test_rules_and_options_go_before_a_mix(tiny_checkpoint):
    rules = (rule("*.0.self_attn.v_proj", "int8"),)
    found = schemes(
        tiny_checkpoint("qwen2").path, quant="int4-mixed", quant_config=rules, group_size=64, embedding_quant="int8"
    )
    assert found["model.layers.0.self_attn.v_proj"] == "int8-64"
    assert found["model.layers.1.self_attn.qkv_proj"] == "int6-64"
    assert found["model.embed_tokens"] == found["lm_head"] == "int8-64"


def test_stock_kernels_have_no_mix(tiny_checkpoint):
    with pytest.raises(BuildError, match="--kernels stock has no weights of 6 bits; use --kernels native"):
        plan(tiny_checkpoint("qwen2").path, quant="int4-mixed", kernels="stock")


def test_the_command_line_has_the_mixes_of_the_table():
    assert set(MIXED) == set(MIXES)


def test_what_is_fused_comes_apart_where_its_parts_differ(tiny_checkpoint):
    found = schemes(
        tiny_checkpoint("qwen2").path, exclude=("*.0.self_attn.k_proj", "*.1.mlp.up_proj", "*.2.*.[qkv]_proj")
    )
    assert {name: scheme for name, scheme in found.items() if ".0.self_attn." in name} == {
        "model.layers.0.self_attn.q_proj": "int4-32",
        "model.layers.0.self_attn.k_proj": "none-0",
        "model.layers.0.self_attn.v_proj": "int4-32",
        "model.layers.0.self_attn.o_proj": "int4-32",
    }
    assert found["model.layers.1.mlp.up_proj"] == "none-0"
    assert found["model.layers.1.mlp.gate_proj"] == "int4-32"
    assert found["model.layers.2.self_attn.qkv_proj"] == "none-0"  # they agree again


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("kernels", ["native", "stock"])
def test_a_mixed_engine_equals_transformers_with_the_dequantised_weights(
    family, kernels, tiny_checkpoint, build_engine
):
    import copy

    import torch

    checkpoint = tiny_checkpoint(family)
    directory = build_engine(
        checkpoint.path,
        kernels=kernels,
        activations="float32",
        kv_cache_dtype="float32",
        exclude=("*.k_proj", "*.0.mlp.down_proj", "lm_head"),
        quant_config=(rule("*.v_proj", "int8", group_size=64), rule("*.up_proj", "int8"), rule("*.1.*_proj", "int8")),
    )
    model = copy.deepcopy(checkpoint.model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # the float head of a tied model
    names = dict(model.named_parameters())

    def store(name: str, quant: str, group_size: int = 32) -> None:
        scheme, weight = make_scheme(quant, group_size, None, "float32", kernels), names[f"{name}.weight"]
        weight.data = torch.tensor(dequantize(scheme, scheme.quantize(weight.detach().numpy()), tuple(weight.shape)))

    store("model.embed_tokens", "int8")
    for i in range(3):
        store(f"model.layers.{i}.self_attn.q_proj", "int8" if i == 1 else "int4")
        store(f"model.layers.{i}.self_attn.v_proj", "int8", 64)
        store(f"model.layers.{i}.self_attn.o_proj", "int8" if i == 1 else "int4")
        store(f"model.layers.{i}.mlp.gate_proj", "int8" if i == 1 else "int4")
        store(f"model.layers.{i}.mlp.up_proj", "int8")
        if i:
            store(f"model.layers.{i}.mlp.down_proj", "int8" if i == 1 else "int4")
    logits = run_alone(Engine.load(directory, threads=1), TOKENS)
    # the same weights on both sides: what is left is float32 rounding
    np.testing.assert_allclose(logits, hf_logits(model, TOKENS), rtol=3e-4, atol=3e-4)
    layers = Engine.load(directory, threads=1, graph=LAYERS_GRAPH_FILE)
    assert np.array_equal(run_alone(layers, TOKENS), logits)


def test_rules_name_the_experts_of_a_layer_together_or_all_of_them(tiny_checkpoint):
    path = tiny_checkpoint("qwen2-moe").path
    rules = (
        rule("model.layers.1.mlp.experts.gate_up_proj", "int8"),
        rule("model.layers.2.mlp.experts.*", "int6", group_size=64),
        rule("*.shared_expert.up_proj", "int8"),
    )
    found = schemes(path, quant_config=rules, exclude=("*.1.mlp.experts.*.down_proj",))
    assert {name.partition("mlp.")[2]: scheme for name, scheme in found.items() if ".1.mlp." in name} == {
        "experts.gate_up_proj": "int8-32",
        "experts.down_proj": "none-0",
        "shared_expert.gate_proj": "int4-32",
        "shared_expert.up_proj": "int8-32",
        "shared_expert.down_proj": "int4-32",
    }
    assert {name: scheme for name, scheme in found.items() if ".2.mlp.experts" in name} == {
        "model.layers.2.mlp.experts.gate_up_proj": "int6-64",
        "model.layers.2.mlp.experts.down_proj": "int6-64",
    }


@pytest.mark.parametrize("pattern", ["*.1.mlp.experts.3.*", "*.up_proj"])
def test_a_rule_of_some_of_the_experts_is_refused(pattern, tiny_checkpoint):
    message = r"matches model\.layers\.1\.mlp\.experts\.\d\.up_proj and not all of the 10 linears .* give that name"
    if "3" in pattern:
        message = message.replace("up_proj", "gate_proj")
    with pytest.raises(BuildError, match=message):
        plan(tiny_checkpoint("qwen2-moe").path, exclude=(pattern,))


def test_a_mix_gives_experts_what_it_gives_a_dense_layer(tiny_checkpoint):
    found = schemes(tiny_checkpoint("qwen2-moe").path, quant="int4-mixed")
    assert found["model.layers.1.mlp.experts.gate_up_proj"] == "int4-32"
    for name in ("0.mlp.down_proj", "1.mlp.experts.down_proj", "1.mlp.shared_expert.down_proj"):
        assert found[f"model.layers.{name}"] == "int5-32"


def test_experts_have_no_constant_scales_of_their_inputs(tiny_checkpoint):
    message = r"--activation-scales static cannot be had of experts \(.*experts.gate_up_proj\); choose token"
    with pytest.raises(BuildError, match=message):
        plan(tiny_checkpoint("qwen3-moe").path, quant="smoothquant", activation_scales="static")


def test_stock_kernels_have_no_experts(tiny_checkpoint):
    message = r"--kernels stock cannot multiply with experts \(model.layers.1.mlp.experts.gate_up_proj\); use --kernels"
    with pytest.raises(BuildError, match=message):
        plan(tiny_checkpoint("qwen3-moe").path, kernels="stock")


def test_a_head_that_differs_from_a_tied_embedding_has_its_own_bytes(tiny_checkpoint):
    path = tiny_checkpoint("qwen2-tied").path
    one, two = plan(path), plan(path, exclude=("lm_head",))
    assert (one.head_is_shared, two.head_is_shared) == (True, False)
    assert 131 * 80 * 4 <= two.layout.size_bytes - one.layout.size_bytes < 131 * 80 * 4 + 2 * 4096


def test_nodes_read_what_is_shared_through_one_initializer(tiny_checkpoint, build_engine):
    """Each is mapped by itself, and what is read through two maps counts twice in a process's memory."""
    directory = build_engine(tiny_checkpoint("qwen2-tied").path)
    for graph in (GRAPH_FILE, LAYERS_GRAPH_FILE):
        model = onnx.load(directory / graph, load_external_data=False)
        places = {
            t.name: next(entry.value for entry in t.external_data if entry.key == "offset")
            for t in model.graph.initializer
            if t.external_data
        }
        read = {name for node in model.graph.node for name in node.input if name in places}
        assert len({places[name] for name in read}) == len(read)
        assert {"lm_head.panels", "model.embed_tokens.panels"} <= places.keys()  # for those who look for them


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exclude": ("*.w1",)},
            "--exclude: '*.w1' matches no linear; their names are such as model.layers.0.self_attn",
        ),
        ({"exclude": ("*.qkv_proj",)}, "matches no linear"),
        (
            {"exclude": ("lm_head", "lm_*")},
            "--exclude: 'lm_*' decides nothing, earlier patterns match the same linears",
        ),
        (
            {"exclude": ("*.o_proj",), "quant_config": (rule("*.0.*.o_proj", "int8"),)},
            "rules.json: '*.0.*.o_proj' decides nothing",
        ),
        ({"exclude": ("lm_head",), "quant": "none"}, "--exclude keeps linears float, as --quant none"),
        ({"quant_config": (rule("*", "int3"),)}, "rules.json: '*': --quant int3 is not one of"),
        ({"quant_config": (rule("*", "int4", group_size=48),)}, "--group-size 48 is not one of"),
        (
            {"quant_config": (rule("*", "int4", activations="int8x2"),), "kernels": "stock"},
            "rules.json: '*': --kernels stock has no --activations int8x2",
        ),
    ],
    ids=str,
)
def test_options_that_decide_nothing_or_contradict_are_refused(options, message, tiny_checkpoint):
    with pytest.raises(BuildError) as error:
        plan(tiny_checkpoint("qwen2").path, **options)
    assert message in str(error.value)


def test_a_file_of_rules_is_read_in_its_order(tmp_path):
    path = tmp_path / "rules.json"
    path.write_text('{"*.b": {"quant": "int8", "group_size": 64, "symmetric": false}, "*.a": {"quant": "none"}}')
    assert read_rules(path) == (
        Rule(str(path), "*.b", "int8", group_size=64, symmetric=False),
        Rule(str(path), "*.a", "none"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('[["a", {"quant": "int8"}]]', "is not a JSON object"),
        ('{"a": "int8"}', "'a' is not a JSON object"),
        ('{"a": {}}', "'a' has no quant, expected one of none, int8, int6, int5, int4"),
        ('{"a": {"quant": "int8", "bits": 4}}', "'a' has unknown bits, expected quant, group_size"),
        ('{"a": {"quant": 8}}', "'a': quant is 8, expected str"),
        ('{"a": {"quant": "int8", "symmetric": 1}}', "'a': symmetric is 1, expected bool"),
        ('{"a": {"quant": "int8", "group_size": true}}', "'a': group_size is True, expected int"),
        ('{"a": {"quant": "none", "group_size": 32}}', "'a': quant none has no group_size; leave it out"),
        ('{"a": {"quant": "int8"}, "a": {"quant": "int4"}}', "has 'a' twice; keep one"),
    ],
)
def test_a_file_that_is_no_rules_is_refused(text, message, tmp_path):
    path = tmp_path / "rules.json"
    path.write_text(text)
    with pytest.raises(BuildError) as error:
        read_rules(path)
    assert message in str(error.value)


def test_the_command_shows_what_every_linear_becomes(tiny_checkpoint, tmp_path):
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"*.v_proj": {"quant": "int8", "group_size": 128}}))
    arguments = [str(tiny_checkpoint("qwen2").path), "--quant-config", str(rules), "--exclude", "*.0.mlp.*"]
    table = CliRunner().invoke(main, [*arguments, "--dry-run"]).stdout
    assert "model.layers.2.self_attn.v_proj" in table
    assert "int8 g128 symmetric x int8, native" in table
    assert "qkv_proj" not in table
    described = json.loads(CliRunner().invoke(main, [*arguments, "--dry-run", "--json"]).stdout)
    assert {one["scheme"] for one in described["linears"] if ".0.mlp." in one["name"]} == {"none"}


@pytest.mark.parametrize("options", [["--quant-config", "nowhere.json"], ["--exclude", "q_proj"]])
def test_the_command_refuses_in_one_line(options, tiny_checkpoint, tmp_path):
    result = CliRunner().invoke(main, [str(tiny_checkpoint("qwen2").path), *options, "--output", str(tmp_path / "e")])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "hidden_size", "expected"),
    [
        ({}, 128, 128),
        ({}, 64, 64),
        ({}, 80, 32),  # which pads
        ({"group_size": 32}, 128, 32),
        ({"group_size": 128}, 80, 128),
        ({"quant": "int8"}, 128, 32),
        ({"embedding_quant": "int4"}, 128, 32),
    ],
)
def test_embedding_and_head_have_the_largest_groups_beside_int4(tiny_checkpoint, options, hidden_size, expected):
    tiny = tiny_checkpoint("qwen2")
    config = dataclasses.replace(ModelConfig.from_hf(tiny.path), hidden_size=hidden_size)
    with Checkpoint.open(tiny.path) as weights:
        found = plan_schemes(BuildOptions(**options).resolved(), config, weights)
    assert found.embedding.record.group_size == expected
    assert found.linear.record.group_size == options.get("group_size", 32)
