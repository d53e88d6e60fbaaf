"""What engines are for, a row each: what their graphs end in, and what the runtime makes of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwen_engine import strict_json
from qwen_engine.errors import EngineError, RequestError, shown
from qwen_engine.graph_io import LOGITS, TensorSpec
from qwen_engine.regular_files import read_regular

GENERATE = "generate"
POOLING_FILE = "pooling.json"  # a part of every engine that does not write text

Activation = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True)
class Task:
    """What an engine does.

    Attributes:
        output: what the graph ends in, (L, width) float32.
        models: for which models it is, as people call them; README's table of what is supported is made of these.
        does: to be read after "the engine".
        ask: what of ``LLM`` asks for it, which option of ``qwen-run``, and which route of a server.
    """

    output: str
    models: tuple[str, ...]
    does: str
    ask: str


TASKS = {
    GENERATE: Task(LOGITS, (), "writes text", "LLM.generate, qwen-run (/v1/completions)"),
    # the hidden state after the last norm
    "embed": Task("hidden", ("Qwen3-Embedding",), "makes embeddings", "LLM.embed, qwen-run --embed (/v1/embeddings)"),
    # a number for each label
    "classify": Task(
        "classes",
        ("ForSequenceClassification",),
        "classifies texts",
        "LLM.classify, qwen-run --classify (/v1/classify)",
    ),
    # the logits of the answers no and yes
    "score": Task("answers", ("Qwen3-Reranker",), "judges documents", "LLM.score, qwen-run --score (/v1/rerank)"),
}


def output_of(task: str, width: int) -> TensorSpec:
    """What the graph of an engine for ``task`` ends in."""
    return TensorSpec(TASKS[task].output, "selection", "float32", ("L", width))


def output_fault(outputs: Iterable[TensorSpec], sizes: Mapping[str, object]) -> str | None:
    """What is wrong with the outputs of an engine of these ``sizes``, to be read after a file's name."""
    found = next(((task, spec) for task, row in TASKS.items() for spec in outputs if spec.name == row.output), None)
    if found is None:
        return f" has no output {', '.join(row.output for row in TASKS.values())}"
    task, spec = found
    size = {GENERATE: "vocab_size", "embed": "hidden_size"}.get(task)
    if size and spec.shape[-1:] != (sizes[size],):
        return f": {size} is {shown(sizes[size])}, {spec.name} have shape {shown(spec.shape[-1:])}"
    return None


def check_task(found: str, *wanted: str) -> None:
    """Refuse to ask an engine for what it was not built for.

    Raises:
        RequestError: the engine is for ``found``, and none of ``wanted``.
    """
    if found in wanted:
        return
    others = " or ".join(f"`qwen-build CHECKPOINT --task {task}`" for task in wanted)
    raise RequestError(
        f"the engine {TASKS[found].does}, expected one that {TASKS[wanted[0]].does}; ask this one with "
        f"{TASKS[found].ask}, or build another of the checkpoint with {others}"
    )


@dataclass(frozen=True)
class Pooling:
    """What becomes of the last token's output.

    Attributes:
        normalize: whether an embedding is divided by its length.
        prompts: name -> what is put before a text, as "query".
        default_prompt_name: the one of texts whose request names none; None: nothing is put before them.
        labels: of a classifier, in the order of its outputs.
        activation: what makes probabilities of these.
    """

    normalize: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict, hash=False)
    default_prompt_name: str | None = None
    labels: tuple[str, ...] = ()
    activation: Activation = "softmax"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, engine: Path) -> Pooling:
        """Read ``pooling.json`` of the directory ``engine``.

        Raises:
            EngineError: it is missing, or not what :meth:`to_json` writes.
        """
        path = engine / POOLING_FILE
        try:
            found = strict_json.parse(cls, json.loads(read_regular(path).decode()), str(path))
        except (OSError, ValueError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise EngineError(f"{path} cannot be read: {why}; build the engine again") from error
        assert isinstance(found, cls)
        return found
