"""Engines rotate positions as transformers does, beyond the length that a model was trained for too."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from cases.tiny import ROTATED, run_alone, run_chunks
from qwen_build import build
from qwen_build.cli import main as build_command
from qwen_engine.errors import BuildError, UnsupportedModel
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.reference import HuggingFace
from qwen_run.commands.inspect import main as inspect
from qwen_run.runtime.engine import Engine

TOKENS = np.random.default_rng(3).integers(0, 131, 300).tolist()


def engine_logits(directory) -> np.ndarray:
    return run_alone(Engine.load(directory, threads=1), TOKENS)


@pytest.mark.parametrize("family", ROTATED)
def test_logits_are_those_of_transformers_beyond_the_trained_length(family, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint(family)
    directory = build_engine(checkpoint.path, quant="none")
    # float32 sums in another order: 1e-4 of logits that reach 10 and more
    np.testing.assert_allclose(engine_logits(directory), checkpoint.logits(TOKENS), rtol=1e-4, atol=1e-4)


def test_pieces_of_a_stretched_text_give_the_same_bits(tiny_checkpoint, build_engine):
    engine = Engine.load(build_engine(tiny_checkpoint("yarn").path), threads=2)
    expected = run_alone(engine, TOKENS)
    (found,) = run_chunks(engine, [TOKENS], [[99], [1], [1], [64], *([[1]] * 20), [115]])
    assert np.array_equal(found, expected)


@pytest.fixture
def plain(tiny_checkpoint, tmp_path):
    """A checkpoint of 100 tokens without a word about YaRN, as users have them."""
    path = tmp_path / "plain"
    shutil.copytree(tiny_checkpoint("yarn").path, path)
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    (path / "config.json").write_text(json.dumps(config))
    return path


YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 100}


@pytest.mark.parametrize(
    "options", [{"yarn": 4.0}, {"rope_scaling": YARN}, {"rope_scaling": json.dumps(YARN)}], ids=str
)
def test_yarn_for_a_checkpoint_that_does_not_ask_for_it(options, plain, tmp_path, tiny_checkpoint, build_engine):
    directory = build(plain, tmp_path / "engine", quant="none", **options)
    asked = build_engine(tiny_checkpoint("yarn").path, quant="none")
    assert np.array_equal(engine_logits(directory), engine_logits(asked))
    manifest = Manifest.read(directory)
    assert manifest.limits.max_seq_len == 400
    assert (manifest.model.rope_type, manifest.model.rope_factor) == ("yarn", 4.0)
    reference = HuggingFace(plain, 1, rope_scaling=manifest.origin.rope_scaling)
    np.testing.assert_allclose(
        np.concatenate([chunk.values for chunk in reference.logits(TOKENS)]),
        tiny_checkpoint("yarn").logits(TOKENS),
        rtol=1e-5,
    )


def test_the_command_says_that_short_texts_change(plain, tmp_path):
    done = CliRunner().invoke(build_command, [str(plain), "--yarn", "4", "--output", str(tmp_path / "engine")])
    assert done.exit_code == 0, done.output
    words = (
        "positions are stretched by YaRN, 4 times: one rotation for every length, which changes the answers to short"
    )
    assert words in done.stdout
    assert "a sequence may have 400 tokens" in done.stdout
    shown = CliRunner().invoke(inspect, [str(tmp_path / "engine")], catch_exceptions=False).stdout
    assert words in shown


@pytest.mark.parametrize(
    ("family", "tokens", "message"),
    [
        (
            "yarn",
            401,
            "--max-seq-len 401 is more than the 400 tokens the checkpoint was trained for; --yarn 5 stretches",
        ),
        ("dynamic", 641, "than the 640 tokens beyond which rope type 'dynamic' gives .*; --yarn 2 stretches them"),
        ("longrope", 321, "than the 320 tokens beyond which rope type 'longrope' gives .*; --yarn 2 stretches them"),
        ("llama3", 641, "--max-seq-len 641 is more than the 640 tokens the checkpoint was trained for$"),
    ],
)
def test_longer_texts_are_refused_with_what_would_work(family, tokens, message, tiny_checkpoint, tmp_path):
    with pytest.raises(BuildError, match=message):
        build(tiny_checkpoint(family).path, tmp_path / "engine", max_seq_len=tokens)
    if "--yarn" in message:
        factor = 5 if family == "yarn" else 2
        directory = build(tiny_checkpoint(family).path, tmp_path / "engine", max_seq_len=tokens, yarn=factor)
        assert Manifest.read(directory).limits.max_seq_len == tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"yarn": 4, "rope_scaling": "{}"}, "--yarn and --rope-scaling both say how positions are rotated"),
        ({"yarn": 1}, "yarn is 1, expected a number more than 1"),
        ({"rope_scaling": "{"}, "--rope-scaling '{' is not JSON .*, expected an object such as"),
        ({"rope_scaling": "[4]"}, r"--rope-scaling is '\[4\]', expected an object such as"),
        (
            {"rope_scaling": {"type": "su"}},
            "--rope-scaling: rope_scaling asks for rope type 'su', supported are default",
        ),
    ],
)
def test_what_is_no_rotation_is_refused(options, message, plain, tmp_path):
    with pytest.raises(BuildError, match=message):
        build(plain, tmp_path / "engine", **options)


def test_dual_chunk_attention_is_plain_attention_within_a_chunk(plain, tmp_path):
    config = json.loads((plain / "config.json").read_text())
    config["dual_chunk_attention_config"] = {"chunk_size": 64, "local_size": 8, "original_max_position_embeddings": 64}
    (plain / "config.json").write_text(json.dumps(config))
    assert Manifest.read(build(plain, tmp_path / "engine")).limits.max_seq_len == 64
    for options in ({"max_seq_len": 65}, {"yarn": 4}):
        with pytest.raises(
            (BuildError, UnsupportedModel), match="64 tokens of a chunk, up to which dual chunk attention"
        ):
            build(plain, tmp_path / "other", **options)
