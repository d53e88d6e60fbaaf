"""What is refused before anything is started."""

import pytest

from cases.processes import run_python
from qwen_engine.errors import EngineError
from qwen_run.cluster.ray_nodes import check_free, choose_threads, join


@pytest.mark.parametrize(
    ("cpus", "count", "threads", "expected"),
    [([2], 2, None, 1), ([16], 1, None, 16), ([16, 16], 3, None, 8), ([3, 64], 2, None, 32), ([8], 2, 3, 3)],
)
def test_threads_are_as_many_as_let_all_have_their_processors(cpus, count, threads, expected):
    assert choose_threads(cpus, count, threads) == expected


@pytest.mark.parametrize(
    ("cpus", "count", "threads", "message"),
    [
        ([2], 3, None, "3 replicas of 1 CPUs need 3 CPUs, the cluster has 2 on 1 machines, room for 2"),
        ([4, 4], 3, 4, "3 replicas of 4 CPUs need 12 CPUs, the cluster has 8 on 2 machines, room for 2"),
        ([2, 2], 1, 3, "1 replicas of 3 CPUs need 3 CPUs, the cluster has 4 on 2 machines, room for 0"),
        ([], 1, None, "the cluster has 0 on 0 machines"),
    ],
)
def test_too_few_processors_are_refused_with_the_numbers(cpus, count, threads, message):
    with pytest.raises(EngineError, match=message):
        choose_threads(cpus, count, threads)


def test_processors_that_others_have_are_counted():
    check_free(4, 4.0)
    with pytest.raises(EngineError, match=r"need 4 CPUs, 3.5 of the cluster's are free"):
        check_free(4, 3.5)


def test_an_address_of_ray_client_is_refused():
    with pytest.raises(EngineError, match="Ray Client"):
        join("ray://head:10001")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nobody", "host:port", ":6379"])
def test_an_address_at_which_nobody_listens_is_refused_at_once(address):
    pytest.importorskip("ray")
    with pytest.raises(EngineError, match=address):
        join(address)


def test_what_to_install_is_said():
    code = """
import sys
sys.modules["ray"] = None
from qwen_run.cluster.ray_nodes import join
from qwen_engine.errors import EngineError
try:
    join("auto")
except EngineError as error:
    print(error)
"""
    found = run_python(code)
    assert found.stdout == "ray is not installed, and --ray needs it; run pip install 'ray[data]>=2.60'\n", found.stderr
