"""``qwen-serve --ray``: a replica is killed under its streams, and no client sees it. On a cluster of its own."""

import pytest

from cases.ray_cluster import missing, run_inside

WHY = missing()
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(WHY is not None, reason=str(WHY))]

KILLED = """
import asyncio, os, signal, sys
from cases.ray_cluster import replica_processes, serving, wait_for
from cases.streams import bodies, read_all
import httpx2

engine = sys.argv[1]
requests = bodies(16, 60)
with serving(engine, 2, "--kv-cache-memory", "64", "--max-seq-len", "512") as url:
    assert len(replica_processes()) == 2
    undisturbed = asyncio.run(read_all(url, requests))
    assert all(each.error is None and each.text for each in undisturbed), undisturbed
    first, *_ = replica_processes()

    def kill(total):
        if total == 150:
            os.kill(first, signal.SIGKILL)

    disturbed = asyncio.run(read_all(url, requests, kill))
    assert disturbed == undisturbed, [pair for pair in zip(disturbed, undisturbed) if pair[0] != pair[1]]
    wait_for(lambda: len(replica_processes()) == 2 and first not in replica_processes())
    wait_for(lambda: "qwen:replicas_ready{model_name" in httpx2.get(url + "/metrics").text)
    found = httpx2.get(url + "/metrics").text
    figures = {line.split("{")[0]: float(line.split()[-1]) for line in found.splitlines() if line[0] != "#"}
    assert figures["qwen:replica_deaths_total"] == 1 and figures["qwen:requests_moved_total"] > 0, figures
    wait_for(lambda: "qwen:replicas_ready{" in (text := httpx2.get(url + "/metrics").text)
             and text.split("qwen:replicas_ready{")[1].split()[1] == "2.0")

    # one that is stopped says nothing, and closes no connection
    stopped, *_ = replica_processes()

    def stop(total):
        if total == 150:
            os.kill(stopped, signal.SIGSTOP)

    assert asyncio.run(read_all(url, requests, stop)) == undisturbed
    wait_for(lambda: len(replica_processes()) == 2 and stopped not in replica_processes())
    wait_for(lambda: "replicas_ready" in (text := httpx2.get(url + "/metrics").text)
             and text.split("qwen:replicas_ready{")[1].split()[1] == "2.0")

    # without any replica requests are told to come again, and those under way wait
    def kill_all(total):
        if total == 150:
            for pid in replica_processes():
                os.kill(pid, signal.SIGKILL)
            async def ask():
                async with httpx2.AsyncClient() as client:
                    while (answer := await client.get(url + "/ready")).status_code == 200:
                        await asyncio.sleep(0.01)
                    asked.append(answer)
            tasks.append(asyncio.ensure_future(ask()))

    asked, tasks = [], []
    assert asyncio.run(read_all(url, requests, kill_all)) == undisturbed
    assert asked[0].status_code == 503 and asked[0].json()["error"]["code"] == "loading", asked[0].text
    assert asked[0].headers["x-should-retry"] == "true"
wait_for(lambda: not replica_processes())
print("done")
"""


def test_no_stream_breaks_when_replicas_are_killed(chat_engine):
    assert run_inside(KILLED, chat_engine).endswith("done\n")
