"""A short run of ``fuzz.hostile``, that it sees what it looks for, and what it has found."""

import json

import pytest

from cases.processes import run_async
from cases.scripted import poison, scripted_model, write_text_files
from cases.serving import running
from fuzz.hostile import attack, findings, make_hostile

NUM_REQUESTS = 400
JSON = {"content-type": "application/json"}
HALF = "\ud800"  # of a character


def test_hostile_requests_are_answered_or_refused(tmp_path):
    ends, lines = findings(tmp_path, 0, 0, NUM_REQUESTS)
    assert lines == []
    assert (ends.total(), min(ends["2xx"], ends["4xx"]) > NUM_REQUESTS // 10) == (NUM_REQUESTS, True)
    assert ends["none"] < NUM_REQUESTS // 10


def test_the_same_requests_for_the_same_seed():
    made = [[make_hostile(seed, number) for number in range(40)] for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_what_is_wrong_is_seen(tmp_path):
    model, script = scripted_model(write_text_files(tmp_path, "qwen3"), str.upper, max_seq_len=400)
    poison(script, "hi")
    with running(model) as server:
        _, lines = run_async(attack(server, 0, 0, 60))
    assert any("engine_error" in line for line in lines)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    files = write_text_files(tmp_path_factory.mktemp("scripted"), "qwen3")
    model, _ = scripted_model(files, lambda prompt: "ok", max_seq_len=400)
    with running(model) as found:
        yield found
        found.wait_until_idle()


MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
FOUND = {
    "half a character in a form": ("/v1/completions", {"prompt": "a", "guided_choice": [HALF]}, 400),
    "half a character in a regex": ("/v1/completions", {"prompt": "a", "guided_regex": HALF}, 400),
    "half a character in a template": ("/apply-template", {"messages": [{"role": "user", "content": HALF}]}, 200),
    "half a character in a repeated field": ("/v1/responses", {"input": "a", "metadata": {"a": HALF}}, 200),
    "a name that is a list": (
        "/v1/chat/completions",
        {"messages": MESSAGES, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": ["f"]}}},
        400,
    ),
    "a path with a stroke at its end": ("/v1/chat/completions/", {"messages": MESSAGES}, 404),
}
CODES = {200: None, 400: "invalid_request", 404: "not_found"}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(server, name):
    path, body, status = FOUND[name]
    response = server.client.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code == status, response.text
    assert (response.json().get("error") or {}).get("code") == CODES[status]


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "-1e400"])
@pytest.mark.parametrize("stream", [False, True])
def test_numbers_that_json_does_not_have(server, number, stream):
    text = json.dumps({"input": "a", "stream": stream, "metadata": {"a": 7}}).replace("7", number)
    response = server.client.post("/v1/responses", content=text, headers=JSON)
    assert (response.status_code, "number" in response.json()["error"]["message"]) == (400, True)
