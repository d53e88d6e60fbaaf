"""An engine's graph as a tree, model -> layer -> block -> operator: as text, as plain data and as a picture."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen_run.engine_files.onnx_file import Attribute, Node, OnnxGraph, Tensor
from qwen_run.inspection.linears import MARGIN
from qwen_run.reports.svg import svg_file

# features of the activations that go into an operator, of those known, in order
Widths = Sequence[int]

# operator -> the features of its first output; every other one gives what it takes. QuantEmbedding's rows are K wide,
# PagedAttention takes the heads of queries, keys and values and gives those of the queries; how much Slice leaves is a
# value that is not read.
WIDTHS: dict[str, Callable[[dict[str, Any], Widths, Sequence[Tensor]], int | None]] = {
    "QuantLinear": lambda a, w, t: a["N"] // 2 if a.get("swiglu") else a["N"],
    "MatMulNBits": lambda a, w, t: a["N"],
    "Gemm": lambda a, w, t: t[0].shape[0],
    "QuantEmbedding": lambda a, w, t: a["K"],
    "GatherBlockQuantized": lambda a, w, t: t[0].shape[-1] * 8 // a["bits"],
    "Gather": lambda a, w, t: w[0] if w else t[0].shape[-1],
    "PagedAttention": lambda a, w, t: w[0] // (a["num_heads"] + 2 * a["kv_num_heads"]) * a["num_heads"],
    "Split": lambda a, w, t: w[0] // a["num_outputs"],
    "RMSNormalization": lambda a, w, t: t[0].shape[0],
    "Slice": lambda a, w, t: None,
    "Concat": lambda a, w, t: sum(w),
}

_INDEX = re.compile(r"(.*\.)(\d+)")

ROW, INDENT, CHARACTER = 20, 10, 6.6  # pixels of the picture
STYLE = (
    "text { font: 12px ui-monospace, monospace; fill: #222; } "
    ".block { fill: #47b1; stroke: #8aa; } .operator { fill: #fff; stroke: #8aa; }"
)


@dataclass(frozen=True)
class GraphOperator:
    """One operator: features in and out (None: not known), the stored tensors it reads, its attributes."""

    op_type: str
    in_features: int | None
    out_features: int | None
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]  # name seen from the operator's module, dtype, shape
    attributes: dict[str, Attribute]

    @property
    def words(self) -> str:
        arrow = f"  {self.in_features or 'ids'} → {self.out_features}" if self.out_features else ""
        tensors = "".join(f"  {name} {dtype}{list(shape)}" for name, dtype, shape in self.tensors)
        attributes = "  ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                               for name, value in self.attributes.items() if name not in ("N", "K"))  # fmt: skip
        return f"{self.op_type}{arrow}{tensors}" + (f"  ({attributes})" if attributes else "")


@dataclass(frozen=True)
class GraphBlock:
    """A module and what is in it, in the order it runs."""

    name: str
    children: list[GraphBlock | GraphOperator] = field(default_factory=list)

    def to_data(self) -> dict[str, Any]:
        """As plain data for JSON."""
        children = [child.to_data() if isinstance(child, GraphBlock) else asdict(child) for child in self.children]
        return {"name": self.name, "children": children}


def tree(graph: OnnxGraph, name: str) -> GraphBlock:
    """The tree of ``graph``: the name of an operator begins with the modules it is in, ``model/layers.0/…``."""
    root, widths = GraphBlock(name), dict[str, int]()
    for node in graph.nodes:
        block = root
        for module in node.name.split("/")[:-1]:
            if not (block.children and isinstance(last := block.children[-1], GraphBlock) and last.name == module):
                block.children.append(last := GraphBlock(module))
            block = last
        block.children.append(_operator(node, graph, widths))
    return root


def _operator(node: Node, graph: OnnxGraph, widths: dict[str, int]) -> GraphOperator:
    """``node`` with its features; those of what it gives are added to ``widths``."""
    tensors = [graph.initializers[name] for name in node.inputs if name in graph.initializers]
    taken = [widths[name] for name in node.inputs if name in widths]
    try:
        given = WIDTHS[node.op_type](node.attributes, taken, tensors) if node.op_type in WIDTHS else taken[0]
    except (KeyError, IndexError, TypeError):  # an operator of another making
        given = None
    if given is not None:
        widths |= dict.fromkeys(node.outputs, given)
    module = ".".join(node.name.split("/")[:-1])
    stored = tuple((_name_from(module, tensor.name), tensor.dtype, tensor.shape) for tensor in tensors)
    return GraphOperator(node.op_type, taken[0] if taken else None, given, stored, node.attributes)


def _name_from(module: str, name: str) -> str:
    """``name`` of a tensor without the modules that ``module`` is in too.

    >>> _name_from("model.layers.0.mlp.up_proj", "model.layers.0.input_layernorm.weight")
    'input_layernorm.weight'
    """
    here, parts = module.split("."), name.split(".")
    same = next((i for i, (a, b) in enumerate(zip(here, parts, strict=False)) if a != b), min(len(here), len(parts)))
    return ".".join(parts[same:])


def folded(block: GraphBlock) -> GraphBlock:
    """``block`` with neighbours that differ in their number alone made one: ``layers.0 … layers.23, 24 alike``."""
    runs: list[list[GraphBlock | GraphOperator]] = []
    for child in (folded(child) if isinstance(child, GraphBlock) else child for child in block.children):
        if runs and _alike(runs[-1][0], child):
            runs[-1].append(child)
        else:
            runs.append([child])
    children = []
    for first, *others in runs:
        if others and isinstance(first, GraphBlock) and isinstance(last := others[-1], GraphBlock):
            first = GraphBlock(f"{first.name} … {last.name}, {1 + len(others)} alike", first.children)
        children.append(first)
    return GraphBlock(block.name, children)


def _alike(first: GraphBlock | GraphOperator, other: GraphBlock | GraphOperator) -> bool:
    if isinstance(first, GraphOperator) or isinstance(other, GraphOperator):
        return False
    names = [_INDEX.fullmatch(block.name) for block in (first, other)]
    return bool(names[0] and names[1] and names[0][1] == names[1][1]) and first.children == other.children


def draw_lines(block: GraphBlock) -> list[str]:
    """The tree as lines of text, the root's name first."""
    lines = [block.name]
    for i, child in enumerate(block.children):
        last = i == len(block.children) - 1
        inner = [child.words] if isinstance(child, GraphOperator) else draw_lines(child)
        lines += [("└─ " if last else "├─ ") + inner[0], *(("   " if last else "│  ") + line for line in inner[1:])]
    return lines


def draw_tree(block: GraphBlock) -> str:
    """The tree as an SVG file: a box for every module, in it the boxes of its modules and operators."""
    content, width, height = _boxes(block, MARGIN, MARGIN)
    return svg_file(width + 2 * MARGIN, height + 2 * MARGIN, block.name, STYLE, content)


def _boxes(child: GraphBlock | GraphOperator, x: float, y: float) -> tuple[str, float, float]:
    """The boxes of ``child`` with their corner at (x, y), and how wide and high they are."""
    if isinstance(child, GraphOperator):
        return _box(x, y, width := 12 + CHARACTER * 1.12 * len(child.words), ROW, child.words, "operator"), width, ROW
    inner, width, height = [], 2 * INDENT + CHARACTER * 1.12 * len(child.name), ROW + 4.0
    for part in child.children:
        boxes, part_width, part_height = _boxes(part, x + INDENT, y + height)
        inner.append(boxes)
        width, height = max(width, part_width + 2 * INDENT), height + part_height + 4
    return _box(x, y, width, height, child.name, "block") + "".join(inner), width, height


def _box(x: float, y: float, width: float, height: float, words: str, kind: str) -> str:
    rect = f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:.0f}" height="{height:g}" rx="4"/>'
    return f'{rect}<text x="{x + 6:g}" y="{y + 14:g}">{html.escape(words)}</text>'
