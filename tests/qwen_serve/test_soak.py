"""A short run of ``fuzz.soak``, and that it sees what it looks for."""

import random

from cases.processes import run_async
from cases.scripted import scripted_model, write_text_files
from cases.serving import running
from fuzz.answers import COMPLETIONS, Ask, make_ask, scripted_reply
from fuzz.soak import AT_ONCE, BATCH, scripted, soak, what_is_left

NUM_REQUESTS, NUM_DISTINCT = 150, 40


def test_nothing_is_lost_and_nothing_is_left(tmp_path):
    asks = [make_ask(random.Random(f"ask {index}"), index) for index in range(NUM_DISTINCT)]
    with running(scripted(tmp_path), options={"max_batch_size": BATCH}, max_queue=1000) as server:
        found = run_async(soak(server.url, asks, NUM_REQUESTS))
        assert found.wrong == []
        assert found.ends.keys() == {"answered", "left"}
        assert found.ends.total() == NUM_REQUESTS
        assert found.ends["left"] > NUM_REQUESTS // 20
        assert what_is_left(server) == []


def test_what_is_wrong_is_seen(tmp_path):
    """A model that says something else once it has been asked a while, or does not say what it should."""
    said = []

    def reply(prompt):
        said.append(prompt)
        return scripted_reply(prompt) + "!" * (len(said) > 20)

    model, _ = scripted_model(write_text_files(tmp_path, "qwen3"), reply, max_seq_len=1000)
    asks = [Ask(COMPLETIONS, {"prompt": "hi"}, "HI"), Ask(COMPLETIONS, {"prompt": "ho"}, "HA")]
    with running(model, max_queue=8) as server:
        found = run_async(soak(server.url, asks, 3 * AT_ONCE))
        complaints = what_is_left(server)
    assert {"another", "error"} <= found.ends.keys()  # another answer, and a house that is full
    assert len(found.wrong) > found.ends["another"] + found.ends["error"]
    assert [line for line in found.wrong if line.startswith("Ask") and "alone" in line]
    assert [line.split()[0] for line in complaints] == ["nothing", "statuses"]
