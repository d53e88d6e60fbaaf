"""A sample of the random schemas of ``fuzz.schemas``: each is answered by an instance of it, or refused by name."""

import json

import pytest

from cases.schemas import KINDS, schemas
from cases.serving import running
from fuzz.schemas import complaint, findings

# a form demands what is a token of the model's: as text, not as that token
MARKS = ("a</tool_call>b", "<think>", "<|im_end|>", "<工具 x>")


def test_schemas_are_kept_to_or_refused(chat_engine):
    ends, lines = findings(chat_engine, seed=0, count=len(KINDS) + 10)
    assert lines == []
    assert ends["valid"] > len(KINDS) / 2
    assert ends["refused"] >= 2


def test_the_same_schemas_for_the_same_seed():
    assert list(schemas(1, 60)) == list(schemas(1, 60)) != list(schemas(2, 60))


@pytest.mark.parametrize(
    ("text", "schema", "says"),
    [
        ("5", {"type": "integer"}, None),
        ("5.5", {"type": "integer"}, "'5.5' is no instance: 5.5 is not of type 'integer'"),
        ('{"a": ', {}, "is no instance: Expecting value"),
        ('"1"', {"type": "string", "format": "ipv4"}, "is not a 'ipv4'"),
        ("5", {"type": "whole"}, "answered to what is no schema"),
    ],
)
def test_a_wrong_answer_is_found(text, schema, says):
    found = complaint(text, schema)
    assert found == says or says in found


def test_control_tokens_in_a_schema_are_text(chat_engine):
    with running(chat_engine, options={"max_seq_len": 2048}) as server:
        for mark in MARKS:
            schema = {"type": "object", "properties": {mark: {"const": mark}}, "required": [mark]}
            form = {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {**schema, "additionalProperties": False}},
            }
            (choice,) = server.chat(max_tokens=400, reasoning_effort="none", response_format=form)["choices"]
            assert json.loads(choice["message"]["content"]) == {mark: mark}


def test_a_form_that_cannot_be_followed_any_further_is_the_requests_fault(chat_engine):
    with running(chat_engine, options={"max_seq_len": 640}) as server:
        body = {"prompt": "x", "guided_regex": "a?" * 3000, "max_tokens": 9}
        response = server.post("/v1/completions", body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")
        assert "the form of the answer cannot be kept to" in response.json()["error"]["message"]
        assert server.stream("/v1/completions", body)[-1]["error"]["code"] == "invalid_request"
