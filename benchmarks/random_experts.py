"""Random engines of published mixtures of experts, and GGUF files of the same shape, without a checkpoint on disk.

    python -m benchmarks.random_experts qwen3-30b-a3b DIRECTORY                  DIRECTORY/engine-int4
    python -m benchmarks.random_experts qwen3-30b-a3b DIRECTORY --gguf           DIRECTORY/q4_0.gguf beside it
    python -m benchmarks.random_experts qwen1.5-moe-a2.7b DIRECTORY --layers 4 --int4-method gptq

The builder reads a format of checkpoints whose numbers are made when they are asked for, every tensor with its own, so
that what an engine reads is what that of a published model reads. It rounds and stores them as it does any others. The
blocks of the GGUF file, Q4_0 and Q8_0, are random themselves. Prints the engine's size, the build's time and its peak
of resident memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import run, say
from benchmarks.random_checkpoint import POOL, byte_tokenizer
from benchmarks.write_gguf import add_sizes
from qwen_build.checkpoint.formats.table import FORMATS, ROUNDED, Format
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.safetensors import Safetensors
from qwen_build.checkpoint.safetensors_file import Float32, LazyTensor, write_safetensors
from qwen_build.checkpoint.stored import Found, Shape, StoredWeight
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build, write_engine
from qwen_build.plan.options import BuildOptions
from qwen_run.runtime.machine import peak_memory_bytes

METHOD = "random"  # quant_method of the format that is read here alone
NOTHING = "random"  # the tensor that the checkpoint's file has

# Sizes of the published config.json files
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "attention_bias": False,
    },
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 5632, "moe_intermediate_size": 1408, "num_experts": 60,
        "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632, "norm_topk_prob": False, "qkv_bias": True,
    },
}  # fmt: skip
COMMON: dict[str, Any] = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
    "vocab_size": 151936, "tie_word_embeddings": False, "use_sliding_window": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "torch_dtype": "bfloat16", "eos_token_id": 151645, "bos_token_id": 151643,
    "quantization_config": {"quant_method": METHOD},
}  # fmt: skip


def tensor_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor of a checkpoint of Qwen2-MoE or Qwen3-MoE."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        yield from ((f"{path}.{norm}_layernorm.weight", (hidden,)) for norm in ("input", "post_attention"))
        for name, shape in (("q", (queries, hidden)), ("k", (keys, hidden)), ("v", (keys, hidden))):
            yield f"{path}.self_attn.{name}_proj.weight", shape
            if config.get("qkv_bias"):
                yield f"{path}.self_attn.{name}_proj.bias", shape[:1]
        yield f"{path}.self_attn.o_proj.weight", (hidden, queries)
        if config["model_type"] == "qwen3_moe":
            yield from ((f"{path}.self_attn.{name}_norm.weight", (head_dim,)) for name in "qk")
        yield f"{path}.mlp.gate.weight", (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            yield from _gated(f"{path}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        if shared := config.get("shared_expert_intermediate_size"):
            yield from _gated(f"{path}.mlp.shared_expert", hidden, shared)
            yield f"{path}.mlp.shared_expert_gate.weight", (1, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _gated(path: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{path}.gate_proj.weight", (inner, hidden)
    yield f"{path}.up_proj.weight", (inner, hidden)
    yield f"{path}.down_proj.weight", (hidden, inner)


@dataclass(frozen=True)
class RandomWeight(StoredWeight):
    """A weight of :data:`POOL`'s values, from a place of its own; norms are around 1."""

    name: str
    shape: Shape
    start: int
    dtype: str = METHOD

    def read(self, start: int, stop: int) -> Float32:
        width = int(np.prod(self.shape[1:]))
        first, size = (self.start + start * width) % POOL.size, (stop - start) * width
        head = POOL[first : first + size]
        values = np.concatenate([head, np.resize(POOL, size - len(head))]).reshape(stop - start, *self.shape[1:])
        return values + np.float32(1) if "norm" in self.name else values


def find_random(config: Mapping[str, Any], files: Safetensors) -> Found:
    """Weights of the shape that ``config`` says, which are in no file."""
    starts = np.random.default_rng(0)
    shapes = tensor_shapes(config["shape"])
    weights = {name: RandomWeight(name, shape, int(starts.integers(POOL.size))) for name, shape in shapes}
    return Found(weights, frozenset([NOTHING]))


def write_config(shape: str, layers: int | None, directory: Path) -> dict[str, Any]:
    """Make ``directory`` a checkpoint of one of :data:`SHAPES` that holds no weights; its config.json."""
    config = COMMON | SHAPES[shape]
    if layers is not None:
        config["num_hidden_layers"] = layers
    sizes = {name: value for name, value in config.items() if name != "quantization_config"}
    config["quantization_config"] = {"quant_method": METHOD, "shape": sizes}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    write_safetensors(directory / "model.safetensors", {NOTHING: LazyTensor((1,), lambda: np.zeros(1, np.float32))})
    return config


def build(checkpoint: Path, target: Path, options: BuildOptions) -> None:
    """Build the engine ``target``, and say how long that takes and how much memory."""
    FORMATS[METHOD] = Format(METHOD, METHOD, (ROUNDED,), keeps_float=False, find=find_random)
    started, before = time.perf_counter(), time.process_time()
    with Checkpoint.open(checkpoint) as weights:
        write_engine(plan_build(weights, resolve_checkpoint(str(checkpoint)), options), weights, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    seconds, used = time.perf_counter() - started, time.process_time() - before
    say(
        f"{target}: {size / 1e9:.2f} GB; {seconds:.0f} s, {used:.0f} of the processor's; "
        f"peak memory {peak_memory_bytes() / 1e9:.2f} GB"
    )


def write_gguf(config: Mapping[str, Any], file: Path) -> None:
    """Write a ``qwen3moe`` file whose blocks are random: matrices in Q4_0, the head in Q8_0, routers and norms float32.

    Raises:
        ValueError: it is of another family.
    """
    import gguf

    if config["model_type"] != "qwen3_moe":
        raise ValueError(f"its model_type is {config['model_type']!r}; GGUF is written of qwen3_moe alone")
    writer = gguf.GGUFWriter(file, "qwen3moe")
    add_sizes(writer, dict(config), config["head_dim"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_quantization_version(2)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    _add_tokens(writer, config["vocab_size"], config["eos_token_id"])
    tensors = list(_gguf_tensors(config))
    for name, shape, kind in tensors:
        dtype = gguf.GGMLQuantizationType[kind]
        stored = gguf.quant_shape_to_byte_shape(shape, dtype) if kind != "F32" else shape
        item = np.uint8 if kind != "F32" else np.float32
        size = int(np.prod(stored)) * np.dtype(item).itemsize
        writer.add_tensor_info(name, stored, np.dtype(item), size, dtype if kind != "F32" else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pools = {kind: _blocks(kind) for kind in ("Q4_0", "Q8_0")}
    starts = np.random.default_rng(1)
    for name, shape, kind in tensors:
        if kind == "F32":
            writer.write_tensor_data(RandomWeight(name, shape, int(starts.integers(POOL.size))).read(0, shape[0]))
            continue
        pool, count = pools[kind], int(np.prod(shape)) // 32
        rolled = np.roll(pool, -int(starts.integers(len(pool))), axis=0)
        writer.write_tensor_data(np.resize(rolled, (count, pool.shape[1])))
    writer.close()


def _gguf_tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape, str]]:
    """Name, shape and type of every tensor, the experts of a layer in one."""
    hidden, inner, count = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    yield "token_embd.weight", (config["vocab_size"], hidden), "Q8_0"
    for layer in range(config["num_hidden_layers"]):
        path = f"blk.{layer}"
        yield f"{path}.attn_norm.weight", (hidden,), "F32"
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{path}.attn_{name}.weight", (rows, hidden), "Q4_0"
        yield f"{path}.attn_output.weight", (hidden, queries), "Q4_0"
        yield from ((f"{path}.attn_{name}_norm.weight", (config["head_dim"],), "F32") for name in "qk")
        yield f"{path}.ffn_norm.weight", (hidden,), "F32"
        yield f"{path}.ffn_gate_inp.weight", (count, hidden), "F32"
        for name in ("gate", "up"):
            yield f"{path}.ffn_{name}_exps.weight", (count, inner, hidden), "Q4_0"
        yield f"{path}.ffn_down_exps.weight", (count, hidden, inner), "Q4_0"
    yield "output_norm.weight", (hidden,), "F32"
    yield "output.weight", (config["vocab_size"], hidden), "Q8_0"


def _blocks(kind: str) -> np.ndarray:
    """Random blocks of 32 numbers, uint8 (blocks, bytes), whose scales make numbers like those of :data:`POOL`."""
    rng, size = np.random.default_rng(2), {"Q4_0": 18, "Q8_0": 34}[kind]
    blocks = rng.integers(0, 256, (1 << 20, size), np.uint8)
    scale = 0.02 / {"Q4_0": 4.6, "Q8_0": 74.0}[kind]
    blocks[:, :2] = np.full((len(blocks), 1), scale, np.float16).view(np.uint8)
    return blocks


def _add_tokens(writer: Any, count: int, end: int) -> None:
    """A tokenizer that has as many tokens."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    letters = sorted(byte_tokenizer().get_vocab())
    writer.add_token_list([*letters, *(f"<unused{index}>" for index in range(len(letters), count))])
    writer.add_token_types([1] * count)
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_eos_token_id(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--int4-method", default="rtn")
    parser.add_argument("--gguf", action="store_true", help="write the GGUF file in place of the engine")
    arguments = parser.parse_args()
    config = write_config(arguments.shape, arguments.layers, arguments.directory / "config")
    if arguments.gguf:
        write_gguf(config, arguments.directory / "q4_0.gguf")
        return
    options = BuildOptions(quant=arguments.quant, int4_method=arguments.int4_method)
    build(arguments.directory / "config", arguments.directory / f"engine-{arguments.quant}", options)


if __name__ == "__main__":
    run(main)
