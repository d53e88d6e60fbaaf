"""Stages as actors of a Ray cluster of three nodes, in a network namespace of its own; and without Ray what can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cases.processes import run_python
from cases.ray_cluster import missing, run_inside
from qwen_engine.errors import EngineError
from qwen_run.pipeline.alike import check_alike, facts
from qwen_run.pipeline.ray_stages import StageActor
from qwen_run.pipeline.stage_process import start_of
from qwen_run.pipeline.wire import Kind, Message
from qwen_run.runtime.stage import Stage

CLUSTER = """
import os, signal, sys, time
import ray
from ray.cluster_utils import Cluster
from qwen_run import LLM, SamplingParams

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
ways = [{"temperature": 0}, {"temperature": 0.9, "seed": 3, "n": 2}, {"temperature": 0, "num_beams": 2},
        {"temperature": 0, "prompt_logprobs": 1}]
prompts = [[(7 * i + j) % 250 for j in range(length)] for i, length in enumerate([5, 90, 200, 3, 64, 17, 130, 40])]
params = [SamplingParams(max_tokens=24, ignore_eos=True, **ways[i % 4]) for i in range(len(prompts))]
options = {"threads": 1, "num_blocks": 40, "max_batch_size": 6}

def ask(llm, on_step=lambda _: None):
    pending = [llm.prepare(*each) for each in zip(prompts, params)]
    llm.submit(*pending)
    steps = 0
    while not llm.core.is_done:
        on_step(steps)
        llm.step()
        steps += 1
    outputs = [each.output(whole=True) for each in pending]
    return [([(a.token_ids, a.logprobs) for a in o.outputs], o.prompt_logprobs) for o in outputs]

expected = ask(LLM(sys.argv[1], **options))
llm = LLM(sys.argv[1], pipeline_parallel_size=3, distributed_executor_backend="ray", **options)
executor = llm.core.engine.executor
"""
BITS = """
assert ask(llm) == expected
assert llm.core.statistics.num_lost_stages == 0
pids = lambda: [told["pid"] for told in executor.told]
before = pids()
killed = []

def kill(step):
    if step in (10, 25):
        victim = pids()[step % 2]
        killed.append(victim)
        os.kill(victim, signal.SIGKILL)

assert ask(llm, kill) == expected
assert not set(killed) & set(pids())
cache = llm.core.engine.cache
assert cache.num_free == cache.num_blocks
print("equal bits", llm.core.statistics.num_lost_stages >= 2, len(set(before)) == 2)
executor.close()
ray.shutdown()
cluster.shutdown()
"""
NODE = """
spare = cluster.add_node(num_cpus=1)

def remove(step):
    if step == 12:
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.remove_node(nodes[1], allow_graceful=False)
        cluster.add_node(num_cpus=1)

assert ask(llm, remove) == expected
print("equal bits", llm.core.statistics.num_lost_stages >= 1)
executor.close()
ray.shutdown()
cluster.shutdown()
"""
TOO_FEW = """
import qwen_run.pipeline.ray_stages as stages
stages.PLACES_S = 3.0
executor.close()
try:
    LLM(sys.argv[1], pipeline_parallel_size=6, distributed_executor_backend="ray", **options)
except Exception as error:
    print(type(error).__name__, error)
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def namespace() -> None:
    if reason := missing():
        pytest.skip(reason)


@pytest.mark.ray
@pytest.mark.usefixtures("namespace")
def test_actors_answer_as_one_process_also_when_they_are_killed(engine: Path) -> None:
    assert run_inside(CLUSTER + BITS, engine, patience=2).count("equal bits True True") == 1


@pytest.mark.ray
@pytest.mark.usefixtures("namespace")
def test_a_node_that_is_lost_changes_no_answer(engine: Path) -> None:
    assert run_inside(CLUSTER + NODE, engine, patience=2).count("equal bits True") == 1


@pytest.mark.ray
@pytest.mark.usefixtures("namespace")
def test_more_stages_than_nodes_are_refused_with_the_numbers(engine: Path) -> None:
    told = run_inside(CLUSTER + TOO_FEW, engine, patience=2)
    expected = "EngineError 5 stages beside this one need as many nodes with 1 free CPUs each; the cluster has 3 with"
    assert f"{expected} 1, 1, 1; add nodes" in told


def test_ray_is_imported_where_it_is_asked_for_alone(engine: Path) -> None:
    code = """
import sys
from qwen_run import LLM, SamplingParams
LLM(sys.argv[1], num_blocks=32, threads=1, pipeline_parallel_size=2).generate("hi", SamplingParams(max_tokens=2))
print("ray" in sys.modules)
"""
    assert run_python(code, engine).stdout.splitlines()[-1] == "False"


def test_without_ray_it_says_what_to_install(engine: Path) -> None:
    code = """
import sys
sys.modules["ray"] = None
from qwen_run import LLM
try:
    LLM(sys.argv[1], pipeline_parallel_size=2, distributed_executor_backend="ray", num_blocks=32)
except Exception as error:
    print(type(error).__name__, error)
"""
    told = run_python(code, engine).stdout.splitlines()[-1]
    assert told == "EngineError ray is not installed, and the executor ray needs it; run pip install 'ray[data]>=2.60'"


def test_an_actor_takes_the_next_batch_of_its_generation_alone(engine: Path) -> None:
    """One that was started again has none, and one that has missed a batch no past."""
    actor = StageActor()
    with pytest.raises(RuntimeError, match="batch 1 of generation 1, expected 1 of 0"):
        actor.run(Message(Kind.BATCH, 1, 1))
    assert actor.join(2, start_of(engine, range(2), 8, 1))["layers"] == [0, 2]
    with pytest.raises(RuntimeError, match="batch 2 of generation 2, expected 1 of 2"):
        actor.run(Message(Kind.BATCH, 2, 2))
    with pytest.raises(RuntimeError, match="batch 1 of generation 1, expected 1 of 2"):
        actor.run(Message(Kind.BATCH, 1, 1))


def test_an_actor_that_cannot_load_says_why(tmp_path: Path) -> None:
    assert "does not exist" in StageActor().join(1, start_of(tmp_path / "none", range(2), 8, 1))["error"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("engine", "engine"),
        ("version", "qwen-engine"),
        ("operators", "operators"),
        ("numerics", "numerics class"),
    ],
)
def test_stages_that_differ_are_refused_by_name(engine: Path, name: str, words: str) -> None:
    own: dict[str, Any] = facts(Stage.load(engine, range(4, 6), 8, threads=1)) | {"host": "here"}
    other = own | {"host": "there", "layers": [0, 4], name: "another"}
    check_alike(own, [own])
    with pytest.raises(EngineError, match=rf"^there \(layers 0 to 3\) has {words} another, here has .*; install one"):
        check_alike(own, [own, other])
