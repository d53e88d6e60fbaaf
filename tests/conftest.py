"""Tiny random checkpoints as transformers saves them, engines built from them, and ways to run both."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cases.packed import Case, PackedCheckpoint, random_packed
from cases.scripted import write_text_files
from cases.tiny import FAMILIES, MIXTURES, QWEN1, ROTATED, TINY, WINDOWED, TinyCheckpoint

# A shell's background job ignores the key that interrupts, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow modules first, so that no process of ``make test`` has one left when the others are done."""

    def is_fast(item: pytest.Item) -> bool:
        module = item.getparent(pytest.Module)
        return module is None or module.get_closest_marker("slow") is None

    items.sort(key=is_fast)


@pytest.fixture
def default_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP as a terminal's commands have them: children inherit what ``nohup`` ignores."""
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.signal(number, signal.SIG_DFL))
        yield


@pytest.fixture
def ignored_hangup() -> Iterator[None]:
    """SIGHUP as ``nohup`` leaves it, here and in children."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyCheckpoint]:
    """Makes ``tiny_checkpoint(family, dtype="float32", sharded=False)``, each once a session."""

    @cache
    def make(family: str, dtype: str = "float32", sharded: bool = False) -> TinyCheckpoint:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        path = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(**TINY | (FAMILIES | QWEN1 | ROTATED | WINDOWED | MIXTURES)[family])
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # transformers starts norms at 1 and biases at 0, which hides mistakes
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.to(getattr(torch, dtype)).save_pretrained(path, **{"max_shard_size": "60KB"} if sharded else {})
        assert (path / "model.safetensors.index.json").exists() == sharded
        # Loaded again: rounding the weights in place would have rounded the rotary frequencies too.
        return TinyCheckpoint(path, transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))

    return make


@pytest.fixture(scope="session")
def build_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes ``build_engine(checkpoint_directory, **BuildOptions fields)``, the directory of a new engine."""
    from qwen_build.checkpoint.locate import resolve_checkpoint
    from qwen_build.checkpoint.weights import Checkpoint
    from qwen_build.engine_build import plan_build, write_engine
    from qwen_build.plan.options import BuildOptions

    @cache
    def build(directory: Path, **options: Any) -> Path:
        output = tmp_path_factory.mktemp("engines") / "engine"
        with Checkpoint.open(directory) as weights:
            write_engine(
                plan_build(weights, resolve_checkpoint(str(directory)), BuildOptions(**options)), weights, output
            )
        return output

    return build


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The directory of the real demo model; tests that need it are skipped where it is not installed."""
    pytest.importorskip("gguf")
    from qwen_build.checkpoint.locate import resolve_checkpoint
    from qwen_engine.errors import BuildError

    try:
        return resolve_checkpoint(None).path
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def chat_engine(tmp_path_factory: pytest.TempPathFactory, build_engine: Callable[..., Path]) -> Path:
    """A tiny Qwen3 with random weights, quantised, and the tokenizer and template of the scripted model."""
    import torch
    import transformers

    path = write_text_files(tmp_path_factory.mktemp("tiny") / "tiny", "qwen3", eos_token_id=[264, 262])
    generation_config = (path / "generation_config.json").read_text("utf-8")
    torch.manual_seed(3)
    sizes = TINY | {"model_type": "qwen3", "head_dim": 16, "vocab_size": 283, "max_position_embeddings": 2048}
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**sizes)).save_pretrained(path)
    (path / "generation_config.json").write_text(generation_config, "utf-8")
    return build_engine(path, quant="int8")


@pytest.fixture
def pack(tiny_checkpoint, tmp_path) -> Callable[..., PackedCheckpoint]:
    """Makes ``pack(case, family="qwen2", left_float=(), head=False)``.

    With ``order``, the linears of layer 0 with one input have one order, and of other layers each its own.
    """
    import torch

    def make(case: Case, family: str = "qwen2", left_float: tuple[str, ...] = (), head: bool = False):
        tiny = tiny_checkpoint(family, "float16")
        tensors, model, weights = load_file(tiny.path / "model.safetensors"), copy.deepcopy(tiny.model), {}
        config = json.loads((tiny.path / "config.json").read_text())
        if head:  # outputs have to fill whole int32
            config["vocab_size"] = 128
            tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:128].copy()
            model.lm_head.weight.data = model.lm_head.weight.data[:128]
        for name, module in model.named_modules():
            if type(module).__name__ != "Linear" or name in left_float or (name == "lm_head" and not head):
                continue
            seed, parent = zlib.crc32(name.encode()), name.rpartition(".")[0]
            order_seed = zlib.crc32(parent.encode()) if ".0." in name else seed
            packed, weights[name] = random_packed(case, tuple(module.weight.shape), seed, order_seed)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{suffix}": np.ascontiguousarray(tensor) for suffix, tensor in packed.items()}
            module.weight.data = torch.tensor(weights[name])
        path = tmp_path / "packed"
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        config["quantization_config"] = case.config | {"modules_to_not_convert": list(left_float)}
        (path / "config.json").write_text(json.dumps(config))
        return PackedCheckpoint(path, weights, model)

    return make
