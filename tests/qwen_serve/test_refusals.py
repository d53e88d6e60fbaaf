"""What is not answered, and how that is told: one form, the right status, no echo of what was sent."""

import contextlib
import json
import socket

import openai
import pytest

from cases.scripted import poison, scripted_model, write_text_files
from cases.serving import running
from qwen_serve.common.errors import KINDS

HI = [{"role": "user", "content": "hi"}]
DEEP = "[" * 200_000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model, script = scripted_model(write_text_files(tmp_path_factory.mktemp("scripted")), str.upper, max_seq_len=300)
    poison(script, "poison")
    with running(model, max_body_bytes=1 << 20) as found:
        yield found
        found.wait_until_idle()


def raw(server, text, path="/v1/chat/completions", **headers):
    headers = {"content-type": "application/json"} | headers
    return server.client.post(path, content=text, headers=headers)


def told(response, status, code):
    """The message of an error of this status and code, which has OpenAI's form."""
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert {"message", "type", "param", "code"} <= set(error)
    assert response.headers["x-should-retry"] in ("true", "false")
    assert response.headers["x-request-id"]
    return error["message"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (DEEP, "nested too deeply"),
        ('{"messages": ' + DEEP, "nested too deeply"),
        ("[1]", "a list, expected a JSON object"),
        ("5", "a int, expected"),
        ("{}", "messages is missing"),
        ('{"messages": []}', "messages is []"),
        ('{"messages": null}', "messages is None"),
        ('{"messages": [5]}', "messages.0 is 5"),
    ],
)
def test_a_request_that_is_none(server, text, says):
    assert says in told(raw(server, text), 400, "invalid_request")


# every field with what it cannot be
WRONG = ["a", [], {}, -1, -(2**63), 2**63, 2**64, 1e308, True, [[]], "", {"a": [1]}, 0.5, "x" * 10_000]
TAKEN = {
    "temperature": [True], "stop": ["a", []], "logit_bias": [{}], "tools": [[]], "chat_template_kwargs": [{}],
    "stop_token_ids": [[]], "stream_options": [{}, {"a": [1]}], "metadata": [{}, {"a": [1]}], "bad_words": [[]],
}  # fmt: skip
FIELDS = [
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "seed", "stop", "stop_token_ids", "max_tokens", "max_completion_tokens", "min_tokens", "n",
    "logprobs", "top_logprobs", "tools", "tool_choice", "messages", "stream", "chat_template_kwargs",
    "thinking_token_budget", "cache_salt", "truncate_prompt_tokens", "bad_words", "allowed_token_ids",
    "ignore_eos", "stream_options", "model",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_wrong_is_an_error_and_nothing_else(server, field):
    for value in WRONG:
        response = server.post("/v1/chat/completions", {"messages": HI, "max_tokens": 4, field: value})
        assert response.status_code in (200, 400), (field, value)
        assert len(response.content) < 2000 or response.headers["content-type"].startswith("text/event-stream")
        if response.status_code == 400:
            assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": "hot"}, "temperature", "temperature is 'hot': expected a valid number"),
        ({"temperature": 101}, "temperature", "temperature is 101.0, expected 0 (greedy) or from 1e-6 to 100"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0, expected a whole number"),
        ({"n": 17}, "n", "n is 17: expected less than or equal to 16"),
        ({"n": 2.5}, "n", "n is 2.5: expected a valid integer"),
        ({"stop": ["a"] * 17}, "stop", "stop is ["),
        ({"min_tokens": 9, "max_tokens": 5}, None, "min_tokens is 9, expected at most max_tokens, which is 5"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias is {'x': 1.0}"),
        ({"logit_bias": {"99999": 1}}, None, "logit_bias holds token 99999"),
        ({"chat_template_kwargs": {"tools": "x"}}, "chat_template_kwargs", "tools is a field of the request itself"),
        ({"chat_template_kwargs": {"eos_token": "x"}}, "messages", "'eos_token' is not to be set"),
        ({"chat_template_kwargs": {"a": {"b": 1}}}, "chat_template_kwargs", "chat_template_kwargs.a is {'b': 1}"),
        ({"tools": [{"type": "function"}]}, "tools.0", "tools.0 is"),
        ({"tool_choice": "maybe"}, "tool_choice", "tool_choice is 'maybe', expected auto or none: no tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
         "messages", "a part of type 'image_url', expected parts of type 'text' alone"),
        ({"thinking_token_budget": -1}, "thinking_token_budget", "thinking_token_budget is -1"),
    ],
)  # fmt: skip
def test_an_error_names_the_field(server, fields, param, says):
    response = server.post("/v1/chat/completions", {"messages": HI, **fields})
    assert says in told(response, 400, "invalid_request")
    assert response.json()["error"]["param"] == param


def test_a_prompt_that_is_too_long(server):
    response = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 400}]})
    told(response, 400, "context_length_exceeded")
    error = response.json()["error"]
    assert (error["n_ctx"], error["n_prompt_tokens"] > 400) == (300, True)
    response = server.post("/v1/completions", {"prompt": "x" * 900_000})
    told(response, 400, "context_length_exceeded")
    response = server.post("/v1/completions", {"prompt": "x" * 400, "truncate_prompt_tokens": 9, "max_tokens": 3})
    assert response.json()["usage"]["prompt_tokens"] == 9


def test_a_request_that_is_too_large(server):
    body = json.dumps({"messages": HI, "user": "x" * (1 << 20)})
    told(raw(server, body), 413, "request_too_large")

    def pieces():
        for _ in range(40):
            yield b"x" * (1 << 16)

    told(server.client.post("/tokenize", content=pieces(), headers={"content-type": "application/json"}), 413,
         "request_too_large")  # fmt: skip


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_web_page_may_send_unasked_is_refused(server, kind):
    told(raw(server, json.dumps({"messages": HI}), **{"content-type": kind}), 415, "unsupported_media_type")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_name_that_was_made_to_mean_this_machine_is_refused(server, host):
    told(server.client.get("/v1/models", headers={"host": host}), 403, "forbidden_host")


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:80"])
def test_names_of_this_machine_are_taken(server, host):
    assert server.client.get("/v1/models", headers={"host": host}).status_code == 200


def test_routes_that_are_none(server):
    told(server.client.get("/v1/nothing"), 404, "not_found")
    told(server.client.get("/v1/chat/completions"), 405, "method_not_allowed")
    told(server.client.get("/v1/models/other"), 404, "model_not_found")
    assert server.client.get("/v1/models/scripted").json()["id"] == "scripted"


def test_no_page_of_another_origin_may_ask(server):
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    response = server.client.request("OPTIONS", "/v1/chat/completions", headers=asked)
    assert not [name for name in response.headers if name.startswith("access-control")]
    response = server.client.get("/v1/models", headers={"origin": "http://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_an_answer_that_fails_is_an_error_and_others_go_on(server):
    response = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "poison"}]})
    assert "the logits of position" in told(response, 500, "engine_error")
    chunks = server.stream("/v1/chat/completions", {"messages": [{"role": "user", "content": "poison"}]})
    assert chunks[-1]["error"]["code"] == "engine_error"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "poison"}], stream=True
        )
        with pytest.raises(openai.APIError, match="the logits of position"):
            list(stream)
    assert server.post("/v1/completions", {"prompt": "hi"}).json()["choices"][0]["text"] == "HI"


def test_a_mistake_of_the_servers_is_no_page_of_a_debugger(server, monkeypatch):
    monkeypatch.setattr(type(server.serving), "check_model", lambda *_: 1 / 0)
    message = told(server.post("/v1/chat/completions", {"messages": HI}), 500, "internal_error")
    assert message == "a mistake of the server's: ZeroDivisionError: division by zero"


def test_the_log_has_no_prompt(server):
    server.log.clear()
    server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "secret words"}], "max_tokens": 2})
    server.post("/v1/completions", {"prompt": "secret words", "temperature": "secret words"})
    assert [record["status"] for record in server.log] == [200, 400]
    assert "secret" not in json.dumps(server.log).lower()
    assert (server.log[0]["completion_tokens"], server.log[0]["finish_reasons"]) == (2, ["length"])


def test_a_request_is_named(server):
    assert server.client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    drawn = server.client.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"]
    assert drawn.startswith("req-")


def exchange(server, data):
    """What comes back for bytes that are no work of a client library."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionResetError):  # who is not read to the end may not be read at all
            while piece := connection.recv(1 << 16):
                received += piece
    return received


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00\xff\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nzz\r\n",
    ],
)
def test_bytes_that_are_no_request(server, data):
    assert exchange(server, data)[:10] in (b"HTTP/1.1 4", b"")
    assert server.client.get("/health").status_code == 200


KEYED = ("GET /v1/models", "GET /v1/models/x", "GET /metrics", "GET /version", "GET /docs", "GET /openapi.json",
         "POST /v1/chat/completions", "POST /v1/completions", "POST /tokenize", "POST /detokenize",
         "POST /apply-template", "GET /nothing")  # fmt: skip


def test_every_route_asks_for_the_key(tmp_path):
    model, _ = scripted_model(write_text_files(tmp_path), str.upper)
    with running(model, api_keys=("right", "other")) as server:
        for route in KEYED:
            method, path = route.split()
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}, {"x-api-key": ""}):
                response = server.client.request(method, path, headers=headers)
                told(response, 401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
        for headers in ({"authorization": "Bearer right"}, {"authorization": "bearer other"}, {"x-api-key": "right"}):
            assert server.client.get("/v1/models", headers=headers).status_code == 200
        assert {server.client.get(path).status_code for path in ("/health", "/ready")} == {200}
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_keys_do_not_share_the_cache(tmp_path):
    model, _ = scripted_model(write_text_files(tmp_path), lambda prompt: "ok")
    body = {"prompt": "x" * 200}
    with running(model, api_keys=("a", "b"), cache_per_key=True) as server:
        cached = [
            server.post("/v1/completions", body, headers={"authorization": f"Bearer {key}"}).json()["usage"][
                "prompt_tokens_details"
            ]["cached_tokens"]
            for key in ("a", "a", "b", "b")
        ]
        assert (cached[0], cached[1] > 0, cached[2], cached[3] > 0) == (0, True, 0, True)


def test_pages_that_are_let_in(tmp_path):
    model, _ = scripted_model(write_text_files(tmp_path), str.upper)
    with running(model, origins=("http://page.example",), api_keys=("k",)) as server:
        asked = {"origin": "http://page.example", "access-control-request-method": "POST"}
        response = server.client.request("OPTIONS", "/v1/chat/completions", headers=asked)
        assert response.headers["access-control-allow-origin"] == "http://page.example"


def test_one_model_of_a_strict_server(tmp_path):
    model, _ = scripted_model(write_text_files(tmp_path), str.upper)
    with running(model, strict_model=True, served_names=("one", "two")) as server:
        for name, status in (("one", 200), ("two", 200), ("three", 404)):
            assert server.post("/v1/completions", {"prompt": "a", "model": name}).status_code == status


def test_every_kind_of_error_has_a_status_of_its_own_sort() -> None:
    assert {kind.status // 100 for kind in KINDS.values()} == {4, 5}
    assert all(not kind.may_retry or kind.status in (429, 503) for kind in KINDS.values())
