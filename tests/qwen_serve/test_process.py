"""The program: its start, its end by a signal, its sockets, and what it tells; with curl as a client."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from click.testing import CliRunner

from cases.processes import PATIENCE_S, start_python
from cases.scripted import write_text_files
from cases.serving import wait_until
from qwen_serve.cli import main

# A server of the scripted model, which takes a while to load and whose runs take their time.
SERVER = """
import json, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from cases.scripted import Script, scripted_model
from qwen_serve.engine.serving import Serving
from qwen_serve.http.program import serve
from qwen_serve.common.settings import Settings
settings = json.loads(sys.argv[3])
if "unix_socket" in settings:
    settings["unix_socket"] = Path(settings["unix_socket"])
run, load, wait = Script.run, Serving.open, settings.pop("load_s")
pause = settings.pop("run_s")
Script.run = lambda self, batch: (time.sleep(pause), run(self, batch))[1]
Serving.open = lambda self: (time.sleep(wait), load(self))[1]
model = scripted_model(Path(sys.argv[2]), str.upper, max_seq_len=2000)[0]
settings = Settings(model=model, served_names=("scripted",), **settings)
serve(settings, lambda line: print(line, file=sys.stderr, flush=True))
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def start(tmp_path, default_signals):
    """Starts a server with settings; it is killed at the end if it still runs."""
    from cases import TESTS

    directory, processes = write_text_files(tmp_path / "files"), []

    def started(load_s=0.0, run_s=0.02, **settings):
        arguments = [TESTS, directory, json.dumps({"load_s": load_s, "run_s": run_s, **settings}, default=str)]
        processes.append(start_python(SERVER, *arguments, start_new_session=True))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate(timeout=600)


def status(url, path="/ready"):
    try:
        return httpx2.get(url + path, timeout=60).status_code
    except httpx2.TransportError:
        return None


def test_a_server_from_its_start_to_its_end(start):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = start(load_s=1.0, port=port)
    wait_until(lambda: status(url) == 503)  # it listens before it has an engine
    loading = httpx2.get(url + "/health")
    assert loading.json()["error"]["code"] == "loading"
    wait_until(lambda: status(url) == 200)
    body = {"messages": [{"role": "user", "content": "x" * 40}], "stream": True}
    with httpx2.stream("POST", url + "/v1/chat/completions", json=body, timeout=PATIENCE_S) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"scripted at {url}/v1" in errors
    records = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert records[-1]["finish_reasons"] == ["stop"]
    assert "Traceback" not in errors


def test_sixteen_streams_end_properly_when_the_server_is_told_to(start):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = start(port=port, run_s=0.05)
    wait_until(lambda: status(url) == 200)
    begun = threading.Semaphore(0)

    def rest_of_stream(number):
        body = {"messages": [{"role": "user", "content": f"{number} " + "x" * 20}], "stream": True}
        with httpx2.stream("POST", url + "/v1/chat/completions", json=body, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            next(lines)
            begun.release()
            return [line for line in lines if line][-1]

    with ThreadPoolExecutor(16) as pool:
        rests = [pool.submit(rest_of_stream, number) for number in range(16)]
        for _ in rests:
            assert begun.acquire(timeout=PATIENCE_S)
        process.send_signal(signal.SIGTERM)
        assert {rest.result(PATIENCE_S) for rest in rests} == {"data: [DONE]"}
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (0, False), errors


def test_what_does_not_end_in_time_is_told(start):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = start(port=port, drain_timeout_s=0.2)
    wait_until(lambda: status(url) == 200)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True}
    with httpx2.stream("POST", url + "/v1/chat/completions", json=body, timeout=PATIENCE_S) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "draining"
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (0, False), errors


def test_a_second_signal_does_not_wait(start):
    port = free_port()
    process = start(port=port, drain_timeout_s=600.0, run_s=20.0)  # longer than a loaded machine needs for the rest
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: status(url) == 200)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True}
    with httpx2.stream("POST", url + "/v1/chat/completions", json=body, timeout=PATIENCE_S) as response:
        next(response.iter_lines())
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: status(url) != 200)  # two signals at once would be one
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 1


def test_a_server_that_was_killed_can_be_started_again(start, tmp_path):
    path = tmp_path / "socket"
    for _ in range(2):
        process = start(unix_socket=path)
        transport = httpx2.HTTPTransport(uds=str(path))
        with httpx2.Client(transport=transport, base_url="http://x") as client:

            def is_ready(client=client):
                try:
                    return client.get("/ready").status_code == 200
                except httpx2.TransportError:
                    return False

            wait_until(is_ready)
        process.kill()
        process.communicate(timeout=600)
    assert path.exists()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(start):
    port = free_port()
    start(port=port)
    wait_until(lambda: status(f"http://127.0.0.1:{port}") == 200)
    command = ["curl", "-sSN", f"http://127.0.0.1:{port}/v1/chat/completions", "-H", "Content-Type: application/json"]
    body = {"messages": [{"role": "user", "content": "hi"}]}
    found = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(found.stdout)["choices"][0]["message"]["content"].count("HI") == 1
    body["stream"] = True
    found = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.endswith("data: [DONE]\n\n")


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = CliRunner().invoke(main, [str(tmp_path), "--port", str(port)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"Error: cannot listen at 127.0.0.1:{port}: " in result.stderr
    assert "choose another --port or --host" in result.stderr


def test_an_engine_that_is_none_ends_the_program(tmp_path):
    result = CliRunner().invoke(main, [str(tmp_path / "none"), "--port", "0"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--replicas", "2"], "--replicas needs --ray."),
        (["--certificate", __file__], "--certificate and --private-key belong together."),
        (["--unix-socket", "s", "--certificate", __file__, "--private-key", __file__], "exclude each other"),
        (["--api-key", ""], "An API key is empty"),
        (["--cache-per-key"], "--cache-per-key needs an --api-key."),
        (["--port", "70000"], "70000 is not in the range"),
    ],
)
def test_options_that_make_no_sense(arguments, says):
    result = CliRunner().invoke(main, arguments, env={"QWEN_API_KEY": None})
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_certificate_that_is_none(tmp_path):
    result = CliRunner().invoke(
        main, [str(tmp_path), "--port", "0", "--certificate", __file__, "--private-key", __file__]
    )
    assert result.exit_code == 1
    assert "expected a certificate and its key in PEM" in result.stderr


def test_help_is_a_page_of_examples():
    text = CliRunner().invoke(main, ["--help"]).stdout
    for words in ("qwen-serve Qwen/Qwen2.5-0.5B-Instruct", "curl http://127.0.0.1:8000", "from openai import OpenAI"):
        assert words in text


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "Error: prometheus_client is not installed, and a server needs it; run pip install "
    )
