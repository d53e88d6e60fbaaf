"""``/v1/responses`` with openai's client, unchanged: whole and streamed, thinking, a loop of tools, errors."""

import json

import openai
import pytest

from cases.scripted import last_question
from cases.serving import scripted_server

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TOOLS = [{"type": "function", "name": "weather", "parameters": {"type": "object"}}]


def reply(prompt):
    if "<tool_response>" in prompt:
        return "It is 7 degrees."
    question = last_question(prompt)
    if "json" in question:
        return '{"a": 5}'
    thought = "" if prompt.endswith("</think>\n\n") else "<think>\nHm.\n</think>\n\n"
    return thought + (f"I look.\n{CALL}\n{CALL}" if "weather" in question else question.upper())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with scripted_server(tmp_path_factory.mktemp("scripted"), reply) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def answered(client, stream, **fields):
    """The response, from a stream by its last event; what its deltas add up to is what it holds."""
    if not stream:
        return client.responses.create(model="m", **fields)
    text, arguments, numbers, response = "", [], [], None
    for event in client.responses.create(model="m", stream=True, **fields):
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            text += event.delta
        elif event.type == "response.function_call_arguments.delta":
            arguments[-1] += event.delta
        elif event.type == "response.output_item.added" and event.item.type == "function_call":
            arguments.append("")
        elif event.type in ("response.completed", "response.incomplete"):
            response = event.response
    assert numbers == list(range(len(numbers)))
    assert text == response.output_text
    assert arguments == [item.arguments for item in response.output if item.type == "function_call"]
    return response


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer(client, stream):
    response = answered(client, stream, input="Hallo Köln", instructions="Be brief.")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert (response.output_text, response.output[0].content[0].text) == ("HALLO KÖLN", "Hm.")
    assert (response.status, response.model, response.instructions) == ("completed", "scripted", "Be brief.")
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens_details.reasoning_tokens == len("\nHm.\n") + 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut(client, stream):
    response = answered(client, stream, input="abcdef", max_output_tokens=3, reasoning={"effort": "none"})
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output_text == "ABC"


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_tools(client, server, stream):
    items = [{"role": "user", "content": [{"type": "input_text", "text": "The weather?"}]}]
    response = answered(client, stream, input=items, tools=TOOLS)
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    calls = response.output[2:]
    assert [json.loads(call.arguments) for call in calls] == [{"city": "Köln"}] * 2
    items += [item.model_dump(exclude_none=True) for item in response.output]
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": "7"} for call in calls]
    assert answered(client, stream, input=items, tools=TOOLS).output_text == "It is 7 degrees."
    llm = server.serving.opened.llm
    prompt = llm.tokenizer.decode(llm.core.engine.seen[-1].prompt, False)
    assert prompt.count('{"name": "weather", "arguments": {"city": "Köln"}}') == 2
    assert prompt.count("<think>\nHm.\n</think>\n\nI look.") == 1


def test_a_schema(client):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": False}}
    response = client.responses.create(model="m", input="json", text=form, reasoning={"effort": "none"})
    assert json.loads(response.output_text) == {"a": 5}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"previous_response_id": "resp_1"}, "nothing is stored here"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0 is of type 'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0 has {'type': 'input_image'}"),
        ({"input": []}, "input is [], expected a text, or items"),
        ({"text": {"format": 5}}, "response_format is 5: expected a valid dictionary"),
        ({"input": 5}, "input is 5"),
        ({"tools": [{"type": "web_search"}]}, "tools.0 is of type 'web_search', and this server runs no tools"),
        ({"max_output_tokens": 0}, "is 0, expected a whole number"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort is 5"),
        ({"text": {"format": {"type": "xml"}}}, "response_format is {'type': 'xml'}"),
    ],
)
def test_what_cannot_be(client, fields, says):
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="m", input="x", extra_body=fields)
    assert says in error.value.response.json()["error"]["message"]
