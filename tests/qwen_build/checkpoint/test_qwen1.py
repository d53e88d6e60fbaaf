"""A Qwen-1 builds the engine of the same weights under Qwen2's names, with its tokenizer, template and stops."""

from __future__ import annotations

import base64
import json
import random
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import transformers

from cases.packed import CASES
from cases.qwen1_names import as_qwen1
from cases.tiny import run_alone
from qwen_build import build
from qwen_build.checkpoint import qwen1
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.tiktoken_file import SPECIAL, read_tiktoken
from qwen_build.checkpoint.tokenizer_files import engine_tokenizer
from qwen_engine.errors import BuildError, CheckpointError, UnsupportedModel
from qwen_engine.manifest import WEIGHTS_FILE, Manifest
from qwen_run.accuracy.qwen1_names import config_of
from qwen_run.accuracy.reference import HuggingFace
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.runtime.engine import Engine
from qwen_run.text.chat_template import ChatTemplate
from qwen_run.text.tokenizer_file import QWEN_WORDS

# as published with Qwen-7B, by the keys of September 2023 and of August
PUBLISHED = {
    "attn_dropout_prob": 0.0, "bf16": True, "emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 22016, "kv_channels": 128, "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 32768, "model_type": "qwen", "no_bias": True, "num_attention_heads": 32,
    "num_hidden_layers": 32, "onnx_safe": None, "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True,
    "seq_length": 8192, "tie_word_embeddings": False, "tokenizer_class": "QWenTokenizer", "use_cache": True,
    "use_dynamic_ntk": True, "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": 151936,
    "use_cache_kernel": False, "use_cache_quantization": False, "softmax_in_fp32": False,
}  # fmt: skip
AUGUST = {
    "activation": "swiglu", "apply_residual_connection_post_layernorm": False, "attn_pdrop": 0.0,
    "bias_dropout_fusion": True, "bos_token_id": 151643, "embd_pdrop": 0.0, "eos_token_id": 151643,
    "ffn_hidden_size": 22016, "kv_channels": 128, "layer_norm_epsilon": 1e-06, "model_type": "qwen", "n_embd": 4096,
    "n_head": 32, "n_layer": 32, "n_positions": 6144, "no_bias": True, "padded_vocab_size": 151936,
    "params_dtype": "torch.bfloat16", "pos_emb": "rotary", "resid_pdrop": 0.1, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 2048, "tokenizer_type": "QWenTokenizer",
    "use_dynamic_ntk": False, "use_logn_attn": False, "vocab_size": 151851,
}  # fmt: skip


@pytest.mark.parametrize(("hf", "tokens"), [(PUBLISHED, 8192), (AUGUST, 2048)])
def test_both_spellings_of_the_config(hf, tokens):
    config = ModelConfig.from_json(hf)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (4096, 11008, 32)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 32, 128)
    assert (config.vocab_size, config.rms_norm_eps, config.rope.theta) == (151936, 1e-6, 1e4)
    assert (config.qkv_bias, config.o_bias, config.longest.tokens) == (True, False, tokens)
    assert config.notes == ()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"no_bias": False}, UnsupportedModel, "no_bias False is not supported, only True is"),
        ({"rotary_pct": 0.25}, UnsupportedModel, "rotary_pct 0.25 is not supported, only 1 is"),
        ({"intermediate_size": 22015}, CheckpointError, "intermediate_size is 22015, expected an even number"),
        ({"seq_length": None}, CheckpointError, "config.json has no max_position_embeddings"),
    ],
)
def test_other_configs_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        ModelConfig.from_json(PUBLISHED | change)


@pytest.mark.parametrize("quant", ["none", "int4"])
def test_the_engine_is_that_of_qwen2_byte_for_byte(quant, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("qwen1").path
    old = as_qwen1(checkpoint, tmp_path / "old")
    engines = [build(path, tmp_path / f"{path.name}-engine", quant=quant) for path in (checkpoint, old)]
    ours, theirs = (Manifest.read(engine) for engine in engines)
    assert ours.parts[WEIGHTS_FILE].sha256 == theirs.parts[WEIGHTS_FILE].sha256
    assert ours.parts["model.onnx"].sha256 == theirs.parts["model.onnx"].sha256
    with pytest.raises(BuildError, match="641 is more than the 640 tokens beyond which it needs dynamic NTK"):
        build(old, tmp_path / "long", max_seq_len=641)


def test_a_gptq_checkpoint_of_qwen1_is_that_of_qwen2(pack, tmp_path):
    case = next(case for case in CASES if case.config["quant_method"] == "gptq" and case.config["bits"] == 4)
    packed = pack(case, family="qwen1")
    old = as_qwen1(packed.path, tmp_path / "old")
    engines = [build(path, tmp_path / f"{path.name}-engine") for path in (packed.path, old)]
    ours, theirs = (Manifest.read(engine) for engine in engines)
    assert ours.parts[WEIGHTS_FILE].sha256 == theirs.parts[WEIGHTS_FILE].sha256


def write_ranks(path: Path) -> dict[bytes, int]:
    """A rank file of 256 bytes and of merges learnt from a few words, in the order in which they were."""
    rng, ranks = random.Random(0), {bytes([byte]): byte for byte in range(256)}
    spelled = ["the", "then", "there", "你好", "你们", "hello", "yellow", "éé", "naïve", "12", "ing", "ring", "'ll"]
    words = [*(word.encode() for word in spelled), b" the", b"\n\n"]
    texts = [[bytes([byte]) for byte in rng.choice(words)] for _ in range(300)]
    while len(ranks) < 330:
        counts: dict[bytes, int] = {}
        for text in texts:
            for left, right in pairwise(text):
                counts[left + right] = counts.get(left + right, 0) + 1
        best = max((pair for pair in counts if pair not in ranks), key=lambda pair: (counts[pair], pair), default=None)
        if best is None:
            break
        ranks[best] = len(ranks)
        for text in texts:
            at = 0
            while at < len(text) - 1:
                if text[at] + text[at + 1] == best:
                    text[at : at + 2] = [best]
                at += 1
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return ranks


def tiktoken_ids(text: str, ranks: dict[bytes, int], words: re.Pattern[str]) -> list[int]:
    """What tiktoken makes of a text: in each word, the neighbours whose token has the lowest rank are merged first."""
    ids = []
    for word in words.findall(unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            joined = [left + right for left, right in pairwise(parts)]
            pairs = [(ranks[both], i) for i, both in enumerate(joined) if both in ranks]
            if not pairs:
                break
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_its_tokenizer_cuts_as_tiktoken_does(tmp_path):
    regex = pytest.importorskip("regex")
    ranks = write_ranks(tmp_path / "qwen.tiktoken")
    tokenizer, words = engine_tokenizer(tmp_path).open(), regex.compile(QWEN_WORDS)
    assert [tokenizer.token_id(token) for token in SPECIAL[:3]] == [len(ranks), len(ranks) + 1, len(ranks) + 2]
    rng, alphabet = random.Random(1), "the hello你好们yring \n\t'12é \u0301,.<|"
    texts = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 40))) for _ in range(3000)]
    texts += [" the then there", "naïve yellow\n\n hello", "<|im_end", "i'll ring 'LL", ""]
    for text in texts:
        assert tokenizer.encode(text) == tiktoken_ids(text, ranks, words), text
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"!!!! 0\n", "line 1 is no token with its rank"),
        (b"IQ== 0\nIg==\n", "line 2 is no token with its rank"),
        (b"IQ== 0\nIg== 1\n", "has not every rank once, or not every byte"),
    ],
)
def test_a_damaged_rank_file_is_refused(content, message, tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_tiktoken(tmp_path / "qwen.tiktoken")


def test_its_template_and_stops(tiny_checkpoint, tmp_path):
    old = as_qwen1(tiny_checkpoint("qwen1-large").path, tmp_path / "old")
    ranks = write_ranks(old / "qwen.tiktoken")
    (old / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": len(ranks)}))
    directory = build(old, tmp_path / "engine")
    assert sorted(Manifest.read(directory).eos_token_ids) == [len(ranks), len(ranks) + 1, len(ranks) + 2]
    user, answer = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hi."}
    assert ChatTemplate.load(directory).render([user, answer, user]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )
    system = {"role": "system", "content": "Be brief."}
    assert ChatTemplate.load(directory).render([system, user]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<")
    (old / "generation_config.json").write_text(json.dumps({"chat_format": "raw"}))
    assert not (build(old, tmp_path / "raw") / "chat_template.jinja").exists()


def test_it_answers_as_the_same_weights_do_in_transformers(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("qwen1")
    old, tokens = as_qwen1(checkpoint.path, tmp_path / "old"), list(range(3, 90))
    engine = Engine.load(build(old, tmp_path / "engine", quant="none"), threads=1)
    # float32 sums in another order: 1e-4 of logits that reach 10 and more
    np.testing.assert_allclose(run_alone(engine, tokens), checkpoint.logits(tokens), rtol=1e-4, atol=1e-4)


def test_the_gate_reads_it_itself(tiny_checkpoint, build_engine, monkeypatch, tmp_path):
    new = tiny_checkpoint("qwen1")
    old = as_qwen1(new.path, tmp_path / "old")
    assert compare_weights(build_engine(old, quant="int8"), old).passed
    (ours,), (theirs,) = ([*HuggingFace(path, 1).logits(range(3, 20))] for path in (old, new.path))
    np.testing.assert_array_equal(ours.values, theirs.values)
    modules = qwen1._MODULES
    monkeypatch.setattr(qwen1, "_MODULES", modules | {"mlp.w1": modules["mlp.w2"], "mlp.w2": modules["mlp.w1"]})
    check = compare_weights(build(old, tmp_path / "engine", quant="int8"), old)
    assert "gate_proj" in check.message
    assert not check.passed


@pytest.mark.parametrize("hf", [PUBLISHED, AUGUST])
def test_the_gate_knows_both_spellings(hf, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config, is_known = config_of(tmp_path, transformers)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (4096, 11008, 32)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (32, 32, 151936)
    assert not is_known
