"""README's table of what is supported is made of the tables of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_build.architectures import ARCHITECTURES
from qwen_build.checkpoint.formats.gguf import PACKED
from qwen_build.checkpoint.formats.table import EXACT, FORMATS
from qwen_build.checkpoint.rope import ROPE_TYPES
from qwen_engine.choices import MIXED, QUANTS
from qwen_engine.tasks import TASKS

ROOT = Path(__file__).parents[1]

FAMILIES = ARCHITECTURES.items()
QUANTISED = [row for method, row in FORMATS.items() if method != "gguf"]

# row of README.md, of README.zh-CN.md -> the names it begins with, in order
SUPPORTED = {
    ("Qwen models", "Qwen 模型"): [name for kind, row in FAMILIES if kind.startswith("qwen") for name in row.models],
    ("other models", "其他模型"): [
        name for kind, row in FAMILIES if not kind.startswith("qwen") for name in row.models
    ],
    ("other tasks", "其他任务"): [name for row in TASKS.values() for name in row.models],
    ("rotary embeddings", "旋转位置编码"): list(ROPE_TYPES),
    ("quantised ones", "已量化的检查点"): [row.title for row in QUANTISED if EXACT in row.becomes],
    ("those that are rounded again", "重新舍入的检查点"): [row.title for row in QUANTISED if EXACT not in row.becomes],
    ("GGUF bit for bit", "逐位保存的 GGUF"): list(PACKED),
    ("weights", "权重"): [*QUANTS, *MIXED],
}


@pytest.mark.parametrize("labels", SUPPORTED, ids=str)
@pytest.mark.parametrize(
    ("name", "column", "comma", "ends"), [("README.md", 0, ", ", ";"), ("README.zh-CN.md", 1, "、", "；")]
)
def test_a_row_says_what_the_table_has(name, column, comma, ends, labels):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    (row,) = [line.strip("| ") for line in lines if line.startswith(f"| {labels[column]} |")]
    said = row.partition(" | ")[2].partition(ends)[0]
    assert said == comma.join(SUPPORTED[labels])
