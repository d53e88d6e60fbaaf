"""benchmarks: checkpoints as GGUF, and the arithmetic of the table beside peers. No peer is needed."""

from __future__ import annotations

import doctest
import json
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the peers' file format needs the package gguf")

from benchmarks import batch, peer_match, write_gguf  # noqa: E402
from benchmarks.peer_match import BEFORE, CONTENDERS, Match, Measured, Models, Row  # noqa: E402
from benchmarks.peer_report import (  # noqa: E402
    best_of,
    bytes_read,
    markdown_table,
    operations,
    plot,
    shares_of_limit,
)
from benchmarks.peers import OURS, ROWS, work_name  # noqa: E402
from qwen_build.checkpoint.demo import half_split  # noqa: E402
from qwen_build.checkpoint.weights import Checkpoint  # noqa: E402


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(write_gguf) == doctest.TestResults(failed=0, attempted=6)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose rows are whole groups of 32."""
    import torch
    import transformers

    path = tmp_path_factory.mktemp("whole-groups")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "qwen2", vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, rope_theta=5000.0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    return path


@pytest.mark.parametrize("linears", write_gguf.KINDS)
def test_gguf_holds_every_row_where_it_was(checkpoint: Path, tmp_path: Path, linears: str) -> None:
    write_gguf.write_gguf(checkpoint, tmp_path / "model.gguf", linears=linears)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    with Checkpoint.open(checkpoint) as weights:
        assert tensors.keys() == {write_gguf.gguf_name(name) for name in weights.tensors}
        for name, info in weights.tensors.items():
            tensor = tensors[write_gguf.gguf_name(name)]
            assert tuple(reversed(tensor.shape)) == info.shape
            found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(info.shape)
            expected = weights.read(name)
            if len(info.shape) == 1:
                np.testing.assert_array_equal(found, expected)
                continue
            kind = "Q8_0" if tensor.name == "token_embd.weight" else linears
            assert tensor.tensor_type.name == kind
            if kind.startswith("F"):
                np.testing.assert_array_equal(found, expected.astype("float16" if kind == "F16" else "float32"))
                continue
            error = np.abs(found - expected).reshape(-1, 32)
            largest = np.abs(expected).reshape(-1, 32).max(1, keepdims=True)
            # Q8_0: half a step, and 127 times the 2^-11 that a float16 scale may be off; Q4_0 reaches only 7 on one
            # side, so a whole step there.
            steps = 0.5 + 127 / 2**11 if kind == "Q8_0" else 1 + 8 / 2**11
            assert (error <= steps * largest / (127 if kind == "Q8_0" else 8) + 1e-9).all(), tensor.name


@pytest.mark.parametrize("rope", [{}, {"rope_theta": 5000.0, "rope_parameters": None}])
def test_gguf_says_what_the_config_says(checkpoint: Path, tmp_path: Path, rope: dict[str, Any]) -> None:
    """The base of the rotation stands in an object since transformers 5, before it stood beside the other keys."""
    given = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    settings = json.loads((given / "config.json").read_text("utf-8"))
    (given / "config.json").write_text(json.dumps(settings | rope), "utf-8")
    write_gguf.write_gguf(given, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    expected = {
        "general.architecture": "qwen2", "qwen2.block_count": 2, "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 96, "qwen2.attention.head_count": 4, "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 5000.0, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    assert {name: fields[name].contents() for name in expected} == expected
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 300


VALUES: dict[str, dict[str, list[float]]] = {
    "decode-512": {"engine": [90.0, 100.0, 500.0], "llama.cpp": [50.0, 49.0, 51.0], "OpenVINO": [30.0],
                   "OpenVINO, u8 cache": [40.0]},
    "decode-512-head4": {"engine, 4-bit head": [120.0], "llama.cpp": [40.0], "llama.cpp, no flash attention": [50.0],
                         "llama.cpp, 4-bit head": [60.0]},
    "prefill-512": {"engine": [90.0], "llama.cpp": [60.0], "OpenVINO": [45.0]},
    "decode-4k": {"engine, int8 cache": [90.0], "llama.cpp, q8_0 cache": [30.0],
                  "llama.cpp, no flash attention": [45.0]},
    "load": {"engine": [0.25], "llama.cpp": [0.5], "OpenVINO": [2.0], "OpenVINO, u8 cache": [3.0]},
}  # fmt: skip
FOUND = Measured(VALUES, versions={"engine": "1", "llama.cpp": "2", "OpenVINO": "3"})


def test_the_best_setting_of_a_program_counts() -> None:
    assert best_of("OpenVINO", ROWS["decode-512"], VALUES["decode-512"]) == ("OpenVINO, u8 cache", 40.0)
    assert best_of("OpenVINO", ROWS["load"], VALUES["load"]) == ("OpenVINO", 2.0)
    assert best_of("onnxruntime-genai", ROWS["load"], VALUES["load"]) is None


def test_table() -> None:
    assert markdown_table(ROWS, FOUND, {"decode-512": 0.5}).splitlines() == [
        "| | engine | llama.cpp | OpenVINO | engine over | goal | share of the limit |",
        "|---|---|---|---|---|---|---|",
        "| decode at 512 past tokens, head at 8 bits, tok/s | 100 | 50 | 40 (u8 cache) | llama.cpp 2.00 × "
        "| 1.4 ×, stretch 1.8 × | 50% |",
        "| decode at 512 past tokens, our head at 4 bits, tok/s | 120 | 60 (4-bit head) |  "
        "| llama.cpp, no flash attention 2.40 ×; llama.cpp, 4-bit head 2.00 × | 1.6 ×, stretch 2.2 × |  |",
        "| prefill of 512 tokens, tok/s | 90 | 60 | 45 | OpenVINO 2.00 ×; llama.cpp 1.50 × "
        "| 1.15 ×, stretch 1.4 × |  |",
        "| decode at 4,096 past tokens, int8 cache, tok/s | 90 | 45 (no flash attention) |  "
        "| llama.cpp, q8_0 cache 3.00 ×; llama.cpp, no flash attention 2.00 × | 2.5 ×, stretch 3.5 × |  |",
        "| load to first token, s | 0.25 | 0.5 | 2 (default cache) |  | 0.5 s, stretch 0.2 s |  |",
    ]


def test_what_is_made_of_a_checkpoint_that_changed_has_another_name(tmp_path: Path) -> None:
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "b" / "model").mkdir(parents=True)
    names = {work_name(str(tmp_path / parent / "model")) for parent in "ab"}
    (tmp_path / "a" / "model" / "config.json").write_text("{}")
    names.add(work_name(str(tmp_path / "a" / "model")))
    assert len(names) == 3
    assert all(name.startswith("model-") for name in names)
    assert work_name("qwen2.5-0.5b") == "qwen2.5-0.5b"


def test_only_qwen2_becomes_gguf(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    models = Models(tmp_path, tmp_path / "work", "int8", None)
    with pytest.raises(RuntimeError, match="model_type is 'llama'; GGUF is written of qwen2 and qwen3 alone"):
        models.path("gguf")


def test_heads_that_are_not_as_wide_as_the_model_are_those_of_a_llama(tmp_path: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "qwen2", vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, head_dim=32, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for linear in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
        torch.nn.init.normal_(linear.bias)
    model.save_pretrained(tmp_path)
    write_gguf.write_gguf(tmp_path, tmp_path / "model.gguf", "F32", "F32")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "llama", "llama.attention.key_length": 32, "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
    }  # fmt: skip
    assert {name: reader.fields[name].contents() for name in expected} == expected
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    attention = model.model.layers[0].self_attn
    for name, heads in (("q", 3), ("k", 1)):
        for part in ("weight", "bias"):
            own = getattr(getattr(attention, f"{name}_proj"), part).detach().numpy()
            stored = tensors[f"blk.0.attn_{name}.{part}"]
            assert not np.array_equal(stored, own)
            np.testing.assert_array_equal(half_split(stored, heads), own)
    np.testing.assert_array_equal(tensors["blk.0.attn_v.weight"], attention.v_proj.weight.detach().numpy())


def test_work_of_a_command() -> None:
    linear = [SimpleNamespace(name=n, in_features=2, out_features=o, stored_bytes=o * 10, stack=1) for n, o in
              (("model.embed_tokens", 1000), ("a", 3), ("b", 5), ("lm_head", 100))]  # fmt: skip
    model = SimpleNamespace(experts=None)
    manifest: Any = SimpleNamespace(linears=linear, cache=SimpleNamespace(bytes_per_token=7), model=model)
    assert operations(manifest, {"do": "prefill", "length": 512}) == 2 * (512 * (6 + 10) + 200)
    batch = {"do": "batch", "requests": 4, "prompt_length": 10, "new": 3}
    assert operations(manifest, batch) == 2 * (4 * 12 * (6 + 10) + 4 * 3 * 200)
    # three steps, which read 11, 12 and 13 tokens of context
    assert bytes_read(manifest, {"do": "decode", "past": 10, "count": 3}) == 3 * 1080 + 36 * 7


def test_plot_has_a_bar_for_everyone() -> None:
    drawing = ET.fromstring(plot(ROWS, FOUND))
    background, *bars = drawing.iter("{http://www.w3.org/2000/svg}rect")
    assert background.get("width") == "100%"
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert len(widths) == 4 + 4 + 3 + 3  # rates alone: seconds are no bar
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.2)


def test_rows_name_contenders_that_are_there() -> None:
    for row in [*ROWS.values(), *batch.make_rows([1, 16]).values()]:
        assert set(row.contenders) <= CONTENDERS.keys()
        assert CONTENDERS[row.contenders[0]].program == "engine"
        assert set(row.against) <= set(row.contenders)


@pytest.fixture
def match(tiny_checkpoint: Any, tmp_path: Path) -> Match:
    models = Models(tiny_checkpoint("qwen2").path, tmp_path, "int8", None)
    return Match({"engine": Path(sys.executable)}, models, threads=1, rounds=2)


def test_the_engine_alone(match: Match, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_match, "PAUSE_S", 0.0)
    short = Row("decode", {"do": "decode", "past": 40, "count": 4}, 4, "tok/s", ("engine", "llama.cpp"), limit="memory")
    rows = {"load": ROWS["load"], "decode": short}
    found = match.play(rows)
    assert {row: {name: len(values) for name, values in each.items()} for row, each in found.values.items()} == {
        "load": {"engine": 2},
        "decode": {"engine": 2},
    }
    assert len(found.bandwidths["decode"]) == 3
    assert shares_of_limit(rows, found, match.models)["decode"] > 0


def test_another_checkout_builds_and_runs_an_engine_of_its_own(match: Match, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_match, "PAUSE_S", 0.0)
    models = Models(match.models._checkpoint, match.models._directory, "int8", None, before=peer_match.ROOT)
    both = Match(match.pythons | {BEFORE: match.pythons["engine"]}, models, threads=1, rounds=1)
    row = Row("decode", {"do": "decode", "past": 40, "count": 4}, 4, "tok/s", OURS, limit="memory")
    found = both.play({"decode": row})
    assert found.values["decode"].keys() == set(OURS)
    weights = [(models.path(f"{name}engine") / "weights.bin").read_bytes() for name in ("", f"{BEFORE}-")]
    assert weights[0] == weights[1]
    assert "before" in markdown_table({"decode": row}, found, {})


def test_an_engine_of_an_earlier_run_is_built_again(match: Match) -> None:
    built = match.models.path("engine") / "engine.json"
    before = built.stat().st_mtime_ns
    match.models.path("engine")
    assert built.stat().st_mtime_ns == before
    again = Models(match.models._checkpoint, match.models._directory, "int8", None)
    assert (again.path("engine") / "engine.json").stat().st_mtime_ns > before


def test_a_program_that_fails_is_left_out(match: Match, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    assert match.manifest
    monkeypatch.setattr(match.models, "path", lambda model: Path("nowhere"))
    assert match._ask("engine", do="decode", past=4, count=1) is None
    assert match._present(ROWS["decode-512"]) == []
    assert "left out" in capfd.readouterr().err
