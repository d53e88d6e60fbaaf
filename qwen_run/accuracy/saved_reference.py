"""What a reference said, in a file: an engine can be judged where there is no torch, transformers or checkpoint.

The file is a NumPy ``.npz`` without pickled objects. ``header`` is JSON: what the answers belong to, and all the rest.
Every sequence has its token ids and the arrays of a :class:`~qwen_run.accuracy.logits.TopLogits`, its chunks joined.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from qwen_engine.errors import RequestError, first_line
from qwen_engine.whole_files import whole_file
from qwen_run.accuracy.logits import ReferenceLogits, TopLogits, following_tokens, positions_of
from qwen_run.accuracy.origin_checks import TextFacts
from qwen_run.accuracy.reference import CHUNK_TOKENS, HuggingFace, RoundingCost
from qwen_run.accuracy.report import Cost

FORMAT_VERSION = 3

Ids = tuple[int, ...]
# token ids, and of every how many positions the logits of the last were asked for
Asked = tuple[Ids, int]


@dataclass(frozen=True)
class Identity:
    """What the answers depend on; a file of another identity is refused.

    Attributes:
        checkpoint: sha256 of each file, ``origin.sha256`` of the manifest; that of the tokenizer is among them.
        dataset: ``Dataset.sha256``.
        recipe: ``Recipe.digest`` of what the second reference was rounded as.
        options: whatever else decides what is asked, such as ``max_new_tokens``.
    """

    checkpoint: Mapping[str, str]
    dataset: str
    recipe: str
    options: Mapping[str, int | str]


@dataclass
class Answers:
    """What one reference said: a :class:`~qwen_run.accuracy.reference.Reference` that knows nothing else."""

    sequences: dict[Asked, TopLogits] = field(default_factory=dict)
    continuations: dict[Ids, list[int]] = field(default_factory=dict)
    roundings: dict[Ids, RoundingCost] = field(default_factory=dict)

    def logits(self, token_ids: Sequence[int], every: int = 1) -> Iterator[ReferenceLogits]:
        """See :meth:`qwen_run.accuracy.reference.Reference.logits`.

        Raises:
            RequestError: these ids were not asked when the file was saved.
        """
        saved = self.sequences.get((tuple(token_ids), every))
        if saved is None:
            raise RequestError(_unknown(token_ids))
        return _chunks(saved)

    def rounded(self, token_ids: Sequence[int], original: Sequence[ReferenceLogits]) -> RoundingCost:
        """What was measured then.

        Raises:
            RequestError: these ids were not asked when the file was saved.
        """
        saved = self.roundings.get(tuple(token_ids))
        if saved is None:
            raise RequestError(_unknown(token_ids))
        return saved

    def continuation(self, prompt: Sequence[int], max_new_tokens: int, stop_token_ids: Set[int]) -> list[int]:
        """What was said then; ``max_new_tokens`` and ``stop_token_ids`` are part of the file's identity.

        Raises:
            RequestError: this prompt was not asked when the file was saved.
        """
        saved = self.continuations.get(tuple(prompt))
        if saved is None:
            raise RequestError(_unknown(prompt))
        return saved


@dataclass
class Recording:
    """A live reference whose answers are kept; what ``answers`` has already is not asked again."""

    live: HuggingFace
    answers: Answers = field(default_factory=Answers)

    def logits(self, token_ids: Sequence[int], every: int = 1) -> Iterator[ReferenceLogits]:
        asked = tuple(token_ids), every
        if asked in self.answers.sequences:
            yield from self.answers.logits(token_ids, every)
            return
        following = following_tokens(token_ids)[positions_of(len(token_ids), every)]
        chunks: list[TopLogits] = []
        for number, full in enumerate(self.live.logits(token_ids, every)):
            start = number * CHUNK_TOKENS
            chunks.append(full.top(following[start : start + len(full)]))
            yield full
        self.answers.sequences[asked] = _join(chunks)

    def rounded(self, token_ids: Sequence[int], original: Sequence[ReferenceLogits]) -> RoundingCost:
        known = self.answers.roundings
        if tuple(token_ids) not in known:
            known[tuple(token_ids)] = self.live.rounded(token_ids, original)
        return known[tuple(token_ids)]

    def continuation(self, prompt: Sequence[int], max_new_tokens: int, stop_token_ids: Set[int]) -> list[int]:
        known = self.answers.continuations
        if tuple(prompt) not in known:
            known[tuple(prompt)] = self.live.continuation(prompt, max_new_tokens, stop_token_ids)
        return known[tuple(prompt)]


@dataclass(frozen=True)
class SavedReference:
    """The content of a file.

    Attributes:
        original, as_built: what each of the two references said.
        prompts: the token ids of each document's prompt, by document id.
        text_facts: to compare an engine's tokenizer, template and end-of-sequence ids with.
        cost: what the reference's answers cost where the file was made, if that was measured.
    """

    identity: Identity
    original: Answers
    as_built: Answers
    prompts: Mapping[str, Ids]
    text_facts: TextFacts
    cost: Cost | None = None


def save_reference(path: Path, saved: SavedReference) -> None:
    """Write ``saved`` to ``path``, replacing what is there once all is written.

    Raises:
        RequestError: ``path`` cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    roles: dict[str, Any] = {}
    for role, answers in (("original", saved.original), ("as_built", saved.as_built)):
        for index, ((token_ids, _), logits) in enumerate(answers.sequences.items()):
            arrays[f"{role}.{index}.token_ids"] = np.array(token_ids, np.int32)
            arrays |= {f"{role}.{index}.{name}": getattr(logits, name) for name in _array_names(logits)}
        vocab_size = next((logits.vocab_size for logits in answers.sequences.values()), 0)
        continuations = [[prompt, answer] for prompt, answer in answers.continuations.items()]
        roundings = [[token_ids, asdict(rounded)] for token_ids, rounded in answers.roundings.items()]
        roles[role] = {
            "every": [every for _, every in answers.sequences],
            "vocab_size": vocab_size,
            "continuations": continuations,
            "roundings": roundings,
        }
    header = {
        "format_version": FORMAT_VERSION,
        "identity": asdict(saved.identity),
        "roles": roles,
        "prompts": dict(saved.prompts),
        "text_facts": asdict(saved.text_facts),
        "cost": saved.cost and asdict(saved.cost),
    }
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    try:
        with whole_file(Path(os.path.realpath(path))) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error


def load_reference(path: Path, identity: Identity, document_ids: Sequence[str] = ()) -> SavedReference:
    """Read what :func:`save_reference` wrote.

    Args:
        identity: of the engine and the texts it is to be used for.
        document_ids: of these texts, to say how they differ.

    Raises:
        RequestError: the file cannot be read, or it belongs to something else; says in what.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            version = header["format_version"]
            if version != FORMAT_VERSION:
                raise RequestError(
                    f"{path} has format version {version}, this runtime reads {FORMAT_VERSION}; save it again"
                )
            found = Identity(**header["identity"])
            _refuse(path, found, identity, _other_texts(list(header["prompts"]), document_ids))
            answers = {role: _read_answers(file, role, content) for role, content in header["roles"].items()}
            facts = header["text_facts"]
            return SavedReference(
                found,
                answers["original"],
                answers["as_built"],
                {name: tuple(prompt) for name, prompt in header["prompts"].items()},
                TextFacts(facts["sha256"], tuple(facts["eos_token_ids"])),
                Cost(**header["cost"]) if header["cost"] else None,
            )
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist; make it with --save-reference") from None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise RequestError(f"{path} is not a saved reference ({reason}); make it with --save-reference") from error


def _read_answers(file: Mapping[str, np.ndarray], role: str, content: Mapping[str, Any]) -> Answers:
    answers = Answers(continuations={tuple(prompt): answer for prompt, answer in content["continuations"]})
    answers.roundings = {tuple(token_ids): RoundingCost(**rounded) for token_ids, rounded in content["roundings"]}
    for index, every in enumerate(content["every"]):
        names = [item.name for item in fields(TopLogits) if item.name != "vocab_size"]
        arrays: dict[str, Any] = {name: file[f"{role}.{index}.{name}"] for name in names}
        token_ids = tuple(file[f"{role}.{index}.token_ids"].tolist())
        answers.sequences[token_ids, every] = TopLogits(vocab_size=content["vocab_size"], **arrays)
    return answers


def _refuse(path: Path, found: Identity, expected: Identity, other_texts: str) -> None:
    changed = sorted(
        name
        for name in found.checkpoint.keys() | expected.checkpoint.keys()
        if found.checkpoint.get(name) != expected.checkpoint.get(name)
    )
    options = sorted(
        f"{name} {found.options.get(name)}, expected {expected.options.get(name)}"
        for name in found.options.keys() | expected.options.keys()
        if found.options.get(name) != expected.options.get(name)
    )
    complaints = [f"another checkpoint ({', '.join(changed)} differ)"] * bool(changed)
    complaints += [other_texts] * (found.dataset != expected.dataset)
    complaints += ["an engine of another quantisation"] * (found.recipe != expected.recipe)
    complaints += [f"other options ({'; '.join(options)})"] * bool(options)
    if complaints:
        raise RequestError(f"{path} was saved for {' and '.join(complaints)}; save one for this engine and these texts")


def _other_texts(found: Sequence[str], expected: Sequence[str]) -> str:
    """How documents differ that are not the same, by their ids."""
    if set(found) == set(expected):
        return "other texts (the same ids, but other contents)"
    shorter, longer = sorted((found, expected), key=len)
    words = f"{len(found)} documents, not {len(expected)}" if len(found) != len(expected) else f"{len(found)} documents"
    if list(longer[: len(shorter)]) == list(shorter):
        return f"other texts ({words}; give --max-samples {len(found)})"
    lacking = next((document for document in expected if document not in set(found)), None)
    example = "" if lacking is None else f", {lacking!r} is not among them"
    return f"other texts ({words}{example}; give the same --dataset and --max-samples {len(found)})"


def _array_names(logits: TopLogits) -> list[str]:
    return [item.name for item in fields(logits) if item.name != "vocab_size"]


def _join(chunks: Sequence[TopLogits]) -> TopLogits:
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in _array_names(chunks[0])
    }
    return replace(chunks[0], **joined)


def _chunks(logits: TopLogits) -> Iterator[TopLogits]:
    for start in range(0, len(logits), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        arrays: dict[str, Any] = {name: getattr(logits, name)[part] for name in _array_names(logits)}
        yield replace(logits, **arrays)


def _unknown(token_ids: Sequence[int]) -> str:
    return (
        f"the saved reference has no text of these {len(token_ids)} tokens: the engine's tokenizer or chat template "
        "makes other tokens of the texts than when it was saved; check the engine's files, or save it again"
    )
