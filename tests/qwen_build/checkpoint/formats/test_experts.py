"""Quantised checkpoints of mixtures of experts: each expert's linears in the format, stored bit for bit or rounded."""

from __future__ import annotations

import copy
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cases.formats import QuantisedCheckpoint
from cases.packed import Case, case_name, random_packed
from cases.tiny import TinyCheckpoint, hf_logits, run_alone
from qwen_build import build
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build
from qwen_build.plan.options import BuildOptions
from qwen_engine.errors import UnsupportedModel
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.reference_experts import place_of
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.runtime.engine import Engine

TOKENS = np.random.default_rng(5).integers(0, 131, 60).tolist()
FLOAT = re.compile(r"lm_head|model\.embed_tokens|.*\.mlp\.gate|.*\.shared_expert_gate")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 48]}
CASES = [
    Case("gptq", "gptq", 4, 32),
    Case("gptq", "gptq", 8, 32, symmetric=True),
    Case("awq", "gemm", 4, 32),
    Case("auto-round", "auto_round:auto_gptq", 4, 64, symmetric=True),
]

# name and weight of a linear -> its tensors by suffix, and what they stand for; None: it stays float
Store = Callable[[str, Any], tuple[dict[str, Any], Any] | None]


def stored(tiny: TinyCheckpoint, path: Path, config: dict[str, Any], store: Store) -> QuantisedCheckpoint:
    """The checkpoint ``tiny`` with its linears, those of each expert too, as ``store`` has them."""
    tensors, model, weights = load_file(tiny.path / "model.safetensors"), copy.deepcopy(tiny.model), {}
    for name in list(tensors):
        linear = name.removesuffix(".weight")
        found = (
            store(linear, tensors[name].float()) if tensors[name].dim() == 2 and not FLOAT.fullmatch(linear) else None
        )
        if found is None:
            continue
        parts, weight = found
        del tensors[name]
        tensors |= {f"{linear}.{suffix}": part.contiguous() for suffix, part in parts.items()}
        place_of(model, name)[1][...] = weights[linear] = torch.as_tensor(weight).float()
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    hf = json.loads((tiny.path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(hf | {"quantization_config": config}))
    return QuantisedCheckpoint(path, weights, model)


def in_words(case: Case) -> Store:
    def store(name: str, weight: Any) -> tuple[dict[str, Any], Any]:
        seed = zlib.crc32(name.encode())
        parts, values = random_packed(case, tuple(weight.shape), seed, seed)
        return {key: torch.from_numpy(np.ascontiguousarray(part)) for key, part in parts.items()}, values.copy()

    return store


def fp8_blocks(name: str, weight: Any) -> tuple[dict[str, Any], Any]:
    torch.manual_seed(zlib.crc32(name.encode()))
    rows, columns = (-(-size // block) for size, block in zip(weight.shape, FP8["weight_block_size"], strict=True))
    scales = (torch.rand(rows, columns) * 1e-3 + 1e-3).bfloat16()
    whole = scales.float().repeat_interleave(32, 0).repeat_interleave(48, 1)[: weight.shape[0], : weight.shape[1]]
    numbers = (weight / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale_inv": scales}, numbers.float() * whole


@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe"])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_packed_experts_are_stored_bit_for_bit(family, case, tiny_checkpoint, tmp_path):
    packed = stored(tiny_checkpoint(family, "float16"), tmp_path / "packed", case.config, in_words(case))
    engine = build(
        packed.path, tmp_path / "engine", activations="float32", kv_cache_dtype="float32", embedding_quant="none"
    )
    records = [record for record in Manifest.read(engine).linears if ".mlp.experts." in record.name]
    assert len(records) == 4
    assert {(r.quantization.method, r.quantization.bits) for r in records} == {("imported", case.bits)}
    check = compare_weights(engine, packed.path)
    assert check.passed, check.message
    found = run_alone(Engine.load(engine, threads=1), TOKENS)
    np.testing.assert_allclose(found, hf_logits(packed.model, TOKENS), rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe"])
def test_experts_in_fp8_are_rounded_as_quant_says(family, tiny_checkpoint, tmp_path):
    checkpoint = stored(tiny_checkpoint(family, "bfloat16"), tmp_path / "fp8", FP8, fp8_blocks)
    engine = build(checkpoint.path, tmp_path / "none", quant="none")
    found = run_alone(Engine.load(engine, threads=1), TOKENS)
    np.testing.assert_allclose(found, hf_logits(checkpoint.model, TOKENS), rtol=1e-4, atol=1e-4)
    rounded = build(checkpoint.path, tmp_path / "int4", quant="int4")
    for each in (engine, rounded):
        check = compare_weights(each, checkpoint.path)
        assert check.passed, check.message


def refused(path: Path, match: str) -> None:
    with Checkpoint.open(path) as weights, pytest.raises(UnsupportedModel, match=match):
        plan_build(weights, resolve_checkpoint(str(path)), BuildOptions())


def test_experts_whose_inputs_are_in_orders_of_their_own_are_refused(tiny_checkpoint, tmp_path):
    case = Case("gptq", "gptq", 4, 32, order=True)
    packed = stored(tiny_checkpoint("qwen3-moe", "float16"), tmp_path / "packed", case.config, in_words(case))
    name = r"model\.layers\.1\.mlp\.experts\.gate_up_proj"
    refused(packed.path, name + r" have inputs in another order \(desc_act\), expected all on one grid .* float checkp")


def test_experts_of_which_some_are_float_are_refused(tiny_checkpoint, tmp_path):
    case, words = CASES[0], in_words(CASES[0])

    def store(name: str, weight: Any) -> tuple[dict[str, Any], Any] | None:
        return None if name.endswith("experts.3.up_proj") else words(name, weight)

    packed = stored(tiny_checkpoint("qwen3-moe", "float16"), tmp_path / "packed", case.config, store)
    refused(packed.path, "gate_up_proj have 9 of the 10 linears packed, expected all on one grid")


def test_experts_on_several_grids_are_refused(tiny_checkpoint, tmp_path):
    case, finer = CASES[0], Case("gptq", "gptq", 8, 32)
    config = case.config | {"dynamic": {r"+:.*experts\.2\.down_proj": {"bits": 8}}}

    def store(name: str, weight: Any) -> tuple[dict[str, Any], Any] | None:
        return in_words(finer if name.endswith("experts.2.down_proj") else case)(name, weight)

    packed = stored(tiny_checkpoint("qwen3-moe", "float16"), tmp_path / "packed", config, store)
    refused(packed.path, "down_proj have linears on several grids, expected all on one grid")
