"""Pairs of transformers' model and an engine, and that no test leaves a block of the engine's cache taken."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from cases.qwen1_names import as_qwen1
from cases.tiny import FAMILIES, QWEN1, WINDOWED
from cases.torch_pair import Pair
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_engine.errors import BuildError

QWEN1_NAMES, DEMO = "qwen1 under its own names", "demo"
# Rows of these go beyond the window, or the length that positions are stretched from.
LONG = {**dict.fromkeys(WINDOWED, 16), "yarn": 20}
EVERY_FAMILY = [*FAMILIES, *QWEN1, QWEN1_NAMES, *WINDOWED, "yarn", DEMO]


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def pair(request, tiny_checkpoint, build_engine, tmp_path_factory):
    """Of each family that there is, and of the demo."""
    if request.param == DEMO:
        pytest.importorskip("gguf")
        try:
            path = resolve_checkpoint(None).path
        except BuildError as error:
            pytest.skip(str(error))
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return Pair(theirs, path, build_engine(path, quant="none", max_seq_len=512))
    checkpoint = tiny_checkpoint("qwen1" if request.param == QWEN1_NAMES else request.param)
    path = checkpoint.path
    if request.param == QWEN1_NAMES:
        path = as_qwen1(path, tmp_path_factory.mktemp("qwen1") / "checkpoint")
    return Pair(checkpoint.model, path, build_engine(path, quant="none"), LONG.get(request.param, 1))


@pytest.fixture(scope="module")
def one(tiny_checkpoint, build_engine):
    """Of one family."""
    checkpoint = tiny_checkpoint("qwen3-tied")
    return Pair(checkpoint.model, checkpoint.path, build_engine(checkpoint.path, quant="none"))


@pytest.fixture(autouse=True)
def every_block_is_free(request):
    """After each test of a pair."""
    yield
    for name in {"pair", "one"} & set(request.fixturenames):
        fixture = request.getfixturevalue(name)
        if fixture.ours.num_free_blocks != fixture.free:
            gc.collect()  # objects of transformers form circles; half a second, where torch is loaded
        assert fixture.ours.num_free_blocks == fixture.free
