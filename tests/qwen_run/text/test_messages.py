"""Messages as clients send them: parts, null content, calls as JSON text, roles; through every template of Qwen."""

import doctest
import json

import pytest

import qwen_run.text.messages
from cases.scripted import TEMPLATES
from qwen_engine.errors import RequestError
from qwen_run.sampling import rules
from qwen_run.text.chat_template import ChatTemplate
from qwen_run.text.messages import normalized_messages

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
# of the form of Qwen3's on the Hub: content that is no text counts as none
HUB = (
    "{%- for m in messages %}{%- if m.content is string %}{%- set c = m.content %}{%- else %}{%- set c = '' %}"
    "{%- endif %}{{- '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' }}{%- endfor %}"
)


def call(arguments):
    return [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]


@pytest.fixture(params=[*NAMES, "hub"])
def template(request):
    """Each template that Qwen's checkpoints have."""
    text = HUB if request.param == "hub" else (TEMPLATES / f"{request.param}.jinja").read_text("utf-8")
    return ChatTemplate({"default": text}, {})


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_text_parts_are_joined(template, role):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the capital?"}]
    before = [{"role": "user", "content": "Hi"}] if role in ("assistant", "tool") else []
    joined = template.render([*before, {"role": role, "content": "What is the capital?"}])
    assert template.render([*before, {"role": role, "content": parts}]) == joined
    assert "What is the capital?" in joined


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user", "content": 42}, r"message 0 \(user\): content is int, expected text or a list of text parts"),
        ({"role": "user", "content": {"a": 1}}, r"content is dict, expected text"),
        ({"role": "user", "content": None}, r"content is null, expected text"),
        ({"role": "assistant", "tool_calls": []}, r"\(assistant\): content is null, expected text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "a part of type 'image_url', expected"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}, "type 'input_audio'"),
        ({"role": "user", "content": ["What?"]}, "a part of type 'str', expected parts of type 'text' alone"),
        ({"role": "user", "content": [{"text": "What?"}]}, "a part of type None"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "a text part has 5, expected text"),
        ({"role": "assistant", "tool_calls": "x"}, "tool_calls is 'x', expected a list of objects"),
        ({"role": "Assistant", "content": "x"}, "message 0 has the role 'Assistant', which the chat template does not"),
        ({"role": "function", "content": "x"}, "the role 'function'.*; expected one of system, user, assistant, tool$"),
    ],
)
def test_what_a_template_would_drop_is_refused_by_name(template, message, says):
    with pytest.raises(RequestError, match=says):
        template.render([message])


def test_a_developer_is_the_system(template):
    rest = [{"role": "user", "content": "Hi"}]
    system = template.render([{"role": "system", "content": "Be brief."}, *rest])
    assert template.render([{"role": "developer", "content": "Be brief."}, *rest]) == system


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_calls_as_clients_send_them(template, content):
    """Null content and arguments as JSON text are what they stand for: no text, and an object."""
    before, after = {"role": "user", "content": "Weather?"}, {"role": "tool", "tool_call_id": "c1", "content": "7"}
    sent = {"role": "assistant", **content, "tool_calls": call('{"place": "Köln"}'), "refusal": None, "audio": None}
    meant = {"role": "assistant", "content": "", "tool_calls": call({"place": "Köln"})}
    assert template.render([before, sent, after]) == template.render([before, meant, after])
    assert sent["tool_calls"] == call('{"place": "Köln"}')  # and nothing of it is changed


@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen2"])  # which has no tools
def test_arguments_are_written_as_json_once(name):
    template = ChatTemplate({"default": (TEMPLATES / f"{name}.jinja").read_text("utf-8")}, {})
    for arguments in ('{"place":"Köln"}', '{"place": "Köln"}', {"place": "Köln"}):
        text = template.render([{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": call(arguments)}])
        assert '{"name": "weather", "arguments": {"place": "Köln"}}' in text
    text = template.render([{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": call("")}])
    assert '"arguments": {}}' in text


@pytest.mark.parametrize("arguments", ["{'a': 1}", "[1]", '{"a": ', "none", "[" * 100_000])
def test_arguments_that_are_no_object_do_not_end_a_conversation(template, arguments):
    """A model may have written them; the template writes the text it is given."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": call(arguments)}]
    text = template.render([*messages, {"role": "tool", "content": "no"}])
    assert "weather" not in text or arguments[:4] in text or json.dumps(arguments)[:6] in text


def test_a_template_that_takes_objects_alone_gets_one():
    text = (
        "{% for c in messages[1].tool_calls %}{% for name, value in c.function.arguments|items %}"
        "{{ name }}={{ value }}{% endfor %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": call("{'a': 1}")}]
    assert ChatTemplate({"default": text}, {}).render(messages) == "arguments={'a': 1}"


@pytest.mark.parametrize("role", ["system", "tool", "critic"])
def test_a_role_that_a_template_drops_is_refused(role):
    template = ChatTemplate(
        {"default": "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}"}, {}
    )
    with pytest.raises(RequestError, match=f"the role '{role}', .* expected one of user, assistant$"):
        template.render([{"role": "user", "content": "Hi"}, {"role": role, "content": "x"}])


def test_a_role_that_only_this_template_knows_is_taken():
    template = ChatTemplate(
        {"default": "{% for m in messages %}{{ '!' if m.role == 'critic' }}{{ m.content }}{% endfor %}"}, {}
    )
    assert template.render([{"role": "critic", "content": "Bad."}]) == "!Bad."


def test_a_role_that_a_template_refuses_is_refused_in_its_words():
    text = "{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestError, match="no system"):
        ChatTemplate({"default": text}, {}).render([{"role": "system", "content": "x"}])


def test_reasoning_goes_by_every_name():
    message = normalized_messages([{"role": "assistant", "content": "x", "reasoning": "Hm"}])[0]
    assert (message["thinking"], message["reasoning_content"]) == ("Hm", "Hm")


def test_doctests():
    results = doctest.testmod(qwen_run.text.messages)
    assert (results.attempted > 0, results.failed) == (True, 0)


TURN = {"role": "user", "content": "Hi"}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "tools", "says"),
    [
        ([TURN] * (rules.MAX_MESSAGES + 1), None, "^messages has 16385, expected at most 16384$"),
        (
            [TURN | {"content": "x" * (rules.MAX_CHARACTERS + 1)}],
            None,
            "^messages hold more than .* 33554432 characters",
        ),
        ([TURN | {"content": [{"type": "text", "text": ""}] * (rules.MAX_PARTS + 1)}], None, "has 16385 parts"),
        ([TURN | {"extra": nested(70)}], None, "^messages are nested deeper than 64 levels$"),
        ([TURN | {"extra": [[0] * 1024] * 1025}], None, "^messages hold more than 1048576 values"),
        ([TURN], [{"name": "f"}] * (rules.MAX_TOOLS + 1), "^tools has 1025, expected at most 1024$"),
        ([TURN], [{"name": nested(10**5)}], "^tools are nested deeper"),
        ([TURN], [{"name": "x" * (rules.MAX_CHARACTERS + 1)}], "^tools hold more than"),
        ([TURN], ["f"], r"^tools is \['f'\], expected a list of objects$"),
        ([TURN], "f", "^tools is 'f', expected a list of objects$"),
    ],
)
def test_a_conversation_has_limits(messages, tools, says):
    with pytest.raises(RequestError, match=says):
        ChatTemplate({"default": HUB}, {}).render(messages, tools)
