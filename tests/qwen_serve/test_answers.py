"""What a model wrote, told apart: every form of call, thinking in every state, and any cut gives the same."""

import doctest
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_serve.answers.json_call
import qwen_serve.answers.xml_call
from cases.scripted import IM_END, core_tokenizer
from qwen_run.api.outputs import CompletionOutput
from qwen_run.text.stops import TextStopper
from qwen_run.text.tokenizer import Tokenizer
from qwen_serve.answers.events import Answer, Call
from qwen_serve.answers.parser import AnswerParser, Reading

TOKENIZER = Tokenizer(core_tokenizer())
SCHEMAS = {
    "f": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "list": {"type": "array"},
            "maybe": {"type": ["string", "null"]},
        },
    }
}
CALLS = Reading(calls=True, schemas=SCHEMAS)
THINKING = Reading(starts_thinking=True, calls=True, schemas=SCHEMAS)


class Spelled(Tokenizer):
    """A tokenizer in which markers are letters."""

    def __init__(self):
        super().__init__(core_tokenizer())
        self.added_ids = self.special_ids

    def encode(self, text, *_, **__):
        return [i for character in text for i in self._core.encode(character, add_special_tokens=False).ids]


SPELLED = Spelled()


def read(text, reading=CALLS, cut=None, finish="stop", stop=(), tokenizer=TOKENIZER):
    """The answer that consists of ``text``; told every ``cut`` tokens, at once if None."""
    ids = tokenizer.encode(text)
    parser, answer = AnswerParser(tokenizer, reading), Answer()
    stopper, new, ended = TextStopper(tokenizer, stop), [], False
    for index, token_id in enumerate(ids):
        new.append(token_id)
        ended = stopper.push(token_id)
        if ended:
            break
        if cut and (index + 1) % cut == 0:
            for event in parser.push(CompletionOutput(0, stopper.release(), new)):
                answer.add(event)
            new = []
    for event in parser.push(CompletionOutput(0, stopper.release() + stopper.close(), new, finish_reason=finish)):
        answer.add(event)
    return answer


def call(name, **arguments):
    return Call(name, json.dumps(arguments, ensure_ascii=False))


F = '{"name": "f", "arguments": {"city": "Köln"}}'
X = "<function=f>\n<parameter=city>\nKöln\n</parameter>\n</function>"
KÖLN = call("f", city="Köln")

# text, reading, (reasoning, content, calls)
CASES = {
    "text alone": ("Hello\n", CALLS, ("", "Hello\n", [])),
    "text without tools": ("a <tool_call>b</tool_call> ", Reading(), ("", "a <tool_call>b</tool_call> ", [])),
    "one call": (f"<tool_call>\n{F}\n</tool_call>", CALLS, ("", "", [KÖLN])),
    "text before": (f"I look.\n<tool_call>\n{F}\n</tool_call>", CALLS, ("", "I look.", [KÖLN])),
    "text between and after": (
        f"a\n<tool_call>\n{F}\n</tool_call>\nb\n<tool_call>\n{F}\n</tool_call>\nc\n", CALLS, ("", "abc\n", [KÖLN, KÖLN])
    ),
    "parallel": (f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{F}\n</tool_call>", CALLS, ("", "", [KÖLN, KÖLN])),
    "arguments before name": (
        '<tool_call>{"arguments": {"a": [1, {"b": 2}]}, "name": "g"}</tool_call>',
        CALLS, ("", "", [call("g", a=[1, {"b": 2}])]),
    ),
    "markers in a string": (
        '<tool_call>{"name": "g", "arguments": {"a": "<tool_call></tool_call>{\\"}"}}</tool_call>',
        CALLS, ("", "", [call("g", a='<tool_call></tool_call>{"}')]),
    ),
    "a brace in a string": (
        '<tool_call>{"name": "g", "arguments": {"a": "{test1,test2"}}</tool_call>',
        CALLS, ("", "", [call("g", a="{test1,test2")]),
    ),
    "no arguments": ('<tool_call>{"name": "g"}</tool_call>', CALLS, ("", "", [call("g")])),
    "empty arguments": ('<tool_call>{"name": "g", "arguments": {}}</tool_call>', CALLS, ("", "", [call("g")])),
    "null arguments": ('<tool_call>{"name": "g", "arguments": null}</tool_call>', CALLS, ("", "", [call("g")])),
    "quoted arguments": (
        '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>', CALLS, ("", "", [call("g", a=1)])
    ),
    "another field": (
        '<tool_call>{"id": 7, "name": "g", "arguments": {"a": 1}, "x": [1]}</tool_call>', CALLS,
        ("", "", [call("g", a=1)]),
    ),
    "no closing tag": (f"<tool_call>\n{F}\n<tool_call>\n{F}", CALLS, ("", "", [KÖLN, KÖLN])),
    "no closing brace": (
        '<tool_call>{"name": "g", "arguments": {"a": 1}</tool_call>', CALLS, ("", "", [call("g", a=1)])
    ),
    "one brace too many": (f"<tool_call>{F}}}</tool_call>", CALLS, ("", "}</tool_call>", [KÖLN])),
    "no call at all": ("<tool_call>hello</tool_call>!", CALLS, ("", "<tool_call>hello</tool_call>!", [])),
    "no name": (
        'a\n<tool_call>{"arguments": {}}</tool_call>', CALLS, ("", 'a\n<tool_call>{"arguments": {}}</tool_call>', [])
    ),
    "a name that is none": (
        '<tool_call>{"name": 5, "x": 1}</tool_call>', CALLS, ("", '<tool_call>{"name": 5, "x": 1}</tool_call>', [])
    ),
    "empty call": ("<tool_call></tool_call>", CALLS, ("", "<tool_call></tool_call>", [])),
    "json that is none": ("<tool_call>{name: f}</tool_call>", CALLS, ("", "<tool_call>{name: f}</tool_call>", [])),
    "unknown function": ('<tool_call>{"name": "zz"}</tool_call>', CALLS, ("", "", [call("zz")])),
    "xml": (f"<tool_call>\n{X}\n</tool_call>", CALLS, ("", "", [KÖLN])),
    "xml parallel": (
        f"x\n<tool_call>\n{X}\n</tool_call>\n<tool_call>\n{X}\n</tool_call>", CALLS, ("", "x", [KÖLN, KÖLN])
    ),
    "xml bare": (f"x\n{X}\n{X}\n</tool_call>", CALLS, ("", "x", [KÖLN, KÖLN])),
    "xml typed": (
        "<tool_call><function=f><parameter=days>5</parameter><parameter=city>5</parameter>"
        "<parameter=list>[1, 2]</parameter><parameter=maybe>null</parameter></function></tool_call>",
        CALLS, ("", "", [Call("f", '{"days": 5, "city": "5", "list": [1, 2], "maybe": null}')]),
    ),
    "xml of a union": (
        "<function=f><parameter=maybe>5</parameter></function>", CALLS, ("", "", [call("f", maybe="5")])
    ),
    "xml that is no json": (
        "<function=f><parameter=days>five</parameter></function>", CALLS, ("", "", [call("f", days="five")])
    ),
    "xml of many lines": (
        "<function=f>\n<parameter=city>\n\n a\n</b>\n\n</parameter>\n</function>", CALLS,
        ("", "", [call("f", city="\n a\n</b>\n")]),
    ),
    "xml empty value": (
        "<function=f><parameter=city>\n</parameter><parameter=x></parameter></function>", CALLS,
        ("", "", [call("f", city="", x="")]),
    ),
    "xml without parameters": ("<tool_call>\n<function=f>\n</function>\n</tool_call>", CALLS, ("", "", [call("f")])),
    "xml without a bracket": (
        "<function=f\n<parameter=city\nKöln\n</parameter>\n</function>", CALLS, ("", "", [KÖLN])
    ),
    "xml without ends of parameters": (
        "<function=f>\n<parameter=city>\nKöln\n<parameter=days>\n5\n</function>", CALLS,
        ("", "", [call("f", city="Köln", days=5)]),
    ),
    "xml not closed": ("<tool_call><function=f><parameter=city>Köln", CALLS, ("", "", [KÖLN])),
    "xml that ends with the call": (
        "<tool_call><function=f><parameter=city>Köln</tool_call>", CALLS, ("", "", [KÖLN])
    ),
    "xml that is none": ("<tool_call><b>x</b></tool_call>", CALLS, ("", "<tool_call><b>x</b></tool_call>", [])),
    "thinking": ("<think>\nHm.\n</think>\n\nYes.", CALLS, ("Hm.", "Yes.", [])),
    "thinking without tools": ("<think>\nHm.\n</think>\n\nYes.\n", Reading(), ("Hm.", "Yes.\n", [])),
    "thinking that the prompt began": ("Hm.\n\nHm?\n</think>\n\nYes.", THINKING, ("Hm.\n\nHm?", "Yes.", [])),
    "thinking and a call": (f"<think>Hm</think>\n<tool_call>{F}</tool_call>", CALLS, ("Hm", "", [KÖLN])),
    "a call within thinking": (f"Hm\n<tool_call>{F}</tool_call>\nYes", THINKING, ("Hm", "Yes", [KÖLN])),
    "a second end of thinking": ("Hm</think>\na</think>b", THINKING, ("Hm", "ab", [])),
    "an end of thinking alone": ("</think>Yes", CALLS, ("", "Yes", [])),
    "thinking in the midst": ("Use <think> tags.", CALLS, ("", "Use <think> tags.", [])),
    "no thinking": ("\n\nYes", CALLS, ("", "\n\nYes", [])),
    "white space": (" \n", CALLS, ("", " \n", [])),
    "nothing": ("", CALLS, ("", "", [])),
    "beginnings of markers": ("a < b <too <fun <function", CALLS, ("", "a < b <too <fun <function", [])),
    "unicode": (
        "你🤗<tool_call>" + '{"name": "g", "arguments": {"a": "你🤗"}}', CALLS, ("", "你🤗", [call("g", a="你🤗")])
    ),
}  # fmt: skip


def both(cut):
    return pytest.param(cut, TOKENIZER, id=f"{cut} tokens"), pytest.param(cut, SPELLED, id=f"{cut} letters")


@pytest.mark.parametrize(("cut", "tokenizer"), [*both(None), *both(1), *both(3)])
@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_told_apart(name, cut, tokenizer):
    text, reading, expected = CASES[name]
    answer = read(text, reading, cut, tokenizer=tokenizer)
    assert (answer.reasoning, answer.content, answer.calls) == expected


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_json(name):
    text, reading, _ = CASES[name]
    for each in read(text, reading).calls:
        assert isinstance(json.loads(each.arguments), dict)


@pytest.mark.parametrize("cut", [None, 1])
def test_what_is_cut_stays_as_far_as_it_came(cut):
    answer = read('a\n<tool_call>{"name": "f", "arguments": {"city": "Kö', CALLS, cut, "length")
    assert (answer.content, answer.calls) == ("a", [Call("f", '{"city": "Kö')])
    answer = read("<think>\nHm, ", CALLS, cut, "length")
    assert (answer.reasoning, answer.content) == ("Hm,", "")
    answer = read('<tool_call>{"name": "f"', CALLS, cut, "length")
    assert (answer.content, answer.calls) == ('<tool_call>{"name": "f"', [])


@pytest.mark.parametrize("cut", [None, 1, 2])
def test_a_stop_text_ends_where_it_stands(cut):
    assert read("Hello <think> world END more", CALLS, cut, stop=["END"]).content == "Hello <think> world "
    answer = read(f"ab<tool_call>{F}", CALLS, cut, stop=["<tool"])
    assert (answer.content, answer.calls) == ("ab", [])


def test_a_token_and_its_letters_are_two_things():
    """Thinking that mentions its own end in letters goes on."""
    letters = [i for c in "</think>" for i in TOKENIZER.encode(c)]
    ids = [*TOKENIZER.encode("<think>The tag "), *letters, *TOKENIZER.encode(" ends it.</think>Yes")]
    stopper = TextStopper(TOKENIZER)
    for token_id in ids:
        stopper.push(token_id)
    answer, parser = Answer(), AnswerParser(TOKENIZER, Reading())
    for event in parser.push(CompletionOutput(0, stopper.release(), [*ids, IM_END], finish_reason="stop")):
        answer.add(event)
    assert (answer.reasoning, answer.content) == ("The tag </think> ends it.", "Yes")
    assert parser.num_reasoning_tokens == len(ids) - len(TOKENIZER.encode("Yes"))


WORDS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<function=f>", "<function=", "<parameter=city>",
    "<parameter=days>", "</parameter>", "</function>", "\n", " ", "{", "}", '"', '"name": "f"', '"arguments": ', ",",
    ":", "Kö", "\\", "<", ">", "5", F, X, "[", "]", "null",
]  # fmt: skip


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=14), st.sampled_from(["stop", "length"]), st.booleans(), st.booleans())
def test_any_cut_gives_the_same(words, finish, starts_thinking, calls):
    text = "".join(words)
    reading = Reading(starts_thinking=starts_thinking, calls=calls, schemas=SCHEMAS)
    whole = read(text, reading, None, finish)
    assert [read(text, reading, cut, finish) for cut in (1, 2, 5)] == [whole] * 3
    assert read(text, reading, 1, finish, tokenizer=SPELLED) == read(text, reading, None, finish, tokenizer=SPELLED)
    if not calls and not starts_thinking and not text.strip().startswith(("<think>",)) and "</think>" not in text:
        assert whole.content == text


LETTERS = st.text(st.sampled_from('aé你 \n{}[]"\\<>/=:,'), max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(LETTERS, LETTERS | st.integers() | st.lists(LETTERS, max_size=2), max_size=3), LETTERS)
def test_a_call_comes_back_as_it_was_made(arguments, before):
    text = f"{before}<tool_call>\n{json.dumps({'name': 'g', 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
    answer = read(text, CALLS, 1)
    assert json.loads(answer.calls[0].arguments) == arguments
    assert answer.content == before.rstrip()


@pytest.mark.parametrize("module", [qwen_serve.answers.json_call, qwen_serve.answers.xml_call])
def test_doctests(module):
    results = doctest.testmod(module)
    assert (results.attempted > 0, results.failed) == (True, 0)
