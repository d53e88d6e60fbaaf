"""Hostile requests over HTTP: each is answered or refused (2xx, 4xx), and the server is as well as before.

    PYTHONPATH=tests python -m fuzz.hostile --requests 50000

Most are sound requests with a few places changed; some are damaged bytes, wrong lengths, headers and methods. The
model follows a script, so that the server has all the work. ``--first N --requests 1`` repeats one of them.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import logging
import random
import re
import sys
import tempfile
import threading
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases.processes import PATIENCE_S
from cases.schemas import KINDS
from cases.scripted import scripted_model, write_text_files
from cases.serving import Running, running
from fuzz.answers import CHAT, COMPLETIONS, MESSAGES, RESPONSES, TOOLS
from fuzz.mutations import mutate_bytes, mutate_tree
from fuzz.soak import resident_mib

AT_ONCE = 16
MAX_SEQ_LEN = 400
SETTINGS: dict[str, Any] = {
    "max_queue": 200, "max_body_bytes": 1 << 18, "read_timeout_s": 1.0, "served_names": ("scripted",)
}  # fmt: skip

_USER = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
_CALLED = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "y"}'}}
_HISTORY = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [_CALLED], "reasoning_content": "r"},
            {"role": "tool", "tool_call_id": "c", "content": "5"}, _USER]  # fmt: skip
_SAMPLED = {
    "model": "m", "stream": False, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "n": 1,
    "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"5": 1}, "stop": ["q"],
    "stop_token_ids": [7], "min_tokens": 1, "max_tokens": 8, "bad_words": ["zz"], "allowed_token_ids": None,
    "ignore_eos": False, "skip_special_tokens": True, "stream_options": {"include_usage": True}, "cache_salt": "a",
    "truncate_prompt_tokens": 50, "return_token_ids": True, "user": "u", "metadata": {"a": "b"}, "priority": 0,
}  # fmt: skip
_TOOL = {"type": "function", "name": "f", "parameters": TOOLS[0]["function"]["parameters"]}
_BLOCKS = [{"type": "text", "text": "hi"}, {"type": "tool_result", "tool_use_id": "c", "content": "5"}]
# a sound request of each route
SOUND: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": _HISTORY, "tools": TOOLS, "tool_choice": "auto", **_SAMPLED}),
    (CHAT, {"messages": [_USER], "logprobs": True, "top_logprobs": 2, "reasoning_effort": "low", "max_tokens": 9,
            "chat_template_kwargs": {"enable_thinking": False}, "thinking_token_budget": 3, "stream": True}),
    (CHAT, {"messages": [_USER], "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}},
            "parallel_tool_calls": False, "max_completion_tokens": 20, "stream": True}),
    (CHAT, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "max_tokens": 3,
            "add_generation_prompt": False, "continue_final_message": True}),
    (COMPLETIONS, {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "best_of": 1, "suffix": None, **_SAMPLED}),
    (COMPLETIONS, {"prompt": [1, 2, 3], "max_tokens": 4, "stream": True}),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "[ab]{3}"}, "max_tokens": 9}),
    (COMPLETIONS, {"prompt": "a", "guided_grammar": 'start: "a" | b\nb: /[0-9]+/', "max_tokens": 9}),
    (COMPLETIONS, {"prompt": "a", "guided_choice": ["yes", "no"], "max_tokens": 9, "stream": True}),
    (RESPONSES, {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                           {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                           {"type": "function_call_output", "call_id": "c", "output": "5"}],
                 "instructions": "i", "tools": [_TOOL], "max_output_tokens": 9, "reasoning": {"effort": "low"},
                 "text": {"format": {"type": "text"}}, "stream": True}),
    (MESSAGES, {"model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "s"}], "stop_sequences": ["q"],
                "messages": [{"role": "user", "content": _BLOCKS}], "temperature": 0.5, "top_k": 3,
                "tools": [{"name": "f", "input_schema": _TOOL["parameters"]}], "tool_choice": {"type": "auto"},
                "thinking": {"type": "enabled", "budget_tokens": 1024}, "stream": True}),
    (f"{MESSAGES}/count_tokens", {"model": "m", "messages": [{"role": "user", "content": _BLOCKS}]}),
    ("/tokenize", {"prompt": "hi", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": _HISTORY, "tools": TOOLS}),
    ("/detokenize", {"tokens": [1, 2, 270]}),
    ("/apply-template", {"messages": _HISTORY, "tools": TOOLS}),
    ("/v1/embeddings", {"model": "m", "input": ["a"], "dimensions": 4}),
    ("/v1/rerank", {"query": "q", "documents": ["a"], "top_n": 1}),
]  # fmt: skip
PATHS = ("/", "/docs", "/openapi.json", "/v1/models", "/v1/models/scripted", "/metrics", "/health", "/ready",
         "/version", "/v1/models/%00", "/../../etc/passwd", "/%2e%2e/chat.js", "//", "/v1//models", "/%ff",
         "/chat.js?x=" + "y" * 999, "/v1/chat/completions/", "*", "http://other/")  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "get", "X" * 300, "\x00")
HEADERS = (
    "Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: x", "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip", "Content-Type: text/plain", "Content-Encoding: gzip", "Host: evil.example", "Host: ",
    "Authorization: Bearer \xff", "X-Request-Id: " + "a" * 500, "X-Request-Timeout-Ms: -5", "X-Request-Timeout-Ms: 1e9",
    "Expect: 100-continue", "Upgrade: websocket", "Cookie: " + "c" * 9000, "X: " + "x" * 70_000, "A b: c", ": d",
    "Origin: null", "If-None-Match: *", "Range: bytes=0-", "Connection: keep-alive, upgrade",
)  # fmt: skip
WHOLE = (
    "", "null", "5", '"a"', "[]", "{}", "[" * 100_000, '{"a":' * 50_000, '{"messages": NaN}', "\ufeff{}", "{" * 3000,
    '{"messages": [{"role": "user", "content": "' + "x" * 200_000 + '"}]}', "9" * 100_000,
    '{"seed": ' + "9" * 5000 + "}",
    '{"messages":[],"messages":[{}]}', '{"prompt": "\\ud800", "max_tokens": 2}', "\x00", "a" * 300_000, "-", "1e999999",
)  # fmt: skip


@dataclass(frozen=True)
class Hostile:
    """A request as bytes, and in words."""

    note: str
    data: bytes


def make_hostile(seed: int, number: int) -> Hostile:
    """Request ``number``; the same for the same seed."""
    rng = random.Random(f"{seed}-{number}")
    path, body = copy.deepcopy(rng.choice(SOUND))
    kind = rng.choice(["body"] * 12 + ["schema", "bytes", "whole", "headers", "method", "request"])
    method, headers, notes = "POST", [], [kind, path]
    if kind == "schema":
        _, field = rng.choice([("", "guided_json"), ("", "response_format")])
        schema = rng.choice(list(KINDS.values()))(rng, 0)
        notes.append(mutate_tree(schema, rng) if schema and rng.random() < 0.5 else "as it is")
        form = {"type": "json_schema", "json_schema": {"schema": schema, "strict": rng.random() < 0.5}}
        path, body = CHAT, {"messages": [_USER], field: schema if field == "guided_json" else form, "max_tokens": 30}
    if kind == "body":
        notes += [mutate_tree(body, rng) for _ in range(rng.choice([1, 1, 2, 4])) if body]
    text = rng.choice(WHOLE) if kind == "whole" else json.dumps(body, ensure_ascii=rng.random() < 0.9)
    data = text.encode("utf-8", "surrogatepass")
    if kind == "bytes":
        data, note = mutate_bytes(data, rng)
        notes.append(note)
    if kind == "headers":
        headers = rng.sample(HEADERS, rng.choice([1, 1, 2]))
    if kind == "method":
        method, path = rng.choice(METHODS), rng.choice([path, *PATHS])
    notes += [method, *headers]
    request = _request(method, path, headers, data)
    if kind == "request":
        request, note = mutate_bytes(request, rng)
        notes.append(note)
    return Hostile(f"{number}: " + " ".join(notes), request)


def _request(method: str, path: str, headers: list[str], data: bytes) -> bytes:
    named = {each.partition(":")[0].lower() for each in headers}
    usual = {"host": "localhost", "content-type": "application/json", "content-length": len(data)}
    lines = [f"{name}: {value}" for name, value in usual.items() if name not in named]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, *headers, "Connection: close"])
    return head.encode("latin-1") + b"\r\n\r\n" + data


async def complaint(port: int, hostile: Hostile) -> tuple[str, str]:
    """How ``hostile`` is answered, a class of statuses or ``none``, and what is wrong with that, if anything."""
    try:
        received = await asyncio.wait_for(_exchange(port, hostile.data), PATIENCE_S)
    except TimeoutError:
        return "none", "the connection stays open"
    status = re.match(rb"(?:HTTP/1\.1 100 Continue\r\n\r\n)?HTTP/1\.1 (\d)\d\d ", received)
    if status is None:
        return "none", f"no HTTP: {received[:80]!r}" if received else ""
    is_wrong = status[1] not in b"24" or b"Traceback" in received
    is_wrong |= b'"internal_error"' in received or b'"engine_error"' in received
    return f"{status[1].decode()}xx", received[-600:].decode("utf-8", "replace") if is_wrong else ""


async def _exchange(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    received = b""
    try:
        writer.write(data)
        while piece := await reader.read(1 << 16):
            received += piece
    except ConnectionError:  # who is not read to the end may not be read at all
        pass
    finally:
        writer.close()
    return received


class _Logged(logging.Handler):
    """Keeps what is logged as an error, and what no thread has caught."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []
        threading.excepthook = lambda found: self.lines.append(f"in a thread: {found.exc_value!r}")

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


async def attack(server: Running, seed: int, first: int, count: int) -> tuple[Counter[str], list[str]]:
    """How many requests were answered how, and a line for each that was not answered well."""
    ends: Counter[str] = Counter()
    lines: list[str] = []
    numbers = iter(range(first, first + count))

    async def client() -> None:
        for number in numbers:
            hostile = make_hostile(seed, number)
            end, wrong = await complaint(server.port, hostile)
            ends[end] += 1
            lines.extend([f"{hostile.note:.500}: {wrong}"] if wrong else [])
            if number and number % 5000 == 0:
                print(f"{number} requests, {resident_mib():.1f} MiB", flush=True)

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return ends, lines


def findings(directory: Path, seed: int, first: int, count: int) -> tuple[Counter[str], list[str]]:
    """As :func:`attack`, against a server of its own; with what it logs, and what is left in it."""
    model, script = scripted_model(write_text_files(directory, "qwen3"), lambda prompt: "ok", max_seq_len=MAX_SEQ_LEN)
    script.seen = deque(maxlen=4 * AT_ONCE)
    logged = _Logged()
    logging.getLogger().addHandler(logged)
    try:
        with running(model, **SETTINGS) as server:
            server.log = deque(maxlen=1000)  # type: ignore[assignment]
            ends, lines = asyncio.run(asyncio.wait_for(attack(server, seed, first, count), PATIENCE_S + count))
            server.wait_until_idle()
            last = server.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 9})
            lines += [] if last.status_code == 200 else [f"afterwards: {last.text}"]
            lines += sorted({f"status {record['status']}" for record in server.log if record["status"] >= 500})
    finally:
        logging.getLogger().removeHandler(logged)
        threading.excepthook = threading.__excepthook__
    return ends, lines + logged.lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hostile") as directory:
        ends, lines = findings(Path(directory), given.seed, given.first, given.requests)
    print(*lines, sep="\n")
    print(", ".join(f"{count} {end}" for end, count in sorted(ends.items())) + f", {len(lines)} wrong")
    sys.exit(1 if lines or ends.total() != given.requests else 0)


if __name__ == "__main__":
    main()
