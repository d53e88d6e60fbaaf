"""The operators' own threads: how many a session asks for, callers at once, and their end. What they do to results is
tested with the operators, their memory order by ``tests/sanitize.py``."""

import gc
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from cases.plugin_session import make_model, make_options, make_session
from cases.processes import PATIENCE_S
from qwen_plugin import MOST_THREADS
from qwen_plugin.compile import FLAGS, SOURCES, find_compiler
from qwen_plugin.layout import pack_panels

N, K, GROUP = 640, 512, 32
ROWS = np.random.default_rng(1).standard_normal((3, K)).astype(np.float32)


def two_products() -> bytes:
    """One after the other, so that threads fetch the second one's weight while the first one ends."""
    rng = np.random.default_rng(0)
    nodes, weights, source = [], [], "x"
    for name, (rows, columns) in {"a": (K, K), "b": (N, K)}.items():
        q = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
        scales = np.full((rows, columns // GROUP), 1 / 64, np.float32)
        packed = pack_panels(q, scales, None, 4, GROUP, False)
        weights.append(helper.make_tensor(name, TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True))
        attributes = {"N": rows, "K": columns, "bits": 4, "group_size": GROUP, "symmetric": 1, "precision": "int8"}
        nodes.append(helper.make_node("QuantLinear", [source, name], [f"y.{name}"], domain="qwen", **attributes))
        source = f"y.{name}"
    return make_model(
        nodes,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])],
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, ["rows", N])],
        weights,
    )


MODEL = two_products()


def new_session(threads: int | None) -> ort.InferenceSession:
    return make_session(MODEL, threads=threads)


def run_rows(session: ort.InferenceSession) -> np.ndarray:
    return session.run(None, {"x": ROWS})[0]


@pytest.fixture(scope="module")
def alone() -> np.ndarray:
    return run_rows(new_session(1))


def num_threads() -> int:
    gc.collect()
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("count", ["0", "-1", "two", "2 ", "", str(MOST_THREADS + 1), "9" * 20, "1" * 100])
def test_a_count_that_is_none_is_refused(count: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"qwen\.threads is '{count}', expected 1 to {MOST_THREADS}"):
        make_options(count)


@pytest.mark.parametrize("count", [2, 3, 16, None])
def test_any_count_gives_the_same(count: int | None, alone: np.ndarray) -> None:
    session = new_session(count)
    for _ in range(50):
        assert np.array_equal(run_rows(session), alone)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of threads")
def test_threads_are_there_while_a_session_is() -> None:
    before = num_threads()
    session = new_session(5)
    assert num_threads() == before + 4
    run_rows(session)
    del session
    assert num_threads() == before


def test_many_callers_of_one_session(alone: np.ndarray) -> None:
    session = new_session(2)
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(y, alone) for y in pool.map(lambda _: run_rows(session), range(200)))


def test_sessions_of_the_same_options_share_them_to_the_last(alone: np.ndarray) -> None:
    options = make_options(2)
    sessions = [ort.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"]) for _ in range(3)]
    del options
    while sessions:
        assert all(np.array_equal(run_rows(session), alone) for session in sessions)
        sessions.pop(0)
        gc.collect()


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_under_stress(tmp_path: Path) -> None:
    program = tmp_path / "threads_stress"
    sources = [Path(__file__).with_name("threads_stress.cc"), SOURCES / "operator" / "threads.cc"]
    subprocess.run([*find_compiler(), *FLAGS, "-pthread", *sources, "-o", program], check=True, timeout=PATIENCE_S)
    result = subprocess.run([program], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
