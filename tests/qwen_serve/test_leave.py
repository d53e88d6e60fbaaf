"""A short run of ``fuzz.leave`` and of ``fuzz.overload``, and that both see what they look for."""

import fuzz.leave
from cases.processes import run_async
from cases.scripted import scripted_model, write_text_files
from cases.serving import running
from fuzz.overload import overload

NUM_CLIENTS = 120


def test_clients_that_go_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz.leave, "MOST_GROWTH", 0.2)  # so few clients say little about memory
    went, memory, complaints = fuzz.leave.findings(tmp_path, NUM_CLIENTS)
    assert complaints == []
    assert (went.total(), len(memory)) == (NUM_CLIENTS, 10)
    for when in ("streamed, before it", "streamed, in the answer", "whole, before it"):
        assert went[when] > 0, went


def test_memory_that_grows_is_seen(tmp_path, monkeypatch):
    sizes = iter(range(100, 200))
    monkeypatch.setattr(fuzz.leave, "resident_mib", lambda: float(next(sizes)))
    _, memory, complaints = fuzz.leave.findings(tmp_path, 20)
    assert memory == [float(size) for size in range(100, 110)]
    assert complaints == []
    monkeypatch.setattr(fuzz.leave, "MOST_GROWTH", 0.01)
    _, _, complaints = fuzz.leave.findings(tmp_path / "again", 20)
    assert complaints == ["memory has grown from 115.0 to 119.0 MiB"]


def test_those_who_are_too_many_are_refused(tmp_path):
    model, _ = scripted_model(write_text_files(tmp_path, "qwen3"), str.upper, max_seq_len=1000)
    with running(model, options={"max_batch_size": 2}, max_queue=1) as server:
        took = run_async(overload(server.url, places=3, seconds=1.5, num_long=1))
        server.wait_until_idle()
    assert took.keys() == {"200", "429", "/health", "/metrics", "tokenized"}
    assert len(took["429"]) > len(took["200"]) / 10
