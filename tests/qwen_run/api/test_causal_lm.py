"""EngineForCausalLM, which needs no torch: equal to transformers' generate, and every rule of its settings."""

import dataclasses
import doctest
import inspect
import pydoc
from pathlib import Path

import numpy as np
import pytest
import torch

from cases.scripted import core_tokenizer
from cases.tiny import FAMILIES, TINY
from cases.torch_pair import PAD, ROWS, padded
from qwen_engine.errors import EngineError
from qwen_run import EngineConfig, QwenForCausalLM
from qwen_run.api import generate_options
from qwen_run.api.causal_lm import EngineForCausalLM
from qwen_run.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint("qwen3-tied")


@pytest.fixture(scope="module")
def engine(checkpoint, build_engine):
    return build_engine(checkpoint.path, quant="none")


@pytest.fixture(scope="module")
def model(engine):
    return EngineForCausalLM.from_pretrained(engine, engine_config={"batch_size": 3})


def hf_generate(checkpoint, ids, mask, **options):
    return checkpoint.model.generate(
        ids, attention_mask=mask, pad_token_id=PAD, **{"do_sample": False, "max_new_tokens": 12} | options
    )


def frequent_token(checkpoint):
    """A token that transformers' answers hold early, to end them at."""
    ids, mask = padded(ROWS)
    return int(hf_generate(checkpoint, ids, mask)[1, ids.shape[1] + 3])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": None, "max_length": 15},
        {"repetition_penalty": 1.3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
        {"min_new_tokens": 6},
    ],
)
@pytest.mark.parametrize("ends", [False, True])
def test_greedy_and_beams_equal_transformers(checkpoint, model, options, ends):
    ids, mask = padded(ROWS)
    if options.get("repetition_penalty"):  # transformers' penalty falls on padding too
        ids, mask = ids[:1], mask[:1]
    eos = {"eos_token_id": frequent_token(checkpoint)} if ends else {}
    expected = hf_generate(checkpoint, ids, mask, **options, **eos)
    found = model.generate(ids, mask, pad_token_id=PAD, **{"max_new_tokens": 12} | options, **eos)
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == expected.tolist()
    assert not ends or options or (found == PAD).any()


def test_padding_may_be_left_right_or_found_by_its_token(model):
    left, left_mask = padded(ROWS)
    right, right_mask = padded(ROWS, left=False)
    expected = model.generate(left, left_mask, pad_token_id=PAD)[:, 7:].tolist()
    assert model.generate(right, right_mask, pad_token_id=PAD)[:, 7:].tolist() == expected
    assert model.generate(left, pad_token_id=PAD)[:, 7:].tolist() == expected
    for row, answer in zip(ROWS, expected, strict=True):
        assert model.generate(np.array([row]))[0, len(row) :].tolist() == answer


def test_numpy_in_numpy_out(model):
    found = model.generate(np.array(ROWS[:1], np.int32), max_new_tokens=4)
    assert (type(found), found.dtype, found.shape) == (np.ndarray, np.int64, (1, 11))


def test_samples_differ_by_row_and_seed_and_come_back(model):
    ids = np.array([ROWS[0]] * 2)
    options = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2, "max_new_tokens": 8}
    first = model.generate(ids, **options, seed=0)
    assert len({tuple(row) for row in first.tolist()}) == len(first) == 4
    assert model.generate(ids, **options, seed=0).tolist() == first.tolist()
    for seed in (9, None, None):
        assert model.generate(ids, **options, seed=seed).tolist() != first.tolist()


def test_more_rows_than_the_batch(engine, model):
    small = EngineForCausalLM.from_pretrained(engine)
    ids, mask = padded(ROWS * 3)
    expected = model.generate(*padded(ROWS), pad_token_id=PAD).tolist() * 3
    assert small.generate(ids, mask, pad_token_id=PAD).tolist() == expected


def test_defaults_of_the_checkpoint(model, monkeypatch):
    answer = model.generate(np.array(ROWS[:1]))[0]
    first = next(place for place in (10, 9, 8) if answer[place] not in answer[7:place])  # of five new tokens
    config = {"max_new_tokens": 5, "eos_token_id": [int(answer[first])], "pad_token_id": 1}
    monkeypatch.setattr(model, "generation_config", config)
    assert model.generate(np.array(ROWS[:1])).shape == (1, first + 1)
    assert model.generate(np.array(ROWS[:1]), eos_token_id=129).shape == (1, 12)
    assert model.generate(np.array(ROWS[:1]), eos_token_id=129, max_length=9).shape == (1, 9)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"input_ids": None}, "input_ids is None, expected integers"),
        ({"input_ids": np.array([1, 2])}, r"input_ids is int64 \(2,\), expected integers \(rows, length\)"),
        ({"input_ids": np.array([[0.5]])}, "input_ids is float64"),
        ({"input_ids": np.zeros((2, 0), int)}, "neither of them 0"),
        ({"input_ids": np.array([[131]])}, "row 0 holds token 131, expected 0 to 130"),
        ({"attention_mask": np.array([[1, 1]])}, "attention_mask is"),
        ({"attention_mask": np.array([[1, 2, 1]])}, "expected 0 and 1"),
        ({"attention_mask": np.array([[0, 0, 0]])}, "row 0 of input_ids is all padding"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids has rows of different lengths"),
        ({"max_length": "3"}, "max_length is '3', expected a whole number"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0, expected a whole number"),
        ({"seed": None, "max_new_tokens": "x"}, "max_new_tokens is 'x', expected a whole number"),
        ({"do_sample": "yes"}, "do_sample is 'yes', expected True or False"),
        ({"temperature": "hot", "do_sample": True}, "temperature is 'hot', expected 0"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x', expected a token id or a list of them"),
        ({"pad_token_id": [None]}, r"pad_token_id is \[None\], expected a token id"),
        ({"max_length": 3}, "max_length is 3, expected more than the 3 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected 1 or more"),
        ({"input_ids": np.ones((1, 640), int)}, "input_ids has 640 columns, expected less than max_seq_len"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1"),
        ({"num_beams": 200}, "num_beams is 200"),
        ({"inputs_embeds": np.zeros((1, 2, 3))}, "inputs_embeds is given, .*; give the token ids as input_ids, or"),
    ],
)
def test_wrong_arguments_are_value_errors(model, options, says):
    with pytest.raises(ValueError, match=says):
        model.generate(**{"input_ids": np.array([[1, 2, 3]])} | options)


# -- where models come from


def test_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="path is 3, expected the path of an engine or a checkpoint"):
        EngineForCausalLM.from_pretrained(3)
    with pytest.raises(ValueError, match="engine_config is 3, expected an EngineConfig"):
        EngineForCausalLM.from_pretrained(tmp_path, engine_config=3)
    with pytest.raises(ValueError, match="model is 3, expected a transformers model"):
        EngineForCausalLM.from_model(3)


def test_a_disk_that_is_full_for_a_model(checkpoint, monkeypatch, tmp_path):
    def save_pretrained(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.model, "save_pretrained", save_pretrained)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(EngineError, match=r"cannot be saved to .*: .*No space left on device; set TMPDIR"):
        EngineForCausalLM.from_model(checkpoint.model)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_exported_once(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = {"quantization": "none", "max_seq_len": 64, "kvcache_block_size": 32, "kvcache_num_blocks": 2}
    model = EngineForCausalLM.from_pretrained(checkpoint.path, export=True, engine_config=config)
    ids, mask = padded(ROWS)
    assert (
        model.generate(ids, mask, pad_token_id=PAD, max_new_tokens=12).tolist()
        == hf_generate(checkpoint, ids, mask).tolist()
    )
    assert model.engine.manifest.cache.block_size == 32
    (engine,) = (tmp_path / "qwen-engine" / "engines").glob("[!.]*")
    before = engine.stat().st_ino
    EngineForCausalLM.from_pretrained(checkpoint.path, export=True, engine_config=config)
    assert [path.stat().st_ino for path in engine.parent.glob("[!.]*")] == [before]


def test_a_model_is_built_from_memory_and_saved(checkpoint, tmp_path):
    model = EngineForCausalLM.from_model(checkpoint.model, EngineConfig(quantization="none", max_seq_len=100))
    ids, mask = padded(ROWS)
    expected = hf_generate(checkpoint, ids, mask).tolist()
    assert model.generate(ids, mask, pad_token_id=PAD, max_new_tokens=12).tolist() == expected
    scratch = Path(model._scratch.name)
    model.save_pretrained(tmp_path / "new" / "saved")
    with pytest.raises(EngineError, match="saved is not empty"):
        model.save_pretrained(tmp_path / "new" / "saved")
    assert scratch.exists()
    model.close()
    assert not scratch.exists()
    again = EngineForCausalLM.from_pretrained(tmp_path / "new" / "saved")
    assert again.generate(ids, mask, pad_token_id=PAD, max_new_tokens=12).tolist() == expected
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]


def test_a_model_is_built_with_its_tokenizer(checkpoint, tmp_path):
    import transformers

    core = core_tokenizer()
    config = transformers.AutoConfig.for_model(**TINY | FAMILIES["qwen2"] | {"vocab_size": 283})
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    model = EngineForCausalLM.from_model(transformers.AutoModelForCausalLM.from_config(config), tokenizer=tokenizer)
    found = Tokenizer.load(model.engine.directory)
    assert list(found.encode("the cache")) == core.encode("the cache", add_special_tokens=False).ids
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    model.close()
    with pytest.raises(ValueError, match="tokenizer is 'qwen2', expected a transformers tokenizer"):
        EngineForCausalLM.from_model(checkpoint.model, tokenizer="qwen2")


def test_export_says_what_the_path_is(checkpoint, engine, tmp_path):
    with pytest.raises(ValueError, match=r"export is True and .* is an engine already"):
        EngineForCausalLM.from_pretrained(engine, export=True)
    with pytest.raises(ValueError, match="is a checkpoint, expected an engine; pass export=True"):
        EngineForCausalLM.from_pretrained(checkpoint.path)
    with pytest.raises(EngineError, match="does not exist"):
        EngineForCausalLM.from_pretrained(tmp_path / "absent")


# -- help and messages


@pytest.mark.parametrize("model", [EngineForCausalLM, QwenForCausalLM])
def test_help_shows_every_option_of_generate(model):
    options = {field.name for field in dataclasses.fields(generate_options.GenerateOptions)}
    assert options < inspect.signature(model.generate).parameters.keys()
    assert "max_new_tokens: 'int | None' = None" in pydoc.render_doc(model.generate).replace("\n", " ")


def test_options_have_the_names_of_transformers_in_messages_too(tiny_checkpoint, build_engine):
    directory = build_engine(tiny_checkpoint("qwen3-tied").path, quant="none")
    model = EngineForCausalLM.from_pretrained(directory)
    for options, says in (
        (
            {"min_new_tokens": 9, "max_new_tokens": 8},
            "min_new_tokens is 9, expected at most max_new_tokens, which is 8",
        ),
        ({"num_return_sequences": 0}, "num_return_sequences is 0, expected"),
    ):
        with pytest.raises(ValueError, match=f"^{says}"):
            model.generate([[1, 2]], **options)
    with pytest.raises(TypeError, match="generate has no 'max_tokens', expected max_new_tokens"):
        model.generate([[1, 2]], max_tokens=3)
    assert doctest.testmod(generate_options).failed == 0
