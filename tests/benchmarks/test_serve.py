"""benchmarks.serve: what it measures of a tiny model, and the table."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serve, serve_parts
from benchmarks.serve_parts import Found, Plan, asked, poisson, texts
from benchmarks.serve_report import report
from benchmarks.serve_sides import LLAMA, OURS, Server, first_answer_s, with_words
from cases import ROOT
from cases.processes import PATIENCE_S, start_python
from qwen_engine.errors import RequestError
from qwen_run.bench.figures import Timeline
from qwen_run.bench.load import LoadFigures, Sent
from qwen_run.bench.trace import SAMPLE_TRACE, Arrival
from qwen_run.text.tokenizer import Tokenizer

needs_server = pytest.mark.skipif(
    not all(map(find_spec, ("fastapi", "uvicorn", "prometheus_client", "llguidance"))), reason="needs the extra serve"
)

# A server that loads, then answers any request: 503 twice, then 200.
LOADING = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    left = [2]
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response({status} if self.left[0] else 200)
        self.left[0] -= 1
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def figures(gap_s: float, tokens: int = 5) -> LoadFigures:
    """Of one request that waits for two gaps, then has a token every gap."""
    moments = [gap_s * (2 + index) for index in range(tokens)]
    return LoadFigures([Sent(Timeline(0.0, 3, moments), tokens, moments[-1])], moments[-1])


def test_table_of_streams() -> None:
    found = Found()
    for side, gap_s in ((OURS, 0.01), (LLAMA, 0.02)):
        for factor in (1, 1, 5):  # the median does not see the third round, p99 does
            found.note("16 at once", side, figures(gap_s * factor))
    assert report(found).splitlines()[2:] == [
        "| | qwen-serve | llama-server | ratio | goal |",
        "|---|---|---|---|---|",
        "| 16 at once: output tok/s | 83.3 | 41.7 | 2.00 × | 2 × or more |",
        "| 16 at once: time between tokens, ms, p50 | 10 | 20 | 0.50 × |  |",
        "| 16 at once: time between tokens, ms, p99 | 50 | 100 | 0.50 × | below 1 × |",
        "| 16 at once: time to the first token, ms, p50 | 20 | 40 | 0.50 × |  |",
        "| 16 at once: time to the first token, ms, p99 | 98.4 | 197 | 0.50 × | below 1 × |",
    ]


def test_table_of_the_server_alone() -> None:
    found = Found()
    for name, value in {
        "python, tok/s": 100.0, "http, tok/s": 97.0, "main thread, µs a chunk": 50.0,
        "client, µs a chunk": 40.0,
        "python, ms to the first token": 10.0, "http, ms to the first token": 12.0, "free, tok/s of 1 at once": 50.0,
        "schema, tok/s of 1 at once": 49.0, "longest gap alone, ms": 20.0, "longest gap refused, ms": 30.0,
        "start to the first answer, s": 1.2,
    }.items():  # fmt: skip
        found.add(name, value)
    lines = report(found).splitlines()
    assert [line.split(" | ")[1] for line in lines[4:]] == [
        "97.0% (97 and 100 tok/s)", "2.00 ms (12 and 10 ms)", "50 µs", "40 µs", "98.0% (49 and 50 tok/s)",
        "10 ms (30 ms)", "1.20 s",
    ]  # fmt: skip


def test_arrivals_have_lengths_of_the_trace() -> None:
    arrivals = poisson(SAMPLE_TRACE, Plan(arrivals=50, rate=2.0, divisor=2), 150)
    assert (len(arrivals), arrivals[0].arrived_s) == (50, 0.0)
    assert 10 < arrivals[-1].arrived_s < 50
    assert max(each.input_tokens + each.output_tokens for each in arrivals) < 150
    assert arrivals == poisson(SAMPLE_TRACE, Plan(arrivals=50, rate=2.0, divisor=2), 150)


def test_prompts_are_new() -> None:
    prompts = texts("a", [20, 30]) + texts("b", [20])
    assert [len(each) for each in prompts] == [20, 30, 20]
    assert len({each[:8] for each in prompts}) == 3


def test_every_token_of_a_random_checkpoint_is_a_text(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"vocab_size": 400, "eos_token_id": 399, "bos_token_id": null}')
    (checkpoint / "tokenizer.json").write_text("another")
    directory = with_words(checkpoint, tmp_path / "words")
    assert (directory / "config.json").samefile(checkpoint / "config.json")
    tokenizer = Tokenizer.load(directory)
    assert len(tokenizer.encode("some text, ÿ")) == 13
    assert all(tokenizer.decode([token], True) for token in range(256, 399))
    assert tokenizer.decode([399], True) == ""


def test_an_answer_of_another_length_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_parts, "PAUSE_S", 0.0)
    monkeypatch.setattr(serve_parts, "run_load", lambda load: figures(0.01, 5))
    server = Server(OURS, start_python(""), 1)
    server.process.wait(PATIENCE_S)
    assert asked(server, [Arrival(0.0, 3, 5)], 1, "a").done
    with pytest.raises(RequestError, match=r"qwen-serve answers with \[5\] tokens, expected \[6\]"):
        asked(server, [Arrival(0.0, 3, 6)], 1, "a")


def test_start_to_the_first_answer(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADING.format(status=503)]
    assert first_answer_s(command, {}, tmp_path / "log") > 0
    with pytest.raises(RequestError, match="status 500"):
        first_answer_s([sys.executable, "-c", LOADING.format(status=500)], {}, tmp_path / "log")
    with pytest.raises(RequestError, match="there is no answer"):
        first_answer_s([sys.executable, "-c", "raise SystemExit(3)"], {}, tmp_path / "log")


@needs_server
def test_a_tiny_model(tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_parts, "PAUSE_S", 0.0)
    arguments = {
        "--checkpoint": tiny_checkpoint("qwen1-large").path, "--parts": "streams,poisson,python,schema",
        "--length": 512, "--threads": 1, "--rate": 50, "--work": tmp_path, "--output": tmp_path,
    }  # fmt: skip
    words = [str(word) for pair in arguments.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["serve", "--quick", *words])
    serve.main()
    (page,) = tmp_path.glob("serve-*.md")
    rows = [line for line in page.read_text("utf-8").splitlines() if line.startswith("| ") and line[2] != "|"]
    assert len(rows) == 4 * 5 + 6
    measured = [row for row in rows if "time between tokens" not in row]  # several may come at once
    assert all(any(letter in "123456789" for letter in row.split(" | ")[1]) for row in measured)


def test_parts_that_are_none() -> None:
    command = [sys.executable, "-m", "benchmarks.serve", "--parts", "streams,x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "no parts x; there are streams, poisson" in done.stderr
