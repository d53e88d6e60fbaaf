"""Advice of a server: a request is refused with it, and answered when it is followed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from cases.advice import not_followed, stale
from cases.scripted import scripted_model, write_text_files
from cases.serving import Running, running

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


class Asked(NamedTuple):
    """``wrong`` is refused and says ``advice``; ``right`` is answered. ``wrong`` comes with ``key``."""

    wrong: dict[str, Any]
    advice: str
    right: dict[str, Any]
    path: str = CHAT
    key: str = "Bearer k"


FORM = {"response_format": {"type": "json_object"}}
FORCED = {"tools": TOOLS, "tool_choice": "required"}
ASKED = [
    Asked(HI | FORCED | FORM, "; leave one out", HI | FORM),
    Asked(HI | FORCED, "does not write tools; leave it out", HI | {"tools": TOOLS}),
    Asked({"prompt": "a", "suffix": "b"}, "; leave it out", {"prompt": "a", "max_tokens": 2}, "/v1/completions"),
    Asked({"messages": [{"role": "user", "content": "x" * 400}]}, "; shorten it, or start the server", HI),
    Asked(HI | {"user": "x" * (1 << 20)}, "; shorten it", HI),
    Asked({"input": "b", "previous_response_id": "resp_1"}, "; send the items of the conversation as input",
          {"input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "A"},
                     {"role": "user", "content": "b"}], "max_output_tokens": 16}, "/v1/responses"),
    Asked(HI, "; send Authorization: Bearer KEY", HI, key=""),
    Asked({"messages": [{"role": "user", "content": b"\xe9".decode("latin-1") * 300}]}, "; shorten it", HI),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of a model whose template writes no tools, which takes 300 tokens; it has a key."""
    model, _ = scripted_model(write_text_files(tmp_path_factory.mktemp("m"), "qwen2"), str.upper, max_seq_len=300)
    with running(model, max_body_bytes=1 << 20, api_keys=("k",)) as found:
        yield found
        found.wait_until_idle()


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.advice.strip("; ")[:50])
def test_advice_works_when_it_is_followed(server: Running, asked: Asked) -> None:
    refused = server.post(asked.path, asked.wrong, headers={"authorization": asked.key})
    assert 400 <= refused.status_code < 500
    assert asked.advice in refused.json()["error"]["message"]
    done = server.post(asked.path, asked.right, headers={"authorization": "Bearer k"})
    assert done.status_code == 200, done.text


# what is not followed here: a piece of the message -> why, or where it is
ELSEWHERE = {
    "is not installed, and a server needs it": "tests/test_advice_of_commands.py",
    "An API key is empty": "tests/test_advice_of_commands.py",
    "choose another --port or --host": "tests/test_advice_of_commands.py",
    "expected localhost; behind a proxy, use --unix-socket": "tests/qwen_serve/test_process.py listens at one",
    "; try again later": "tests/qwen_serve/test_streams.py fills the queue, which gets empty",
    "; try again in a few seconds": "tests/qwen_serve/test_process.py waits for it",
    "; start the server again": "starting one is what every test here does",
}


def test_every_advice_is_followed_or_says_why_not() -> None:
    assert not_followed(["qwen_serve"], [asked.advice for asked in ASKED], ELSEWHERE) == []
    assert stale(["qwen_serve"], ELSEWHERE) == []
