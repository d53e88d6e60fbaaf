"""Sessions of the plugin's operators alone, for the tests of the plugin."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort
import pytest
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

import qwen_plugin


def find_library() -> str:
    """``QWEN_PLUGIN_LIBRARY``, a library or a wheel that holds one, where tests are to have another than ours."""
    given = os.environ.get("QWEN_PLUGIN_LIBRARY") or str(qwen_plugin.library_path())
    if not given.endswith(".whl"):
        return given
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory)
    with zipfile.ZipFile(given) as wheel:
        return wheel.extract(f"qwen_plugin/{qwen_plugin.LIBRARY_NAME}", directory)


LIBRARY = find_library()
FLAGS = {"neon": "asimd", "avx2": "avx2", "avxvnni": "avx_vnni", "avx512": "avx512_vnni", "amx": "amx_int8"}


def supported() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return ["plain", *(isa for isa, flag in FLAGS.items() if flag in flags)]


ISAS = supported()


def make_model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    initializers: Sequence[TensorProto] = (),
) -> bytes:
    graph = helper.make_graph(nodes, "operators", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qwen", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def make_options(threads: int | str | None) -> ort.SessionOptions:
    """Of a session whose operators have ``threads``; None leaves it to them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if threads is not None:
        options.add_session_config_entry(qwen_plugin.THREADS_ENTRY, str(threads))
    options.register_custom_ops_library(LIBRARY)
    return options


def make_session(model: bytes, isa: str = "", threads: int | None = 1) -> ort.InferenceSession:
    """``isa``: the instruction set; "" leaves it to the operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_PLUGIN_ISA", isa)
        return ort.InferenceSession(model, make_options(threads), providers=["CPUExecutionProvider"])
