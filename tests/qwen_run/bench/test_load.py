"""A server under load: a made-up one, whose times are known, and what cannot be measured."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from qwen_engine.errors import RequestError
from qwen_run.bench.figures import Timeline
from qwen_run.bench.http_client import Address
from qwen_run.bench.load import LoadFigures, Sent
from qwen_run.commands.bench import main

PAUSE_S = 0.02


@contextmanager
def made_up_server(chunked=True, answer=None):
    """A server of three chunks with two tokens each, ``PAUSE_S`` apart; ``seen`` are the requests it got."""
    seen, most, now, ready, port = [], [0], [0], threading.Event(), [0]

    async def serve(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].split()[0])
        seen.append((head, json.loads(await reader.readexactly(length))))
        now[0] += 1
        most[0] = max(most[0], now[0])
        if answer is not None:
            writer.write(answer)
        else:
            coding = "Transfer-Encoding: chunked\r\n" if chunked else ""
            writer.write(f"HTTP/1.1 200 OK\r\n{coding}Content-Type: text/event-stream\r\n\r\n".encode())
            usage = {"prompt_tokens": 7, "completion_tokens": 6}
            chunks = [{"choices": [{"text": "ab"}]}] * 3 + [{"choices": [], "usage": usage}]
            for line in [": keep-alive", *(f"data: {json.dumps(chunk)}" for chunk in chunks), "data: [DONE]"]:
                data = f"{line}\n\n".encode()
                writer.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
                await writer.drain()
                await asyncio.sleep(PAUSE_S)
            writer.write(b"0\r\n\r\n" if chunked else b"")
        now[0] -= 1
        writer.close()

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port[0] = server.sockets[0].getsockname()[1]
        ready.set()
        async with server:
            while not stop.is_set():
                await asyncio.sleep(0.01)

    stop = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(asyncio.wait_for(run(), 600)))
    thread.start()
    assert ready.wait(600)
    try:
        yield f"http://127.0.0.1:{port[0]}", seen, most
    finally:
        stop.set()
        thread.join(600)


def bench(*arguments):
    return CliRunner().invoke(main, ["serve", *arguments])


@pytest.mark.parametrize("chunked", [True, False])
def test_a_load_of_so_many_at_once(chunked):
    with made_up_server(chunked) as (url, seen, most):
        result = bench("--url", f"{url}/v1", "--concurrency", "3", "--requests", "7", "--json", "--api-key", "k")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["completed"], found["failed"], found["max_concurrency"]) == (7, 0, 3)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (49, 42)
    assert 1 < most[0] <= 3
    assert found["median_itl_ms"] >= PAUSE_S * 1000 * 0.9
    assert found["median_tpot_ms"] == pytest.approx(found["median_itl_ms"] * 2 / 5, rel=0.7)
    assert found["mean_e2el_ms"] > found["mean_ttft_ms"]
    assert found["output_throughput"] == pytest.approx(42 / found["duration"], rel=1e-4)
    head, body = seen[0]
    assert "Authorization: Bearer k" in head
    assert (body["max_tokens"], len(body["prompt"].split()), body["ignore_eos"]) == (64, 128, True)
    assert len({each["prompt"] for _, each in seen}) == 7


def test_a_load_as_a_trace_says(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,5,3\n0.1,6,4\n0.4,7,5\n")
    with made_up_server() as (url, seen, _):
        started = time.perf_counter()
        result = bench("--url", url, "--trace", str(trace), "--rate", "10")
        assert time.perf_counter() - started < 60
    assert result.exit_code == 0, result.output
    assert "3 requests in" in result.stdout
    rows = [line.split()[0] for line in result.stdout.splitlines()[2:7]]
    assert rows == ["ms", "first", "token", "between", "answer"]
    assert sorted((body["max_tokens"], len(body["prompt"].split())) for _, body in seen) == [(3, 5), (4, 6), (5, 7)]


FAILURES = {
    "status": (b"HTTP/1.1 503 no\r\nContent-Length: 4\r\n\r\nbusy", "answers with status 503: busy"),
    "event": (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "broken"}}\n\n', "broken"),
    "nothing": (b"", "no request was answered"),
    "no HTTP": (b"hello\r\n", "no HTTP"),
    "cut": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc", "in the midst of an answer"),
    "empty": (b"HTTP/1.1 200 OK\r\n\r\ndata: [DONE]\n\n", "the answer has no token"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_server_that_fails(name):
    answer, says = FAILURES[name]
    with made_up_server(answer=answer) as (url, _, _):
        result = bench("--url", url, "--requests", "2")
    assert result.exit_code == 1
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("url", ["ftp://x", "localhost:8000", "http://", "http://x:99999"])
def test_what_is_no_address(url):
    with pytest.raises(RequestError, match=r"expected one such as http://127\.0\.0\.1:8000"):
        Address.of(url)


def test_where_nobody_listens():
    result = bench("--url", "http://127.0.0.1:1", "--requests", "1")
    assert (result.exit_code, "there is no server at 127.0.0.1:1" in result.stderr) == (1, True)


def test_a_rate_needs_a_trace():
    result = bench("--rate", "1")
    assert (result.exit_code, "--rate needs a --trace." in result.stderr) == (2, True)


def test_figures_are_those_of_the_definitions():
    first = Sent(Timeline(0.0, 5, [0.1, 0.2, 0.4]), output_tokens=6, ended_s=0.5)
    second = Sent(Timeline(1.0, 3, [1.3]), output_tokens=1, ended_s=1.4)
    failed = Sent(Timeline(1.0, 3), error="x")
    found = LoadFigures([first, second, failed], 2.0).to_dict()
    assert (found["completed"], found["failed"], found["total_input_tokens"]) == (2, 1, 8)
    assert found["median_ttft_ms"] == pytest.approx(200)
    assert found["mean_tpot_ms"] == pytest.approx(60)
    assert (found["mean_itl_ms"], found["p99_itl_ms"]) == pytest.approx((150, 199))
    assert found["mean_e2el_ms"] == pytest.approx(450)
    assert found["total_token_throughput"] == pytest.approx(7.5)
