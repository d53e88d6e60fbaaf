"""``/v1/messages`` with Anthropic's client, unchanged: whole and streamed, thinking, a loop of tools, errors."""

import anthropic
import pytest

from cases.scripted import last_question, scripted_model, write_text_files
from cases.serving import running, scripted_server

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"name": "weather", "description": "The weather", "input_schema": SCHEMA}]


def reply(prompt):
    if "<tool_response>" in prompt:
        return "It is 7 degrees."
    question = last_question(prompt)
    thought = "" if prompt.endswith("</think>\n\n") else "<think>\nHm.\n</think>\n\n"
    return thought + (f"I look.\n{CALL}\n{CALL}" if "weather" in question else question.upper())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with scripted_server(tmp_path_factory.mktemp("scripted"), reply) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as found:
        yield found


def ask(client, content, **options):
    messages = [{"role": "user", "content": content}]
    return client.messages.create(**{"model": "m", "max_tokens": 200, "messages": messages, **options})


def read_prompt(server):
    llm = server.serving.opened.llm
    return llm.tokenizer.decode(llm.core.engine.seen[-1].prompt, False)


def test_an_answer(client):
    answer = ask(client, "Hallo Köln")
    assert [(block.type, block.text) for block in answer.content] == [("text", "HALLO KÖLN")]
    assert (answer.stop_reason, answer.model, answer.role) == ("end_turn", "scripted", "assistant")
    assert answer.usage.output_tokens == len("HALLO KÖLN") + 2
    assert answer.usage.input_tokens > 20


def test_a_stream(client):
    with client.messages.stream(
        model="m", max_tokens=200, messages=[{"role": "user", "content": [{"type": "text", "text": "Hallo"}]}]
    ) as stream:
        assert "".join(stream.text_stream) == "HALLO"
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == ask(client, "Hallo").usage.output_tokens


def test_thinking_is_asked_for(client):
    answer = ask(client, "Hi", thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert (answer.content[0].thinking, answer.content[1].text) == ("Hm.", "HI")
    with client.messages.stream(
        model="m", max_tokens=2000, messages=[{"role": "user", "content": "Hi"}],
        thinking={"type": "enabled", "budget_tokens": 1024},
    ) as stream:  # fmt: skip
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [(block.type, getattr(block, "thinking", None) or block.text) for block in final.content] == [
        ("thinking", "Hm."), ("text", "HI")
    ]  # fmt: skip
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_tools(client, server, stream):
    messages = [{"role": "user", "content": "The weather?"}]
    fields = {"model": "m", "max_tokens": 500, "tools": TOOLS, "system": [{"type": "text", "text": "Be brief."}]}
    if stream:
        with client.messages.stream(messages=messages, **fields) as found:
            answer = found.get_final_message()
    else:
        answer = client.messages.create(messages=messages, **fields)
    assert [block.type for block in answer.content] == ["text", "tool_use", "tool_use"]
    assert [block.input for block in answer.content[1:]] == [{"city": "Köln"}] * 2
    assert (answer.content[0].text, answer.stop_reason) == ("I look.", "tool_use")
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "7"}]}
               for block in answer.content[1:]]  # fmt: skip
    messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
    assert client.messages.create(messages=messages, **fields).content[0].text == "It is 7 degrees."
    prompt = read_prompt(server)
    assert prompt.count("<tool_response>\n7\n</tool_response>") == 2
    assert "system\nBe brief." in prompt
    assert '{"name": "weather", "arguments": {"city": "Köln"}}' in prompt


def test_what_ends_an_answer(client):
    answer = ask(client, "abc END def", stop_sequences=["END"])
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("ABC ", "stop_sequence", "END")
    assert ask(client, "abcdef", max_tokens=3).stop_reason == "max_tokens"


def test_tokens_are_counted(client):
    messages = [{"role": "user", "content": "Hallo"}]
    counted = client.messages.count_tokens(model="m", messages=messages, tools=TOOLS)
    used = client.messages.create(model="m", max_tokens=1, messages=messages, tools=TOOLS).usage
    assert counted.input_tokens == used.input_tokens + used.cache_read_input_tokens


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": [{"role": "clown", "content": "x"}]}, "messages.0.role is 'clown', expected user or assistant"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content is 5"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
         "messages.0.content.0 is of type 'image', which a message of user's cannot hold here"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "is of type 'tool_use'"),
        ({"messages": []}, "messages is []"),
        ({"system": [{"type": "x"}]}, "system has {'type': 'x'}"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "this server runs no tools"),
        ({"tools": [{"description": "x"}]}, "tools.0 is"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice is {'type': 'maybe'}"),
        ({"thinking": {"type": "x"}}, "thinking is {'type': 'x'}"),
        ({"thinking": {"type": "enabled", "budget_tokens": "x"}}, "thinking.budget_tokens is 'x'"),
        ({"temperature": 1000}, "temperature is 1000"),
    ],
)  # fmt: skip
def test_errors_have_anthropics_form(client, server, fields, says):
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(anthropic.BadRequestError) as error:
        client.messages.create(model="m", max_tokens=5, messages=messages, extra_body=fields)
    told = error.value.response.json()
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert says in told["error"]["message"]


def test_a_key(tmp_path):
    model, _ = scripted_model(write_text_files(tmp_path, "qwen3"), reply)
    with running(model, api_keys=("right",)) as server:
        with anthropic.Anthropic(base_url=server.url, api_key="right", max_retries=0) as client:
            assert ask(client, "Hi").content[0].text == "HI"
        with (
            anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as client,
            pytest.raises(anthropic.AuthenticationError, match="a wrong key came with the request"),
        ):
            ask(client, "Hi")
