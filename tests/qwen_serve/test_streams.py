"""Clients that go, streams that are silent, requests that wait too long, and a house that is full."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cases.scripted import Script, scripted_model, write_text_files
from cases.serving import running, wait_until

HI = [{"role": "user", "content": "x" * 100}]
CHAT = {"messages": HI, "ignore_eos": True}


@pytest.fixture
def pace(monkeypatch):
    """How long a run of the model takes, in seconds; a test may change it."""
    pace, original = {"s": 0.01}, Script.run

    def run(self, batch):
        time.sleep(pace["s"])
        return original(self, batch)

    monkeypatch.setattr(Script, "run", run)
    return pace


@pytest.fixture
def model(tmp_path):
    return scripted_model(write_text_files(tmp_path), str.upper, max_seq_len=3000)[0]


def send(server, path, body, **headers):
    """A connection on which a request was sent; nothing is read from it."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(data)}", *(f"{name}: {value}" for name, value in headers.items())]
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
    return connection


def num_inside(server):
    return server.serving.admission.num_inside


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_goes_gives_its_request_up(model, pace, stream, path):
    body = CHAT if "chat" in path else {"prompt": ["x" * 100, "y" * 90], "max_tokens": 2000, "ignore_eos": True}
    with running(model) as server:
        connection = send(server, path, {**body, "stream": stream})
        wait_until(lambda: server.serving.opened.statistics.num_steps > 5)
        connection.close()
        server.wait_until_idle()
        assert server.serving.opened.statistics.num_steps < 1000
        wait_until(lambda: server.log)
        assert server.log[-1]["status"] in (200, 499)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_while_it_waits(model, pace, stream):
    with running(model, options={"max_batch_size": 1}) as server:
        first = send(server, "/v1/chat/completions", {**CHAT, "stream": True})
        wait_until(lambda: server.serving.opened.statistics.num_running == 1)
        others = [send(server, "/v1/chat/completions", {**CHAT, "stream": stream}) for _ in range(3)]
        wait_until(lambda: server.serving.opened.statistics.num_waiting == 3)
        for each in others:
            each.close()
        wait_until(lambda: num_inside(server) == 1 and server.serving.opened.statistics.num_waiting == 0)
        first.close()
        server.wait_until_idle()


def test_many_clients_that_go_leave_nothing(model, pace):
    pace["s"] = 0.001
    with running(model, max_queue=1000) as server:
        for number in range(60):
            connection = send(server, "/v1/chat/completions", {**CHAT, "stream": bool(number % 2), "n": 1 + number % 3})
            time.sleep(0.003 * (number % 5))
            connection.close()
        server.wait_until_idle()
        assert server.post("/v1/completions", {"prompt": "hi"}).json()["choices"][0]["text"] == "HI"


def test_a_full_house(model, pace):
    with running(model, options={"max_batch_size": 2}, max_queue=1) as server:
        inside = [send(server, "/v1/chat/completions", {**CHAT, "stream": True}) for _ in range(3)]
        wait_until(lambda: num_inside(server) == 3)
        started = time.monotonic()
        response = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 100_000}]})
        assert time.monotonic() - started < 30  # nothing of it was tokenized, nothing waited for
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-should-retry"] == "true"
        assert {server.client.get(path).status_code for path in ("/health", "/ready", "/metrics", "/v1/models")} == {
            200
        }
        assert b'admission_rejections_total{model_name="scripted"} 1.0' in server.client.get("/metrics").content
        for each in inside:
            each.close()
        server.wait_until_idle()
        assert server.post("/v1/completions", {"prompt": "a"}).status_code == 200


def test_a_request_for_more_than_the_house_is_let_in_alone(model):
    with running(model, options={"max_batch_size": 2}, max_queue=0) as server:
        assert len(server.chat("hi", n=8)["choices"]) == 8


@pytest.mark.parametrize("by_header", [False, True])
def test_a_deadline(model, pace, by_header):
    settings = {} if by_header else {"request_timeout_s": 0.3}
    headers = {"x-request-timeout-ms": "300"} if by_header else {}
    with running(model, **settings) as server:
        response = server.post("/v1/chat/completions", CHAT, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "0.3 s, which is the request's limit" in response.json()["error"]["message"]
        server.wait_until_idle()
        with server.client.stream(
            "POST", "/v1/chat/completions", json={**CHAT, "stream": True}, headers=headers
        ) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        response = server.post("/v1/completions", {"prompt": "a"}, headers={"x-request-timeout-ms": "x"})
        assert response.status_code == 400


def test_a_silent_stream_is_kept_alive(model, pace):
    pace["s"] = 0.5
    with running(model, keep_alive_s=0.1) as server:
        body = {"messages": HI, "max_tokens": 2, "stream": True}
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = list(response.iter_lines())
            assert response.headers["content-type"].startswith("text/event-stream")
            assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert lines.count(": keep-alive") >= 2
    assert "data: [DONE]" in lines


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST /tokenize HTTP/1.1\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
    ],
)
def test_a_request_that_does_not_come_is_not_waited_for(model, data):
    with running(model, read_timeout_s=0.3) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(data)
            received = connection.recv(1 << 16)
        assert received == b"" or b" 408 " in received.split(b"\r\n")[0]
        assert server.client.get("/health").status_code == 200


def test_requests_that_follow_each_other_on_one_connection(model):
    body = json.dumps({"prompt": "hi"}).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    with running(model) as server, socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(3 * request)
        received = b""
        while received.count(b'"text":"HI"') < 3:
            piece = connection.recv(1 << 16)
            assert piece, received
            received += piece
        assert received.count(b"HTTP/1.1 200") == 3


def test_a_long_prompt_does_not_stop_others(model):
    """While a megabyte is tokenized the loop answers: it was measured to stand still for seconds elsewhere."""
    with running(model) as server:
        longest, stop = 0.0, threading.Event()

        async def watch():
            nonlocal longest
            last = time.monotonic()
            while not stop.is_set():
                await asyncio.sleep(0.001)
                now = time.monotonic()
                longest, last = max(longest, now - last), now

        watcher = threading.Thread(target=lambda: asyncio.run(asyncio.wait_for(watch(), 600)))
        watcher.start()
        with ThreadPoolExecutor(4) as pool:
            long = [pool.submit(server.post, "/tokenize", {"prompt": "word " * 200_000}) for _ in range(4)]
            health = [server.client.get("/health").status_code for _ in range(20)]
            counts = {each.result(600).json()["count"] for each in long}
        stop.set()
        watcher.join(600)
        assert (set(health), len(counts)) == ({200}, 1)
