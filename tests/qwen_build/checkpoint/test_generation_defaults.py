"""generation_config.json: what engines have of it, and every request it asks for beside that, named."""

from __future__ import annotations

import math

import pytest
import transformers

from qwen_build.checkpoint.generation_defaults import (
    DEFAULTS,
    MISSING,
    WITHOUT_EFFECT,
    generation_defaults,
)
from qwen_engine.errors import CheckpointError
from qwen_run.sampling.params import SamplingParams


def defaults_of(config):
    return generation_defaults(config, vocab_size=100)


def test_what_qwen_publishes_is_kept_as_it_is():
    published = {
        "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
        "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
    }  # fmt: skip
    assert defaults_of(published | {"transformers_version": "4.37.0"}) == (published, ())


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 20.0}, {"top_k": 20}),
        ({"temperature": 1e-7}, {"temperature": 1e-6}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"max_new_tokens": 5.0}, {"max_new_tokens": 5}),
        ({"top_k": None, "min_p": None}, {}),
        ({"stop_strings": "a"}, {"stop_strings": ["a"]}),
        ({"forced_eos_token_id": 2}, {"forced_eos_token_id": [2]}),
        ({"num_beams": 1, "length_penalty": 2.0}, {}),
    ],
    ids=str,
)
def test_other_spellings_become_those_that_requests_take(asked, kept):
    assert defaults_of(asked) == (kept, ())


@pytest.mark.parametrize(
    ("asked", "note"),
    [
        ({"temperature": "0.7"}, "temperature '0.7' is left out, expected a number from 0 to 100."),
        ({"temperature": math.nan}, "temperature nan is left out"),
        ({"top_p": 1.5}, "top_p 1.5 is left out, expected a number from 0 to 1."),
        ({"top_k": 2.5}, "top_k 2.5 is left out"),
        ({"top_k": math.inf}, "top_k inf is left out"),
        ({"repetition_penalty": 0}, "repetition_penalty 0 is left out"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 is left out, expected a whole number, 1 or more."),
        ({"do_sample": "yes"}, "do_sample 'yes' is left out, expected true or false."),
        ({"suppress_tokens": 5}, "suppress_tokens 5 is left out, expected at most 1048576 token ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids [[]] is left out, expected at most 16384 lists of 1 to 256"),
        ({"forced_bos_token_id": 100}, "forced_bos_token_id 100 is left out, expected a token id from 0 to 99."),
        ({"stop_strings": [""]}, "stop_strings [''] is left out, expected at most 64 texts"),
        ({"min_length": -1}, "min_length -1 is left out, expected a whole number, 0 or more."),
        ({"num_beams": 1000}, "num_beams 1000 is left out, expected a whole number from 1 (off) to 128."),
        ({"typical_p": 0.9}, "typical_p 0.9 is left out, engines do not have it."),
        ({"use_foo": 1}, "use_foo is unknown and left unread."),
    ],
    ids=str,
)
def test_what_engines_do_not_have_is_named(asked, note):
    defaults, (said,) = defaults_of(asked)
    assert defaults == {}
    assert said.startswith(f"generation_config.json: {note}")


HONOURED = {
    "suppress_tokens": [5], "begin_suppress_tokens": [5], "bad_words_ids": [[1], [2, 3]], "no_repeat_ngram_size": 3,
    "forced_bos_token_id": 1, "forced_eos_token_id": [2], "stop_strings": ["a", "b"], "max_length": 30,
    "min_length": 3, "min_new_tokens": 4,
}  # fmt: skip


def test_rules_of_tokens_and_lengths_are_defaults_without_a_word():
    assert defaults_of(HONOURED) == (HONOURED, ())


def test_beams_are_defaults_of_generate_alone_and_named():
    asked = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True}
    defaults, (beams, answers) = defaults_of(asked)
    assert defaults == asked
    assert "num_beams 3 is a default of QwenForCausalLM.generate alone" in beams
    assert "requests ask for it with --num-beams" in beams
    assert "num_return_sequences 2 is a default of QwenForCausalLM.generate alone" in answers
    defaults, (said,) = defaults_of(asked | {"do_sample": True, "num_return_sequences": 1})
    assert defaults == {"do_sample": True, "num_return_sequences": 1}
    assert "num_beams 3 is left out: with do_sample it draws its beams" in said


def test_ids_that_the_model_does_not_have_are_left_out_and_named():
    asked = {"suppress_tokens": [5, 100, 3], "bad_words_ids": [[1, 100], [2]], "forced_eos_token_id": [99, 400]}
    defaults, notes = defaults_of(asked)
    assert defaults == {"suppress_tokens": [5, 3], "bad_words_ids": [[2]], "forced_eos_token_id": [99]}
    assert [note.split(": ")[1].split(" is left")[0] for note in notes] == [
        "[100] of suppress_tokens", "[[1, 100]] of bad_words_ids", "[400] of forced_eos_token_id",
    ]  # fmt: skip
    SamplingParams.from_generation_config(defaults).check_vocabulary(100)


def test_an_end_of_answer_that_is_no_token_is_refused():
    with pytest.raises(CheckpointError, match=r"eos_token_id is '<\|im_end\|>', expected a token id or a list of them"):
        defaults_of({"eos_token_id": "<|im_end|>"})


def test_every_key_of_transformers_is_known_and_its_defaults_ask_for_nothing():
    keys = set(vars(transformers.GenerationConfig())) - {"_from_model_config"}
    assert keys <= DEFAULTS.keys() | MISSING.keys() | WITHOUT_EFFECT
    _, notes = defaults_of(transformers.GenerationConfig._get_default_generation_params())
    assert notes == ()


@pytest.mark.parametrize(
    "value", [-1, 0, 1, 1e-9, 0.5, 20.0, 1e9, math.nan, math.inf, True, "1", [], {}, [3], [[3]]], ids=repr
)
@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() - {"eos_token_id"}))
def test_whatever_the_file_says_every_request_can_be_made(name, value):
    defaults, _ = defaults_of({"do_sample": True, name: value})
    params = SamplingParams.from_generation_config(defaults)  # refuses what no request can have
    assert params.greedy or params.temperature > 0
