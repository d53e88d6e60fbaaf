"""What the graph of a checkpoint ends in: the vocabulary, an embedding, classes, or the logits of two answers.

``--task`` says it, else the files do: ``architectures`` of ``config.json``, and what sentence-transformers saves beside
it (``modules.json`` and the folders that it names).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_build.checkpoint.files import read_bytes, read_json, read_optional_json
from qwen_build.checkpoint.tokenizer_files import engine_tokenizer
from qwen_engine.errors import CheckpointError, UnsupportedModel, shown
from qwen_engine.tasks import GENERATE, Activation, Pooling

MODULES_FILE, PROMPTS_FILE = "modules.json", "config_sentence_transformers.json"
SENTENCE_FILE = "sentence_bert_config.json"
# what sentence-transformers saves; folders of modules are named after their kind
SOURCES = (MODULES_FILE, PROMPTS_FILE, SENTENCE_FILE, "1_Pooling/config.json")

LAST_TOKEN = "lasttoken"
# modules of sentence-transformers that are computed, by the last part of their type
MODULES = ("Transformer", "Pooling", "Normalize")

# how the name of an architecture ends -> what it is for; the first that fits
ARCHITECTURE_TASKS = {
    "ForSequenceClassification": "classify",
    "ForCausalLM": GENERATE,
    "LMHeadModel": GENERATE,
    "Model": "embed",
}
MOST_LABELS = 1 << 16
# those whose head is none of these
REFUSED = ("ForTokenClassification", "ForQuestionAnswering", "ForRewardModel", "ForProcessRewardModel")

# config.json's problem_type -> what makes probabilities of the numbers; null: by how many labels there are
ACTIVATIONS: dict[str, Activation] = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}
ANSWERS = ("no", "yes")  # what a reranker answers, in the order of the graph's output


@dataclass(frozen=True)
class Ending:
    """What a graph ends in.

    Attributes:
        task: what the engine is for, a key of ``TASKS``.
        width: numbers of an output; None: those of the vocabulary.
        rows: of the head over the vocabulary that are kept; none: all.
        pooling: what the runtime makes of the output.
        notes: what of the files is left unread, a sentence each.
    """

    task: str = GENERATE
    width: int | None = None
    rows: tuple[int, ...] = ()
    pooling: Pooling = field(default_factory=Pooling)
    notes: tuple[str, ...] = ()


def read_ending(checkpoint: Path, hidden_size: int, task: str | None = None) -> Ending:
    """What the graph of the directory ``checkpoint`` ends in.

    Args:
        task: what was asked for; None: what the files say.

    Raises:
        CheckpointError: a file is not what it should be.
        UnsupportedModel: they ask for what is not computed.
    """
    hf = read_json(checkpoint / "config.json")
    task = task or _task_of(checkpoint, hf)
    if task == "embed":
        return _embedding(checkpoint, hidden_size)
    if task == "classify":
        return _classifier(hf)
    return _reranker(checkpoint, hf) if task == "score" else Ending()


def _task_of(checkpoint: Path, hf: Mapping[str, Any]) -> str:
    """What the files say that the model is for."""
    named = hf.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"config.json: architectures is {shown(named)}, expected a list of names")
    if hf.get("classifier_from_token"):
        return "score"
    for name in named:
        if name.endswith(REFUSED):
            raise UnsupportedModel(
                f"config.json: architectures {name} is not supported, only {', '.join(ARCHITECTURE_TASKS)}; "
                "--task embed leaves its head out"
            )
    ends = (task for name in named for end, task in ARCHITECTURE_TASKS.items() if name.endswith(end))
    found = next(ends, GENERATE)
    return "embed" if found != "classify" and (checkpoint / MODULES_FILE).is_file() else found


def _embedding(checkpoint: Path, hidden_size: int) -> Ending:
    if not (checkpoint / MODULES_FILE).is_file():
        return Ending("embed", hidden_size)
    kinds = _modules(checkpoint)
    for kind, folder in kinds:
        if kind == "Pooling":
            _check_pooling(checkpoint, folder, hidden_size)
    sentences, said = read_optional_json(checkpoint / SENTENCE_FILE), read_optional_json(checkpoint / PROMPTS_FILE)
    if sentences.get("do_lower_case"):
        raise UnsupportedModel(f"{SENTENCE_FILE}: do_lower_case is not supported; lower texts before they are embedded")
    prompts, default = said.get("prompts") or {}, said.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"{PROMPTS_FILE}: prompts is {shown(prompts)}, expected an object of texts")
    if default is not None and default not in prompts:
        raise CheckpointError(f"{PROMPTS_FILE}: default_prompt_name is {shown(default)}, expected one of its prompts")
    length = sentences.get("max_seq_length")
    notes = [f"{SENTENCE_FILE} cuts texts to {length} tokens, which engines do not."] if length else []
    if (measure := said.get("similarity_fn_name")) not in (None, "cosine"):
        notes.append(f"{PROMPTS_FILE} has similarity_fn_name {shown(measure)}, LLM.score compares by the cosine.")
    pooling = Pooling(any(kind == "Normalize" for kind, _ in kinds), prompts, default)
    return Ending("embed", hidden_size, pooling=pooling, notes=tuple(notes))


def _modules(checkpoint: Path) -> list[tuple[str, str]]:
    """The kinds of the modules, in the order they run, and their folders."""
    path = checkpoint / MODULES_FILE
    try:
        found = json.loads(read_bytes(path))
        modules = [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in found]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is no list of modules with type and path; download it again") from None
    if others := [kind for kind, _ in modules if kind not in MODULES]:
        raise UnsupportedModel(f"{path}: module {shown(others[0])} is not supported, only {', '.join(MODULES)}")
    return modules


def _check_pooling(checkpoint: Path, folder: str, hidden_size: int) -> None:
    """Refuse any pooling but that of the last token."""
    path = checkpoint / folder / "config.json"
    found = read_json(path, checkpoint)
    ways = [name.removeprefix("pooling_mode_") for name, on in found.items() if on is True and "pooling_mode_" in name]
    ways = ways or [str(found.get("pooling_mode"))]
    if ways != [LAST_TOKEN]:
        raise UnsupportedModel(f"{path}: pooling of {', '.join(ways)} is not supported, only of {LAST_TOKEN}")
    size = found.get("word_embedding_dimension", found.get("embedding_dimension", hidden_size))
    if size != hidden_size:
        raise CheckpointError(f"{path}: word_embedding_dimension is {shown(size)}, config.json has {hidden_size}")


def _classifier(hf: Mapping[str, Any]) -> Ending:
    named = hf.get("id2label")
    count = hf.get("num_labels") or 2
    if type(count) is not int or not 0 < count <= MOST_LABELS:
        raise CheckpointError(f"config.json: num_labels is {shown(count)}, expected 1 to {MOST_LABELS}")
    names = named if isinstance(named, dict) and named else {str(i): f"LABEL_{i}" for i in range(count)}
    try:
        labels = tuple(str(names[str(i)]) for i in range(len(names)))
    except KeyError:
        raise CheckpointError(f"config.json: id2label is {shown(named)}, expected names of 0, 1, ...") from None
    kind = hf.get("problem_type")
    activation: Activation = "sigmoid" if len(labels) == 1 else "softmax"
    if kind is not None:
        if kind not in ACTIVATIONS:
            raise UnsupportedModel(f"config.json: problem_type {shown(kind)} is not one of {', '.join(ACTIVATIONS)}")
        activation = ACTIVATIONS[kind]
    return Ending("classify", len(labels), pooling=Pooling(labels=labels, activation=activation))


def _reranker(checkpoint: Path, hf: Mapping[str, Any]) -> Ending:
    words = hf.get("classifier_from_token") or ANSWERS
    if not isinstance(words, list | tuple) or len(words) != 2:
        raise UnsupportedModel(f"config.json: classifier_from_token is {shown(words)}, expected two tokens")
    tokenizer = engine_tokenizer(checkpoint)
    if tokenizer is None:
        raise CheckpointError(f"{checkpoint} has no tokenizer, in which a reranker's answers are found; add its files")
    opened = tokenizer.open()
    ids = tuple(opened.token_id(str(word)) for word in words)
    if None in ids:
        raise UnsupportedModel(
            f"{checkpoint} has no tokens {' and '.join(map(repr, words))}, which a reranker answers with; "
            "build it without --task score"
        )
    return Ending("score", 2, rows=tuple(i for i in ids if i is not None))
