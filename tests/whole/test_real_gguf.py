"""The demo as GGUF files: each builds and answers as its safetensors do, within the rounding of the file."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks.write_gguf import write_gguf
from cases import TESTS
from cases.tiny import run_alone
from qwen_build import build
from qwen_build.checkpoint.demo import installed_gguf
from qwen_engine.manifest import WEIGHTS_FILE, Manifest
from qwen_run import LLM, SamplingParams
from qwen_run.runtime.engine import Engine
from qwen_run.text.tokenizer import Tokenizer

TOKENS = 512
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", autouse=True)
def own_cache(demo_checkpoint, tmp_path_factory):
    """Directories that are made of GGUF files go where the tests' other files go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text() -> str:
    return (TESTS / "data" / "wikitext2-sample.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reference(demo_checkpoint, build_engine, text) -> tuple[list[int], np.ndarray]:
    """Tokens of a text, and their logits (512, vocab_size) by the float engine of the safetensors."""
    tokens = Tokenizer.load(demo_checkpoint).encode(text)[:TOKENS]
    return tokens, run_alone(Engine.load(build_engine(demo_checkpoint, quant="none")), tokens)


def mean_kl(expected: np.ndarray, found: np.ndarray) -> float:
    """KL(expected || found), the mean over positions, in nats."""
    p, q = (log_softmax(rows.astype(np.float64)) for rows in (expected, found))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", ["BF16", "F16"])  # both hold this model's weights
def test_a_file_of_floats_builds_the_engine_of_the_safetensors(kind, demo_checkpoint, build_engine, tmp_path, text):
    write_gguf(demo_checkpoint, tmp_path / "demo.gguf", kind, kind)
    ours, theirs = build(tmp_path / "demo.gguf", tmp_path / "engine", quant="int4"), build_engine(demo_checkpoint)
    digests = [Manifest.read(engine).parts[WEIGHTS_FILE].sha256 for engine in (ours, theirs)]
    assert digests[0] == digests[1]
    assert Tokenizer.load(ours).encode(text) == Tokenizer.load(theirs).encode(text)
    answers = [LLM(engine).chat(QUESTION, SamplingParams(temperature=0, max_tokens=32)) for engine in (ours, theirs)]
    assert answers[0][0].outputs[0] == answers[1][0].outputs[0]


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("Q8_0", 0.006),  # measured 0.0042, nearly all of it activations of int8: an int8 engine has 0.0040
        ("Q4_0", 0.4),  # measured 0.293: an int4 engine, whose groups have zero points, has 0.231
    ],
)
def test_an_engine_is_as_near_the_model_as_the_type_of_the_file(kind, most, demo_checkpoint, reference, tmp_path):
    write_gguf(demo_checkpoint, tmp_path / "demo.gguf", kind, "Q8_0")
    tokens, expected = reference
    kl = mean_kl(expected, run_alone(Engine.load(build(tmp_path / "demo.gguf", tmp_path / "engine")), tokens))
    assert 0 < kl < most


def test_the_published_file_answers_as_the_checkpoint_that_is_made_of_it(reference, demo_checkpoint, tmp_path, text):
    """A Llama of Q4_1, rows of q and k in pairs; the checkpoint has its weights rounded to bfloat16."""
    engine = build(installed_gguf(), tmp_path / "engine", quant="none")
    tokens, expected = reference
    assert Tokenizer.load(engine).encode(text)[:TOKENS] == tokens
    assert 0 < mean_kl(expected, run_alone(Engine.load(engine), tokens)) < 2e-4  # measured 6.0e-5
    (result,) = LLM(engine).chat(QUESTION, SamplingParams(temperature=0, max_tokens=32))
    assert re.search("Paris", result.outputs[0].text)
    assert result.outputs[0].finish_reason == "stop"
