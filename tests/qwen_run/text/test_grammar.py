"""Answers that keep to a form, whatever the model would rather say: tiny random weights at a high temperature."""

import contextlib
import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from cases.scripted import scripted_model, write_text_files
from qwen_engine.errors import RequestError
from qwen_run import LLM, SamplingParams, StructuredOutputsParams
from qwen_run.commands.run import main

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

HOT = {"temperature": 1.5, "max_tokens": 500}
TEXT = {"type": "string", "maxLength": 6}


def an_object(optional=(), **properties):
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS = {
    "object": an_object(name=TEXT, age={"type": "integer", "minimum": 0, "maximum": 120}),
    "optional": an_object(("b",), a=TEXT, b={"type": "boolean"}),
    "nested": an_object(a=an_object(b=an_object(c={"type": "null"}))),
    "array": {"type": "array", "items": {"type": "number", "minimum": -1, "maximum": 1}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [TEXT, {"type": "boolean"}], "items": False, "minItems": 2},
    "enum": {"enum": ["red", "grün", 5, None, {"a": [1]}]},
    "const": an_object(kind={"const": "x"}),
    "anyOf": {"anyOf": [an_object(a=TEXT), {"type": "integer", "minimum": 0, "maximum": 9}]},
    "allOf": {"allOf": [an_object(a=TEXT), an_object(a=TEXT)]},
    "ref": {"$ref": "#/$defs/t", "$defs": {"t": an_object(a={"$ref": "#/$defs/u"}), "u": {"enum": [1, 2]}}},
    "recursive": {
        "$ref": "#/$defs/t",
        "$defs": {"t": {"anyOf": [{"type": "null"}, an_object(next={"$ref": "#/$defs/t"})]}},
    },
    "pattern": an_object(zip={"type": "string", "pattern": "^[0-9]{5}$"}),
    "format": an_object(day={"type": "string", "format": "date"}),
    "excluded": {
        "type": "array",
        "items": {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": 0.001},
                {"type": "number", "minimum": -2.5, "exclusiveMaximum": -2},
            ]
        },
        "minItems": 20,
        "maxItems": 20,
    },
    "data": {"const": {"exclusiveMinimum": 0, "maximum": 0.5}},
    "multiple": an_object(n={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}),
    "types": an_object(n={"type": ["boolean", "null"]}),
    "empty": an_object(),
    "boolean": {"type": "boolean"},
}


@pytest.fixture(scope="module", params=[0, 8])
def llm(chat_engine, request):
    with LLM(chat_engine, max_seq_len=640, max_drafts=request.param) as found:
        yield found


def chat(llm, forms, thinking=False, **fields):
    params = [SamplingParams(**{**HOT, **fields}, seed=i, structured_outputs=form) for i, form in enumerate(forms)]
    conversations = [[{"role": "user", "content": f"Question {i}"}] for i in range(len(forms))]
    results = llm.chat(
        conversations, params, use_tqdm=False, chat_template_kwargs={} if thinking else {"enable_thinking": False}
    )
    return [result.outputs[0] for result in results]


def test_answers_keep_to_schemas(llm):
    answers = chat(llm, [{"json": schema} for schema in SCHEMAS.values()])
    for (name, schema), answer in zip(SCHEMAS.items(), answers, strict=True):
        assert answer.finish_reason == "stop", (name, answer)
        jsonschema.validate(json.loads(answer.text), schema)


def test_a_form_changes_nothing_for_others_and_is_the_same_alone(llm):
    forms = [{"json": schema} if index % 2 else None for index, schema in enumerate(SCHEMAS.values())]
    together = chat(llm, forms)
    for index, form in enumerate(forms):
        params = SamplingParams(**HOT, seed=index, structured_outputs=form)
        (alone,) = llm.chat(
            [{"role": "user", "content": f"Question {index}"}],
            params,
            use_tqdm=False,
            chat_template_kwargs={"enable_thinking": False},
        )
        assert alone.outputs[0].token_ids == together[index].token_ids


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-c]+x"}, "[0-9]{3}-[a-c]+x"),
        ({"choice": ["yes", "nö", 'a "quote"\n']}, 'yes|nö|a "quote"\n'),
        ({"grammar": 'start: "a" b*\nb: "b" | "c"'}, "a[bc]*"),
    ],
)
def test_other_forms(llm, form, pattern):
    for answer in chat(llm, [form] * 4):
        assert re.fullmatch(pattern, answer.text) or (answer.finish_reason, form.keys()) == ("length", {"grammar"})


def test_any_object(llm):
    for answer in chat(llm, [{"json_object": True}] * 4):
        assert answer.text.startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)


def test_samples_go_their_own_ways(llm):
    params = SamplingParams(**HOT, seed=1, n=4, structured_outputs=StructuredOutputsParams(regex="[a-z]{8}"))
    (result,) = llm.generate("x", params, use_tqdm=False)
    texts = [answer.text for answer in result.outputs]
    assert all(re.fullmatch("[a-z]{8}", text) for text in texts)
    assert len(set(texts)) == 4


def test_what_may_come_next_is_prepared_where_it_was_asked_for(llm):
    form = StructuredOutputsParams(json=SCHEMAS["object"])
    plain, ahead = (llm.text.grammars.constraint(form, False, False) for _ in "ab")
    rng = np.random.default_rng(0)
    for _ in range(20):
        ahead.prepare()
        mask = plain.allowed()
        assert mask.dtype == ahead.allowed().dtype
        assert (mask == ahead.allowed()).all()
        ids = np.flatnonzero(mask) if mask.dtype == np.bool_ else mask
        token_id = int(rng.choice(ids))
        assert plain.permits(token_id)
        assert ahead.permits(token_id)
        for each in (plain, ahead):
            each.append(token_id)
        if plain.is_complete:
            break


def test_response_format(llm):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMAS["object"], "strict": True}}
    conversation = [{"role": "user", "content": "x"}]
    params = SamplingParams(**HOT, seed=3)
    (result,) = llm.chat(
        conversation, params, False, response_format=form, chat_template_kwargs={"enable_thinking": False}
    )
    jsonschema.validate(json.loads(result.outputs[0].text), SCHEMAS["object"])
    assert params.structured_outputs is None


def thinking(tmp_path, answer, form, **fields):
    """What a model says that wants to say ``answer``, and may think first."""
    model, _ = scripted_model(write_text_files(tmp_path, "qwen3"), lambda prompt: answer)
    params = SamplingParams(temperature=0, max_tokens=200, structured_outputs=form, **fields)
    (result,) = LLM(model).chat([{"role": "user", "content": "?"}], params, use_tqdm=False)
    return result.outputs[0].text


@pytest.mark.parametrize("gap", ["", "\n\n"])
def test_a_form_begins_where_thinking_ends(tmp_path, gap):
    said = f"<think>\n12 or 34?\n</think>{gap}567"
    assert thinking(tmp_path, said, {"regex": "[0-9]+"}) == said
    assert thinking(tmp_path, said, {"regex": "[0-9]+"}, thinking_token_budget=3).startswith("<think>\n12")


def test_a_form_after_a_token(llm):
    """Free before it, and again when the form is complete."""
    form = {"grammar": 'start: /[0-9]{3}/ "!"', "after": "<think>"}
    bias = {llm.tokenizer.token_id("<think>"): 3.0}
    found = chat(llm, [form] * 6, temperature=1.0, max_tokens=200, logit_bias=bias)
    texts = [llm.tokenizer.decode(answer.token_ids, False) for answer in found]
    pieces = [piece for text in texts for piece in text.split("<think>")[1:]]
    assert len(pieces) > 3
    assert [piece for piece in pieces[:-1] if len(piece) > 4 and not re.match("[0-9]{3}!", piece)] == []
    assert any(len(piece) > 6 for piece in pieces)
    with pytest.raises(RequestError, match="after is '<none>', which is no token of the model's"):
        llm.generate("x", SamplingParams(structured_outputs={**form, "after": "<none>"}), use_tqdm=False)


def test_a_prompt_that_is_no_chat_is_not_thought_about(tmp_path):
    model, _ = scripted_model(write_text_files(tmp_path, "qwen3"), lambda prompt: "<think>5</think>6")
    params = SamplingParams(temperature=0, structured_outputs={"regex": "[0-9]"})
    (result,) = LLM(model).generate("Say a number.", params, use_tqdm=False)
    assert re.fullmatch("[0-9]", result.outputs[0].text)


def test_thinking_that_is_no_more_is_no_part_of_a_form(tmp_path):
    assert not thinking(tmp_path, "5</think>6", {"regex": "[0-9]+"}).count("think")


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({}, "structured_outputs has nothing, expected one of json, regex, choice, grammar, json_object"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs has regex and choice, expected one of"),
        ({"shape": "round"}, "expected an object with one of json"),
        ("json", "structured_outputs is 'json'"),
        ({"json": 5}, "json is 5, expected a JSON schema"),
        ({"json": "{"}, "json is '{', expected a JSON schema"),
        ({"json": "[" * 100_000}, "expected a JSON schema"),
        ({"choice": []}, r"choice is \[\], expected 1 to 10000 texts"),
        ({"choice": [5]}, r"choice is \[5\]"),
        ({"regex": ""}, "regex is ''"),
        ({"regex": 5}, "regex is 5"),
    ],
)
def test_forms_that_are_none(form, says):
    with pytest.raises(RequestError, match=says):
        SamplingParams(structured_outputs=form)


# what llguidance does not keep to, as its messages name it; and hostile ones, which must end
REFUSED = {
    "not": ({"json": {"not": {}}}, "not"),
    "oneOf": ({"json": {"oneOf": [{}, {}]}}, "oneOf"),
    "uniqueItems": ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "type": ({"json": {"type": "bogus"}}, "bogus"),
    "remote": ({"json": {"$ref": "http://x.example/y"}}, "x.example"),
    "look-ahead": ({"json": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
    "unbalanced": ({"regex": "("}, "regex"),
    "unbalanced pattern": ({"json": {"type": "string", "pattern": "("}}, "pattern"),
    "nowhere": ({"json": {"$ref": "#/$defs/none"}}, r"\$ref"),
    "itself": ({"json": {"$ref": "#"}}, r"\$ref leads to itself"),
    "nothing": ({"json": {"enum": []}}, "enum"),
    "too many": ({"grammar": "start: " + '"a" ' * 70_000}, "symbols"),
    "unknown": ({"grammar": "start: bogus"}, "bogus"),
    "syntax": ({"grammar": "((("}, "expecting rule"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_to_is_named(llm, name):
    form, says = REFUSED[name]
    with pytest.raises(RequestError, match=f"cannot be kept to: .*{says}"):
        llm.generate("x", SamplingParams(structured_outputs=form), use_tqdm=False)


HOSTILE = {
    "nested quantifiers": {"regex": "(a+)+$"},
    "powers": {"regex": "a{1,1000}{1,1000}"},
    "long": {"json": {"type": "string", "maxLength": 10**9}},
    "many": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6}},
    "alternatives": {"json": {"anyOf": [{"anyOf": [{"const": 64 * i + j} for j in range(64)]} for i in range(64)]}},
    "enum": {"json": {"enum": [f"v{i}" for i in range(20_000)]}},
    "window": {"regex": "(.*)a(.){30}"},
    "rules within rules": {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "x"'},
    "references to references": {
        "json": {
            "$ref": "#/$defs/0",
            "$defs": {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(4000)} | {"4000": {}},
        }
    },
    "options": {"regex": "a?" * 3000},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_end(llm, name):
    """Each is refused, answered, or ended with an error of its own; the next request is answered."""
    params = SamplingParams(temperature=1.5, max_tokens=20, seed=1, structured_outputs=HOSTILE[name])
    with contextlib.suppress(RequestError):
        (result,) = llm.generate("x", params, use_tqdm=False)
        answer = result.outputs[0]
        assert answer.finish_reason in ("stop", "length", "error")
        assert answer.is_refused == (answer.finish_reason == "error")
    assert llm.generate("x", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


@pytest.mark.parametrize("fields", [{"num_beams": 2, "temperature": 0}, {"ignore_eos": True}])
def test_what_a_form_excludes(fields):
    with pytest.raises(RequestError, match="structured_outputs are given with"):
        SamplingParams(structured_outputs={"regex": "a"}, **fields)


def test_a_schema_in_a_file(chat_engine, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMAS["object"]))
    options = ["--engine", str(chat_engine), "--temperature", "1.5", "--seed", "2", "--no-thinking"]
    options += ["--max-seq-len", "640", "--max-new-tokens", "300", "--json-schema"]
    result = CliRunner().invoke(main, ["x", *options, str(schema)])
    assert result.exit_code == 0, result.output
    jsonschema.validate(json.loads(result.stdout), SCHEMAS["object"])
    for text, says in (("[1]", "holds '[1]', expected a JSON schema"), ("\xff", "holds")):
        schema.write_text(text)
        result = CliRunner().invoke(main, ["x", *options, str(schema)])
        assert (result.exit_code, says in result.stderr) == (1, True), result.output
    result = CliRunner().invoke(main, ["x", *options, str(tmp_path / "none")])
    assert "cannot be read: No such file or directory; choose another --json-schema" in result.stderr


@pytest.mark.parametrize("is_thinking", [False, True])
@pytest.mark.parametrize("name", ["object", "nested", "enum", "pattern"])
def test_what_is_permitted_is_what_is_allowed(llm, name, is_thinking):
    size, think = llm.core.engine.manifest.model.vocab_size, llm.tokenizer.token_id("<think>")
    form, rng = StructuredOutputsParams(json=SCHEMAS[name]), np.random.default_rng(0)
    constraint = llm.text.grammars.constraint(form, True, is_thinking)
    if is_thinking:
        assert constraint.allowed() is None
        assert constraint.permits(0)
        constraint.append(llm.tokenizer.token_id("</think>"))
    for _ in range(60):
        allowed = np.zeros(size, bool)
        allowed[constraint.allowed()] = True
        assert [constraint.permits(token_id) for token_id in range(size)] == allowed.tolist()
        is_thinking = is_thinking or constraint.permits(think)
        constraint.append(int(rng.choice(np.setdiff1d(np.flatnonzero(allowed), [think]))))
    assert is_thinking
    assert constraint.is_complete or name == "object"
