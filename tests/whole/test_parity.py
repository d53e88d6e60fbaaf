"""The engine computes what ``transformers`` computes, on tiny random checkpoints of every family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases.plugin_session import ISAS
from cases.quantization import STORED, dequantised
from cases.tiny import DENSE, FAMILIES, hf_logits, run_alone, run_chunks
from qwen_build.quantization.scheme_table import KERNELS, make_scheme
from qwen_engine.graph_io import CHOSEN
from qwen_engine.manifest import LAYERS_GRAPH_FILE
from qwen_plugin.layout import GROUP_SIZES
from qwen_run.runtime.engine import Batch, Engine

RNG = np.random.default_rng(7)
SEQUENCES = [RNG.integers(0, 131, length).tolist() for length in (45, 1, 300, 33)]

# Every sequence at once; token by token; in chunks that end inside and at blocks; joining and leaving.
SCHEDULES = {
    "batched": [[45, 1, 300, 33]],
    "token by token": [[1, 1, 1, 1], *([[1, 0, 1, 1]] * 32), *([[1, 0, 1, 0]] * 12), *([[0, 0, 1, 0]] * 255)],
    "chunked": [[0, 0, 256, 0], [31, 1, 1, 32], [13, 0, 42, 1], [1, 0, 1, 0]],
}

every_family = pytest.mark.parametrize("family", FAMILIES)
# Stock kernels cannot multiply with experts.
every_family_and_kernels = pytest.mark.parametrize(
    ("family", "kernels"),
    [(family, kernels) for kernels in KERNELS for family in (FAMILIES, DENSE)[kernels == "stock"]],
)


def load(directory, threads=1):
    return Engine.load(directory, threads=threads)


@every_family
@pytest.mark.parametrize(("dtype", "sharded"), [("float32", False), ("bfloat16", True), ("float16", False)])
def test_float_engine_equals_transformers(family, dtype, sharded, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint(family, dtype, sharded)
    engine = load(build_engine(checkpoint.path, quant="none"))
    for sequence in SEQUENCES:
        # float32 sums in another order: 1e-4 of logits that reach 10 and more
        np.testing.assert_allclose(run_alone(engine, sequence), checkpoint.logits(sequence), rtol=1e-4, atol=1e-4)


@every_family
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float_engine_does_not_depend_on_the_schedule(family, schedule, tiny_checkpoint, build_engine):
    engine = load(build_engine(tiny_checkpoint(family).path, quant="none"))
    for sequence, logits in zip(SEQUENCES, run_chunks(engine, SEQUENCES, SCHEDULES[schedule]), strict=True):
        # the stock float32 product sums in another order for one row than for several
        np.testing.assert_allclose(logits, run_alone(engine, sequence), rtol=1e-4, atol=1e-4)


def schemes(kernels: str, activations: Sequence[str]) -> list[dict[str, Any]]:
    """Build options of every quantised scheme of ``kernels``, embedding and head in it too."""
    return [
        {
            "quant": quant,
            "embedding_quant": quant,
            "group_size": group_size,
            "symmetric": symmetric,
            "activations": precision,
            "kernels": kernels,
        }
        for quant in ("int8", "int4")
        for group_size in GROUP_SIZES
        for symmetric in (True, False)
        for precision in activations
    ]


def words(options: dict[str, Any]) -> str:
    grid = "sym" if options["symmetric"] else "asym"
    return f"{options['quant']}-g{options['group_size']}-{grid}-{options['activations']}"


every_native_scheme = pytest.mark.parametrize("options", schemes("native", KERNELS["native"].activations), ids=words)
# The schemes whose stock matrix operator gives a row the same bits whatever other rows there are. Its int4 kernels
# without AVX-512 sum one row in another order than several.
STOCK_INVARIANT = [("int8", 32), ("int8", 64), *([("int4", 32)] if "avx512" in ISAS else [])]


def check_any_schedule_gives_the_same_bits(directory: Path) -> None:
    one_thread, two_threads = load(directory), load(directory, threads=2)
    alone = [run_alone(one_thread, sequence) for sequence in SEQUENCES]
    for name, schedule in SCHEDULES.items():
        for expected, logits in zip(alone, run_chunks(two_threads, SEQUENCES, schedule), strict=True):
            assert np.array_equal(logits, expected), name


@every_native_scheme
def test_every_native_scheme_gives_the_same_bits_on_any_schedule(options, tiny_checkpoint, build_engine):
    check_any_schedule_gives_the_same_bits(build_engine(tiny_checkpoint("qwen3-tied").path, **options))


@every_family
@pytest.mark.parametrize("kv_cache_dtype", ["float16", "int8"])
def test_every_family_gives_the_same_bits_on_any_schedule(family, kv_cache_dtype, tiny_checkpoint, build_engine):
    directory = build_engine(tiny_checkpoint(family).path, kv_cache_dtype=kv_cache_dtype)
    check_any_schedule_gives_the_same_bits(directory)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize(("quant", "group_size"), STOCK_INVARIANT)
def test_stock_schemes_that_give_the_same_bits_on_any_schedule(
    family, quant, group_size, tiny_checkpoint, build_engine
):
    options = {"quant": quant, "group_size": group_size, "embedding_quant": "int8", "kernels": "stock"}
    check_any_schedule_gives_the_same_bits(build_engine(tiny_checkpoint(family).path, **options))


@every_family_and_kernels
@pytest.mark.parametrize("options", schemes("", ["float32"]), ids=words)
def test_quantised_engine_equals_transformers_with_the_dequantised_weights(
    family, kernels, options, tiny_checkpoint, build_engine
):
    checkpoint, options = tiny_checkpoint(family), options | {"kernels": kernels}
    directory = build_engine(checkpoint.path, kv_cache_dtype="float32", **options)
    scheme = make_scheme(options["quant"], options["group_size"], options["symmetric"], "float32", kernels)
    model = dequantised(checkpoint.model, scheme)

    for sequence in SEQUENCES:
        # the same weights on both sides: what is left is float32 rounding, a little more than unquantised
        logits = run_alone(load(directory), sequence)
        np.testing.assert_allclose(logits, hf_logits(model, sequence), rtol=3e-4, atol=3e-4)


def relative_distance(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))


@every_family
@pytest.mark.parametrize(
    ("options", "at_least", "at_most"),
    [
        # half a percent a product (8 bits and a sign), a few products deep
        ({"activations": "int8"}, 1e-3, 0.05),
        ({"activations": "int8", "kernels": "stock"}, 1e-3, 0.05),
        ({"activations": "int8x2"}, 1e-6, 5e-4),  # 256 times finer
        ({"activations": "float32", "kv_cache_dtype": "float16"}, 1e-5, 1e-3),  # 11 bits of keys and values
        ({"activations": "float32", "kv_cache_dtype": "int8"}, 1e-4, 0.05),
    ],
    ids=str,
)
def test_what_is_rounded_stays_close(family, options, at_least, at_most, tiny_checkpoint, build_engine):
    """Close, but not equal: then the option would do nothing."""
    if options.get("kernels") == "stock" and family not in DENSE:
        pytest.skip("stock kernels cannot multiply with experts")
    path = tiny_checkpoint(family).path
    exact = {"quant": "int8", "activations": "float32", "kv_cache_dtype": "float32"}
    kernels = {"kernels": options.get("kernels", "native")}
    expected = run_alone(load(build_engine(path, **exact | kernels)), SEQUENCES[2])
    rounded = run_alone(load(build_engine(path, **exact | kernels | options)), SEQUENCES[2])
    assert at_least < relative_distance(rounded, expected) < at_most


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3"])
@pytest.mark.parametrize(("quant", "kernels"), STORED)
def test_the_layers_graph_computes_the_same_bits(family, kernels, quant, tiny_checkpoint, build_engine):
    directory = build_engine(tiny_checkpoint(family).path, quant=quant, kernels=kernels)
    layers = Engine.load(directory, threads=1, graph=LAYERS_GRAPH_FILE)
    for sequence in SEQUENCES:
        assert np.array_equal(run_alone(layers, sequence), run_alone(load(directory), sequence))


@every_family
def test_the_layers_graph_names_what_transformers_computes(family, tiny_checkpoint, build_engine):
    import torch

    checkpoint, tokens = tiny_checkpoint(family), SEQUENCES[0]
    engine = Engine.load(build_engine(checkpoint.path, quant="none"), threads=1, graph=LAYERS_GRAPH_FILE)
    blocks = engine.cache.allocate(engine.cache.blocks_for(len(tokens)))
    length = len(tokens)
    batch = Batch(
        np.array(tokens, np.int64),
        np.array([0, length], np.int32),
        np.zeros(1, np.int32),
        np.array([blocks], np.int32),
        np.arange(length),
    )
    outputs = engine.run_layers(batch)

    seen = {}

    def keep(name):
        def hook(module, args, output):
            if f"{name}{CHOSEN}" in outputs:
                seen[f"{name}{CHOSEN}"] = output[2].numpy()
                return
            seen[name] = (output[0] if isinstance(output, tuple) else output).flatten(0, -2).numpy()
            if name.endswith(("o_proj", "down_proj")):
                seen[f"{name}.input"] = args[0].flatten(0, -2).numpy()

        return hook

    modules = dict(checkpoint.model.named_modules())
    names = {"lm_head" if name == "logits" else name.removesuffix(".input").removesuffix(CHOSEN) for name in outputs}
    hooks = [modules[name].register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        checkpoint.model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()

    # logits and embedding, last norm, and seven a layer; of a shared expert what it is and what it reads inside
    assert len(outputs) == 2 + 1 + 7 * 3 + 2 * sum("shared_expert.down_proj.input" in name for name in outputs)
    for name, value in outputs.items():
        expected = seen["lm_head" if name == "logits" else name]
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4, err_msg=name)
