"""generation_config.json: what engines have of it, and every request it asks for beside that, named."""

from __future__ import annotations

import math

import pytest
import transformers

from qwen_build.checkpoint.generation_defaults import (
    DEFAULTS,
    LEFT_TO_REQUESTS,
    MISSING,
    WITHOUT_EFFECT,
    generation_defaults,
)
from qwen_engine.errors import CheckpointError
from qwen_run.sampling.params import SamplingParams


def test_what_qwen_publishes_is_kept_as_it_is():
    published = {
        "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
        "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
    }  # fmt: skip
    assert generation_defaults(published | {"transformers_version": "4.37.0"}) == (published, ())


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 20.0}, {"top_k": 20}),
        ({"temperature": 1e-7}, {"temperature": 1e-6}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"max_new_tokens": 5.0}, {"max_new_tokens": 5}),
        ({"top_k": None, "min_p": None}, {}),
    ],
    ids=str,
)
def test_other_spellings_become_those_that_requests_take(asked, kept):
    assert generation_defaults(asked) == (kept, ())


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
        ({"suppress_tokens": [5]}, "suppress_tokens [5] is no default; requests ask for it with logit_bias."),
        ({"stop_strings": ["a"]}, "stop_strings ['a'] is no default; requests ask for it with --stop."),
        ({"num_beams": 3}, "num_beams 3 is no default; requests ask for it with --num-beams."),
        ({"bad_words_ids": [[1]]}, "bad_words_ids [[1]] is left out, engines do not have it."),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id 2 is left out, engines do not have it."),
        ({"typical_p": 0.9}, "typical_p 0.9 is left out, engines do not have it."),
        ({"use_foo": 1}, "use_foo is unknown and left unread."),
    ],
    ids=str,
)
def test_what_engines_do_not_have_is_named(asked, note):
    defaults, (said,) = generation_defaults(asked)
    assert defaults == {}
    assert said.startswith(f"generation_config.json: {note}")


def test_a_length_of_prompt_and_answer_is_kept_for_those_who_count_so_and_named():
    defaults, (said,) = generation_defaults({"max_length": 30})
    assert defaults == {"max_length": 30}
    assert "max_length 30 is no default; requests ask for it with --max-new-tokens" in said


def test_an_end_of_answer_that_is_no_token_is_refused():
    with pytest.raises(CheckpointError, match=r"eos_token_id is '<\|im_end\|>', expected a token id or a list of them"):
        generation_defaults({"eos_token_id": "<|im_end|>"})


def test_every_key_of_transformers_is_known_and_its_defaults_ask_for_nothing():
    keys = set(vars(transformers.GenerationConfig())) - {"_from_model_config"}
    assert keys <= DEFAULTS.keys() | LEFT_TO_REQUESTS.keys() | MISSING.keys() | WITHOUT_EFFECT
    _, notes = generation_defaults(transformers.GenerationConfig._get_default_generation_params())
    assert notes == ()


@pytest.mark.parametrize("value", [-1, 0, 1, 1e-9, 0.5, 20.0, 1e9, math.nan, math.inf, True, "1", [], {}], ids=repr)
@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() - {"eos_token_id"}))
def test_whatever_the_file_says_every_request_can_be_made(name, value):
    defaults, _ = generation_defaults({"do_sample": True, name: value})
    params = SamplingParams.from_generation_config(defaults)  # refuses what no request can have
    assert params.greedy or params.temperature > 0
