"""The options of a request: what each may be, which exclude each other, and what a checkpoint asks for."""

import dataclasses
import re

import pytest

from qwen_engine.errors import RequestError
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.rules import (
    MAX_STOP_CHARACTERS,
    MAX_STOP_TEXTS,
    RULES,
    checked,
)

BEAMS = {"temperature": 0, "num_beams": 3}


def test_every_option_has_a_rule_and_every_default_keeps_it():
    assert list(RULES) == [field.name for field in dataclasses.fields(SamplingParams)]
    SamplingParams()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"), ("temperature", 1e-9),
        ("temperature", 1e300), ("temperature", 10**400), ("temperature", None), ("temperature", True),
        ("top_p", 1.1), ("top_p", -0.1), ("top_k", -1), ("top_k", 2.5), ("top_k", True),
        ("repetition_penalty", 0), ("repetition_penalty", float("inf")),
        ("repetition_penalty", 1e-46), ("repetition_penalty", 1e300), ("seed", -1), ("seed", 2**64), ("seed", "1"),
        ("max_tokens", 0), ("max_tokens", 1.0), ("max_length", 0), ("min_length", -1), ("no_repeat_ngram_size", -1),
        ("suppress_tokens", 5), ("begin_suppress_tokens", [-1]), ("bad_words_ids", [5]), ("bad_words_ids", [[]]),
        ("bad_words_ids", [[1] * 257]), ("forced_bos_token_id", [1]), ("forced_eos_token_id", ["1"]),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", float("nan")),
        ("presence_penalty", 2.1), ("presence_penalty", "1"), ("frequency_penalty", -2.1),
        ("logit_bias", {3: 101}), ("logit_bias", {3: float("nan")}), ("logit_bias", {-1: 1}), ("logit_bias", {"x": 1}),
        ("logit_bias", {1.5: 1}), ("logit_bias", {3: None}), ("logit_bias", [3]), ("logit_bias", 3),
        ("n", 0), ("n", 1025), ("n", 1.5), ("stop", ""), ("stop", ["a", ""]), ("stop", [1]), ("stop", 1),
        ("stop_token_ids", [-1]), ("stop_token_ids", ["1"]), ("stop_token_ids", 5), ("stop_token_ids", [True]),
        ("include_stop_str_in_output", 1), ("ignore_eos", "yes"), ("min_tokens", -1), ("min_tokens", None),
        ("logprobs", -1), ("logprobs", True), ("logprobs", 1.5), ("prompt_logprobs", -1),
        ("num_beams", 0), ("num_beams", 129), ("length_penalty", 6), ("length_penalty", float("nan")),
        ("early_stopping", "always"), ("early_stopping", 1), ("early_stopping", None),
    ],
)  # fmt: skip
def test_values_out_of_range(name, value):
    with pytest.raises(RequestError, match=f"^{name} is .*, expected {re.escape(RULES[name].expected)}"):
        SamplingParams(**{name: value})
    with pytest.raises(RequestError, match=f"^{name} is "):
        checked(name, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, expected at most max_tokens, which is 8"),
        ({"num_beams": 3}, "num_beams is 3 at temperature 1.0: .*; set temperature to 0"),
        ({**BEAMS, "n": 4}, "n is 4, expected at most num_beams, which is 3"),
        ({**BEAMS, "logprobs": 0}, "logprobs is 0 with num_beams 3"),
        ({**BEAMS, "stop": "x"}, r"stop is \('x',\) with num_beams 3: .*; use stop_token_ids"),
        ({"length_penalty": 2.0}, "length_penalty is 2.0 .*; set num_beams"),
        ({"early_stopping": True}, "length_penalty is 1.0 and early_stopping True .*; set num_beams"),
    ],
)
def test_contradictions(options, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        SamplingParams(**options)
    for name, value in options.items():  # each of them alone is fine
        checked(name, value)


HUGE = (2**64, 10**400, 10**5000)


@pytest.mark.parametrize("name", list(RULES))
def test_no_number_and_no_list_is_without_bounds(name):
    for value in HUGE:
        for given in (value, [value], {value: 1}, [(1, value)], [[value]], "x" * 10_000, ["x"] * 2000):
            with pytest.raises(RequestError, match=f"^{name} is ") as found:
                SamplingParams(**{name: given})
            assert len(str(found.value)) < 300


def test_lists_have_a_most_length(monkeypatch):
    monkeypatch.setattr("qwen_run.sampling.rules.MAX_TOKEN_IDS", 100)
    for name, most, item in (("stop", MAX_STOP_TEXTS, "x"), ("stop_token_ids", 100, 7), ("logit_bias", 100, None)):
        longest = [item] * most if item else [(i, 1.0) for i in range(most)]
        SamplingParams(**{name: longest})
        with pytest.raises(RequestError, match=f"^{name} is "):
            SamplingParams(**{name: [*longest, item or (most, 1.0)]})
    SamplingParams(stop="x" * MAX_STOP_CHARACTERS)


def test_a_stop_text_with_a_lone_surrogate_is_refused():
    for stop in ("\ud800", ["ok", "a\udfff"]):
        with pytest.raises(RequestError, match=r"^stop is .*, expected .* none of them a lone surrogate$"):
            SamplingParams(stop=stop)


def test_what_goes_together():
    for options in (
        BEAMS | {"n": 3, "length_penalty": -1, "early_stopping": "never", "min_tokens": 4, "repetition_penalty": 1.1},
        BEAMS | {"top_k": 50, "prompt_logprobs": 2, "ignore_eos": True, "stop_token_ids": (3,)},
        {"n": 7, "min_tokens": 512},
        {"n": 7, "temperature": 0},
    ):
        params = SamplingParams(**options)
        assert {name: getattr(params, name) for name in options} == options


def test_collections_are_kept_in_one_form():
    params = SamplingParams(logit_bias={"7": 1, 3: -2.5}, stop="x", stop_token_ids={4})
    assert (params.biases, params.stop_strings, params.stop_token_ids) == (((3, -2.5), (7, 1)), ("x",), (4,))
    assert dataclasses.replace(params, seed=None) == params
    assert hash(dataclasses.replace(params)) == hash(params)
    none = SamplingParams(logit_bias=None, stop=None, stop_token_ids=None)
    assert none == SamplingParams(logit_bias={}, stop=[], stop_token_ids=[]) == SamplingParams()


def test_stop_ids():
    assert SamplingParams(stop_token_ids=[3, 4]).stop_ids({9, 4}) == {3, 4, 9}
    assert SamplingParams(stop_token_ids=[3, 4], ignore_eos=True).stop_ids({9, 4}) == {3, 4}
    assert SamplingParams().stop_ids([]) == frozenset()


def test_tokens_the_model_does_not_have():
    SamplingParams(logit_bias={9: 1}, stop_token_ids=[9]).check_vocabulary(10)
    with pytest.raises(RequestError, match=r"^logit_bias holds token 10, expected 0 to 9$"):
        SamplingParams(logit_bias={10: 1}).check_vocabulary(10)
    with pytest.raises(RequestError, match=r"^stop_token_ids holds token 11, expected 0 to 9$"):
        SamplingParams(stop_token_ids=[3, 11]).check_vocabulary(10)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingParams(0, top_k=50)),
        ({"do_sample": False, "temperature": 0.7}, SamplingParams(0, top_k=50)),
        ({"do_sample": True}, SamplingParams(1.0, top_k=50)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
         SamplingParams(0.7, 0.8, 20, 1.05)),
        ({"do_sample": True, "top_k": 0, "top_p": None, "max_new_tokens": 2048}, SamplingParams(1.0, max_tokens=2048)),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1}, SamplingParams(1.0, min_p=0.1)),
        ({"max_length": 30}, SamplingParams(0, top_k=50, max_tokens=None, max_length=30)),
        ({"max_length": 30, "max_new_tokens": 9}, SamplingParams(0, top_k=50, max_tokens=9, max_length=30)),
        ({"min_new_tokens": 600}, SamplingParams(0, top_k=50, min_tokens=512)),
        ({"stop_strings": ["x"], "min_new_tokens": 3, "bad_words_ids": [[1, 2]], "forced_eos_token_id": 4},
         SamplingParams(0, top_k=50, stop="x", min_tokens=3, bad_words_ids=((1, 2),), forced_eos_token_id=(4,))),
    ],
)  # fmt: skip
def test_generation_config(config, expected):
    assert SamplingParams.from_generation_config(config) == expected


def test_what_a_request_says_goes_before_the_defaults_that_it_excludes():
    defaults = SamplingParams(
        0, max_tokens=None, max_length=30, min_tokens=20, min_length=9, stop="x", suppress_tokens=[3]
    )
    for given, expected in (
        ({}, {}),
        ({"max_tokens": 5}, {"max_tokens": 5, "max_length": None, "min_tokens": 5}),
        ({"max_tokens": 25}, {"max_tokens": 25, "max_length": None}),
        ({"min_tokens": 0}, {"min_tokens": 0, "min_length": 0}),
        ({"num_beams": 3}, {"num_beams": 3, "stop": ()}),
        ({"detokenize": False}, {"detokenize": False, "stop": ()}),
        ({"stop": None}, {"stop": ()}),
        ({"suppress_tokens": []}, {"suppress_tokens": ()}),
    ):
        assert defaults.with_options(**given) == dataclasses.replace(defaults, **expected)
    for given in ({"max_tokens": 5, "min_tokens": 6}, {"num_beams": 3, "stop": "y"}, {"temperature": -1}):
        with pytest.raises(RequestError, match=f"^{list(given)[-1]} is "):
            defaults.with_options(**given)


def test_lengths_of_prompt_and_answer_together():
    params = SamplingParams(max_tokens=None, max_length=30, min_length=10)
    assert (params.most_tokens(12), params.least_tokens(4), params.least_tokens(12)) == (18, 6, 0)
    assert dataclasses.replace(params, max_tokens=7).most_tokens(12) == 7
    assert dataclasses.replace(params, min_tokens=2).least_tokens(4) == 2
    assert SamplingParams(max_tokens=None).most_tokens(12) > 2**30
