"""``/v1/completions``: many prompts, echo, filling in, log probabilities; and what only looks at tokens."""

import json

import openai
import pytest

from cases.scripted import IM_END, scripted_model, write_text_files
from cases.serving import running

LONG = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model, _ = scripted_model(write_text_files(tmp_path_factory.mktemp("scripted")), str.upper, max_seq_len=LONG)
    with running(model) as found:
        yield found
        found.wait_until_idle()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def ids(server, text):
    return server.serving.opened.llm.tokenizer.encode(text)


def test_a_prompt_is_continued(client):
    answer = client.completions.create(model="m", prompt="hallo")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("HALLO", "stop")
    answer = client.completions.create(model="m", prompt="abcdefghijklmnopqrstuvwxyz")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ABCDEFGHIJKLMNOP", "length")


def test_special_tokens_of_a_prompt_are_tokens(client, server):
    client.completions.create(model="m", prompt="a<|im_end|>")
    assert server.serving.opened.llm.core.engine.seen[-1].prompt[-1] == IM_END


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_many_prompts(client, server, stream, as_ids):
    words = ["one", "two", "three", "four", "five", "six"]
    prompt = [ids(server, word) for word in words] if as_ids else words
    answer = client.completions.create(model="m", prompt=prompt, n=2, stream=stream)
    texts = [""] * 12
    for each in answer if stream else [answer]:
        for choice in each.choices:
            texts[choice.index] += choice.text
    assert texts == [word.upper() for word in words for _ in range(2)]
    if not stream:
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (22, 2 * (22 + 6))
        assert [choice.index for choice in answer.choices] == list(range(12))


def test_an_echo(client, server):
    answer = client.completions.create(model="m", prompt="abc", echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text == "abcABC"
    assert choice.logprobs.tokens == ["a", "b", "c", "A", "B", "C", "<|im_end|>"]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4, 5, 6]
    assert choice.logprobs.token_logprobs[0] is None
    assert all(each is not None for each in choice.logprobs.token_logprobs[1:])
    assert [len(each or {}) for each in choice.logprobs.top_logprobs] == [0, 2, 2, 2, 2, 2, 2]
    chunks = server.stream("/v1/completions", {"prompt": "abc", "echo": True})
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "abcABC"


@pytest.mark.parametrize("fields", [{"max_tokens": 0, "echo": True, "logprobs": 1}])
def test_a_prompt_alone_is_judged(client, fields):
    answer = client.completions.create(model="m", prompt="abc", **fields)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "length")
    assert (answer.choices[0].logprobs.tokens, answer.usage.completion_tokens) == (["a", "b", "c"], 0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": ""}, "expected 1 to 128 prompts, none of them empty"),
        ({"prompt": []}, "expected 1 to 128 prompts"),
        ({"prompt": ["a"] * 129}, "expected 1 to 128 prompts"),
        ({"prompt": [["a"]]}, "prompt is"),
        ({"prompt": [1, "a"]}, "prompt is"),
        ({"prompt": [10**6]}, "the prompt holds token 1000000, expected 0 to "),
        ({"prompt": "a", "suffix": "b"}, "the model has no tokens for filling in"),
        ({"prompt": ["a", "b"], "suffix": "b"}, "suffix needs one prompt that is a text"),
        ({"prompt": "a", "best_of": 3}, "best_of is 3, expected n, which is 1"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0, expected a whole number, 1 or more"),
        ({"prompt": "a", "logprobs": 21}, "logprobs is 21: expected less than or equal to 20"),
    ],
)
def test_what_cannot_be_continued(server, fields, says):
    response = server.post("/v1/completions", fields)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


def test_a_gap_is_filled(tmp_path):
    directory = write_text_files(tmp_path)
    text = (directory / "tokenizer.json").read_text("utf-8")
    for word, token in zip(["prefix", "suffix", "middle"], ["<think>", "</think>", "<tool_call>"], strict=True):
        text = text.replace(token, f"<|fim_{word}|>")
    (directory / "tokenizer.json").write_text(text, "utf-8")
    model, script = scripted_model(directory, lambda prompt: prompt.upper()[:3])
    with running(model) as server:
        found = server.post("/v1/completions", {"prompt": "ab", "suffix": "cd<|fim_middle|>"}).json()
        assert found["choices"][0]["text"]
        read = script.tokenizer.decode(script.seen[-1].prompt, False)
        assert read.startswith("<|fim_prefix|>ab<|fim_suffix|>cd")
        assert read.endswith("<|fim_middle|>")


def test_tokens(server):
    prompt = "Hallo 你🤗<|im_end|>"
    found = server.post("/tokenize", {"prompt": prompt, "return_token_strs": True}).json()
    assert found["tokens"] == ids(server, prompt)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), LONG)
    assert found["token_strs"][-1] == "<|im_end|>"
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": prompt}
    messages = [{"role": "user", "content": "Hi"}]
    chat = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = server.post("/apply-template", {"messages": messages}).json()["prompt"]
    assert chat == ids(server, text)
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/tokenize", {}, "expected one of prompt and messages"),
        ("/tokenize", {"prompt": "a", "messages": []}, "expected one of prompt and messages"),
        ("/tokenize", {"prompt": "\ud800"}, "UTF-8"),
        ("/detokenize", {"tokens": [-1]}, "expected at most"),
        ("/detokenize", {"tokens": "a"}, "tokens is 'a'"),
        ("/apply-template", {"messages": [{"role": "clown", "content": "x"}]}, "the role 'clown'"),
    ],
)
def test_tokens_that_are_none(server, path, body, says):
    response = server.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]
