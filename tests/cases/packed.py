"""GPTQ, AWQ and AutoRound checkpoints with random weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from cases.formats import QuantisedCheckpoint
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import Plan, plan_build
from qwen_build.plan.options import BuildOptions


@dataclass(frozen=True)
class Case:
    """A kind of packed checkpoint. ``order``: whether the inputs of a group lie anywhere."""

    method: str
    version: str
    bits: int
    group_size: int
    symmetric: bool = False
    order: bool = False

    @property
    def config(self) -> dict[str, Any]:
        if self.method == "auto-round":
            return {
                "quant_method": "auto-round",
                "packing_format": self.version,
                "bits": self.bits,
                "group_size": self.group_size,
                "sym": self.symmetric,
                "data_type": "int",
                "extra_config": {},
            }
        if self.method == "awq":
            return {
                "quant_method": "awq",
                "version": self.version,
                "bits": self.bits,
                "group_size": self.group_size,
                "zero_point": True,
            }
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.version,
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": self.order,
        }


CASES = [
    *(Case("gptq", "gptq", bits, size) for bits in (4, 8) for size in (32, 64, 128, -1)),
    Case("gptq", "gptq", 4, 32, symmetric=True),
    Case("gptq", "gptq", 8, 64, symmetric=True),
    Case("gptq", "gptq", 4, 32, order=True),
    Case("gptq", "gptq", 8, 32, symmetric=True, order=True),
    Case("gptq", "gptq_v2", 4, 64),
    Case("gptq", "gptq_v2", 8, 32, symmetric=True),
    Case("auto-round", "auto_round:auto_gptq", 4, 128, symmetric=True),
    Case("auto-round", "auto_round:gptqmodel", 8, 32),
    Case("auto-round", "auto_round", 4, 64),
    Case("auto-round", "auto_round:auto_awq", 4, 32),
    *(Case("awq", "gemm", 4, size) for size in (32, 64, 128, -1, 96)),
]


def case_name(case: Case) -> str:
    return "-".join(map(str, dataclasses.astuple(case)))


class PackedCheckpoint(QuantisedCheckpoint):
    """A packed checkpoint and the values it stands for."""

    def plan(self, **options: Any) -> Plan:
        with Checkpoint.open(self.path) as checkpoint:
            return plan_build(checkpoint, resolve_checkpoint(str(self.path)), BuildOptions(**options))


def in_words(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers (rows, columns, 32 / bits), the first in the lowest bits, as int32 (rows, columns)."""
    words = np.zeros(values.shape[:2], np.int64)
    for i in range(values.shape[2]):
        words |= values[:, :, i].astype(np.int64) << bits * i
    return words.astype(np.uint32).view(np.int32)


def pack_gptq(q: np.ndarray, zeros: np.ndarray, bits: int, stored_less: int) -> tuple[np.ndarray, np.ndarray]:
    """qweight and qzeros of q (in, out) and zeros (groups, out): int32 hold inputs, and outputs."""
    per_word = 32 // bits
    qweight = in_words(q.reshape(-1, per_word, q.shape[1]).transpose(0, 2, 1), bits)
    return qweight, in_words((zeros - stored_less).reshape(len(zeros), -1, per_word), bits)


def pack_awq(q: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`pack_gptq`: the lowest four bits hold output 0, the next output 2, and so on."""
    places = [0, 2, 4, 6, 1, 3, 5, 7]
    qweight, qzeros = (in_words(part.reshape(len(part), -1, 8)[:, :, places], 4) for part in (q, zeros))
    return qweight, qzeros


def random_packed(case: Case, shape: tuple[int, int], seed: int, order_seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """The tensors of a linear (out, in) by their suffix, and its weight float32 (out, in)."""
    rng, (out_features, in_features) = np.random.default_rng(seed), shape
    size = in_features if case.group_size == -1 else case.group_size
    groups, most = -(-in_features // size), 2**case.bits - 1
    scales = (rng.uniform(0.5, 1.5, (groups, out_features)) * 0.6 / most).astype(np.float16)
    q = rng.integers(0, most + 1, (in_features, out_features))
    zeros = rng.integers(most // 2 - 1, most // 2 + 4, (groups, out_features))
    if case.symmetric:
        zeros[:] = most // 2 + 1
    group_of = np.arange(in_features) // size
    if case.order:
        group_of = np.random.default_rng(order_seed).permutation(group_of)
    weight = (q - zeros[group_of]).astype(np.float32) * scales.astype(np.float32)[group_of]
    if "awq" in (case.method, case.version.removeprefix("auto_round:auto_")):
        qweight, qzeros = pack_awq(q, zeros)
        return {"qweight": qweight, "qzeros": qzeros, "scales": scales}, weight.T
    less = case.version in ("gptq", "auto_round:auto_gptq", "auto_round:gptqmodel")
    qweight, qzeros = pack_gptq(q, zeros, case.bits, stored_less=int(less))
    groups_of = {"g_idx": group_of.astype(np.int32)} if case.method == "gptq" else {}
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales, **groups_of}, weight.T
