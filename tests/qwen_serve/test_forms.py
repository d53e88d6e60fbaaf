"""Forced calls and forms of answers over HTTP: a tiny model with random weights, at a high temperature."""

import json
import re

import jsonschema
import openai
import pydantic
import pytest

from cases.scripted import core_tokenizer, scripted_model, write_text_files
from cases.serving import running
from qwen_run.text.tokenizer import Tokenizer
from qwen_serve.openai.tools import Tools

CITY = {"type": "string", "maxLength": 8}
WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": CITY},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {},
                                                                      "additionalProperties": False}}},
]  # fmt: skip
HOT = {"temperature": 1.5, "max_tokens": 400, "reasoning_effort": "none"}


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    alive: bool
    age: int = pydantic.Field(ge=0, le=120)


@pytest.fixture(scope="module")
def server(chat_engine):
    with running(chat_engine, options={"max_seq_len": 2048}) as found:
        yield found
        found.wait_until_idle()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_call_must_come(server, seed, stream):
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "tool_choice": "required", "seed": seed}
    if stream:
        calls, reason = [], None
        for chunk in server.stream("/v1/chat/completions", {**body, **HOT}):
            for choice in chunk["choices"]:
                for call in choice["delta"].get("tool_calls", []):
                    calls += [{"name": "", "arguments": ""}] * (call["index"] == len(calls))
                    calls[-1] = {name: calls[-1][name] + call["function"].get(name, "") for name in calls[-1]}
                assert not choice["delta"].get("content")
                reason = choice["finish_reason"] or reason
    else:
        choice = server.chat("x", **body, **HOT)["choices"][0]
        calls, reason = [call["function"] for call in choice["message"]["tool_calls"]], choice["finish_reason"]
        assert choice["message"]["content"] is None
    assert reason in ("tool_calls", "length")
    for call in calls if reason == "tool_calls" else calls[:-1]:
        schema = {"weather": WEATHER, "clock": TOOLS[1]["function"]["parameters"]}[call["name"]]
        jsonschema.validate(json.loads(call["arguments"]), schema)
    assert calls


@pytest.mark.parametrize("seed", range(3))
def test_one_call_of_the_tool_that_is_named(server, seed):
    named = {"type": "function", "function": {"name": "weather"}}
    fields = {"tools": TOOLS, "tool_choice": named, "parallel_tool_calls": False, "seed": seed}
    choice = server.chat("x", **fields, **HOT)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER)
    assert (call["function"]["name"], choice["finish_reason"]) == ("weather", "stop")


def test_a_call_comes_after_thinking(server):
    body = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "thinking_token_budget": 5}
    for seed in range(4):
        choice = server.chat("x", **body, seed=seed, temperature=1.5, max_tokens=400)["choices"][0]
        assert choice["message"]["tool_calls"]


def test_a_call_that_the_model_begins_keeps_to_a_strict_tool(tmp_path):
    """A model that would call what is not there, with arguments that are none."""
    said = 'I look.\n<tool_call>\n{"name": "sun", "arguments": {"x": [}}\n</tool_call>\nAnd <b>?'
    model, _ = scripted_model(write_text_files(tmp_path, "qwen3"), lambda prompt: said, max_seq_len=4000)
    with running(model) as server:
        choice = server.chat("x", tools=TOOLS[:1], max_tokens=300)["choices"][0]
        free = server.chat("x", tools=TOOLS[1:], max_tokens=300)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER)
    assert choice["message"]["content"].startswith("I look.")
    assert free["message"]["tool_calls"][0]["function"] == {"name": "sun", "arguments": '{"x": [}}'}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tool_choice": "required"}, "tool_choice is 'required', expected auto or none: no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "zz"}}},
         "expected auto, none, required or one of the tools weather, clock"),
        ({"tools": TOOLS, "tool_choice": {}}, "tool_choice is {}"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "leave one out"),
        ({"response_format": {"type": "xml"}}, "response_format is {'type': 'xml'}, expected"),
        ({"response_format": {"type": "json_schema"}}, "the last with json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}, "strict": True}}},
         'json cannot be kept to: Unimplemented keys: ["not"]'),
        ({"structured_outputs": {"regex": "("}}, "regex cannot be kept to"),
        ({"structured_outputs": {"regex": "a"}, "guided_choice": ["b"]}, "are given, expected one of them"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "leave them out"),
    ],
)  # fmt: skip
def test_what_cannot_be(server, fields, says):
    response = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], **fields})
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


def test_openai_parses_what_comes(client):
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="m", messages=[{"role": "user", "content": "x"}], response_format=Person, seed=seed, **HOT
        )
        assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-c]{4}"}, "[a-c]{4}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "x" "y"'}, "xy"),
        ({"structured_outputs": {"choice": ["ja"]}}, "ja"),
        ({"guided_json": {"const": 5}}, "5"),
    ],
)
def test_forms_by_vllms_names(server, fields, pattern):
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", None)):
        if body is None:
            text = server.chat("x", **fields, **HOT)["choices"][0]["message"]["content"]
        else:
            text = server.post(path, {**body, **fields, "temperature": 1.5}).json()["choices"][0]["text"]
        assert re.fullmatch(pattern, text)


def test_the_grammar_of_xml_calls():
    """What llguidance takes is what Qwen3-Coder's form is; it refuses anything else."""
    import llguidance

    tokenizer = Tokenizer(core_tokenizer())
    tools = Tools([], {"f": WEATHER, "g": None}, ("f", "g"))
    vocabulary = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=283, eos_token=[264])
    grammar = llguidance.LLMatcher.grammar_from_lark(tools.grammar(tokenizer, "<function=", True))
    assert llguidance.LLMatcher.validate_grammar(grammar, vocabulary) == ""
    begin, end = "<tool_call>\n", "\n</tool_call>"
    one = f"{begin}<function=f>\n<parameter=days>\n5\n</parameter>\n</function>{end}"
    cases = {
        f"{begin}<function=g>\n</function>{end}": True,
        one: False,  # the city is missing
        one.replace("<parameter=days>", '<parameter=city>\n"K"\n</parameter>\n<parameter=days>'): True,
        "5": False,
    }
    for text, is_call in cases.items():
        ids = tokenizer.encode(text)
        assert (llguidance.LLMatcher(vocabulary, grammar, log_level=0).validate_tokens(ids) == len(ids)) == is_call, (
            text
        )
