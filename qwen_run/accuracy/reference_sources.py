"""Where the references come from: a checkpoint here, in transformers, or what was kept of them in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from qwen_engine.errors import CheckpointError, RequestError
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.answer_cost import measure_cost
from qwen_run.accuracy.both_sides import ComparedPrompt
from qwen_run.accuracy.datasets import Document
from qwen_run.accuracy.origin_checks import check_checkpoint, compare_text_facts, compare_text_files, read_text_facts
from qwen_run.accuracy.recipe import Recipe
from qwen_run.accuracy.reference import HuggingFace, Reference
from qwen_run.accuracy.report import Check, CheckpointInfo, Cost
from qwen_run.accuracy.saved_reference import (
    Answers,
    Identity,
    Recording,
    SavedReference,
    load_reference,
    save_reference,
)
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.runtime.machine import available_bytes

Phase = Literal["original", "as_built"]
OpenReference = Callable[[], Reference]
# token ids and the engine's outputs of all sub-blocks -> the reference's
Layers = Callable[[Sequence[int], Mapping[str, np.ndarray]], dict[str, np.ndarray]]


class Sources(Protocol):
    """Both references of an engine, one open at a time."""

    checkpoint: CheckpointInfo

    def open(self, phase: Phase) -> Iterator[tuple[OpenReference, Layers | None]]:
        """A context: the reference, loaded when it is first asked for, and its layers if it has any."""

    def prompt(self, document: Document) -> ComparedPrompt | None:
        """The prompt the reference was asked then; None where the engine's own tokenizer makes it now."""

    def window(self, token_ids: Sequence[int], max_seq_len: int) -> tuple[Sequence[int], str]:
        """So many of ``token_ids`` as the reference and an engine can be compared on in one sequence, and why no more.

        None of them where the reference was not asked.
        """

    def checks(self, engine: Path) -> list[Check]:
        """What can be compared without running anything."""

    def cost(self, prompts: Sequence[Sequence[int]], threads: int) -> Cost | None:
        """What the reference's answers cost."""


def find_checkpoint(manifest: Manifest, named: str | None) -> Path:
    """The checkpoint the engine was built from: as ``named``, or as the manifest has it; Hub ids from the Hub's cache.

    Raises:
        CheckpointError: it is not here, or not what the engine was built from.
    """
    source = named or manifest.origin.checkpoint
    if not Path(source).expanduser().is_dir():
        from qwen_build.checkpoint.locate import resolve_checkpoint

        revision = "" if named or manifest.origin.revision is None else f"@{manifest.origin.revision}"
        try:
            source = str(resolve_checkpoint(source + revision).path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; the engine was built from it, name it with --checkpoint") from error
    path = Path(source).expanduser()
    check_checkpoint(manifest, path)
    return path


@dataclass
class LiveSources:
    """A checkpoint in transformers; what it says is recorded if it is to be saved."""

    manifest: Manifest
    engine: Path
    path: Path
    threads: int
    record: bool
    checkpoint: CheckpointInfo = field(init=False)
    recorded: dict[Phase, Answers] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.checkpoint = CheckpointInfo(self.path.name, self.manifest.origin.digests)

    @contextmanager
    def open(self, phase: Phase) -> Iterator[tuple[OpenReference, Layers]]:
        recipe = None if phase == "original" else Recipe.read(self.engine)
        answers = self.recorded.setdefault(phase, Answers())

        @cache
        def live() -> HuggingFace:
            try:
                origin = self.manifest.origin
                reference = HuggingFace(
                    self.path, self.threads, recipe, rope_scaling=origin.rope_scaling, adapters=origin.adapters
                )
                reference.rounds_inputs = False  # but where it is asked what that costs
                return reference
            except RequestError as error:
                raise RequestError(f"{error}, or use --reference FILE") from error

        def reference() -> Reference:
            return Recording(live(), answers) if self.record else live()

        def layers_of(token_ids: Sequence[int], found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return live().hidden_outputs(token_ids, found, None if phase == "original" else found)

        yield reference, layers_of
        live.cache_clear()  # one model in memory at a time

    def prompt(self, document: Document) -> ComparedPrompt | None:
        return None

    def window(self, token_ids: Sequence[int], max_seq_len: int) -> tuple[Sequence[int], str]:
        free = available_bytes()
        affordable = max_seq_len if free is None else free // 2 // self._token_bytes
        bounds = {
            "the engine's full length": max_seq_len,
            "half as many as the documents have": len(token_ids) // 2,
            "as many as half of the free memory takes": affordable,
        }
        words = min(bounds, key=bounds.__getitem__)
        return token_ids[: bounds[words]], words

    @property
    def _token_bytes(self) -> int:
        """What one token of a sequence takes in the reference: keys and values of all layers, activations of one."""
        sizes = self.manifest.model
        kept = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim
        return 4 * (kept + 10 * sizes.hidden_size + 4 * sizes.intermediate_size)

    def checks(self, engine: Path) -> list[Check]:
        return [*compare_text_files(engine, self.path), compare_weights(engine, self.path)]

    def cost(self, prompts: Sequence[Sequence[int]], threads: int) -> Cost:
        files = [path for kind in ("*.safetensors", "*.gguf") for path in self.path.glob(kind)]
        size_bytes = sum(path.stat().st_size for path in files)
        return measure_cost("reference", self.path, threads, prompts, size_bytes)

    def save(self, path: Path, identity: Identity, prompts: Mapping[str, tuple[int, ...]], cost: Cost | None) -> None:
        """Keep what was recorded in the file ``path``."""
        facts = read_text_facts(self.path)
        saved = SavedReference(identity, self.recorded["original"], self.recorded["as_built"], prompts, facts, cost)
        save_reference(path, saved)


@dataclass(frozen=True)
class SavedSources:
    """What was kept in a file: no torch, no transformers, no checkpoint."""

    saved: SavedReference
    checkpoint: CheckpointInfo

    @classmethod
    def load(cls, path: Path, identity: Identity, name: str, document_ids: Sequence[str]) -> SavedSources:
        return cls(load_reference(path, identity, document_ids), CheckpointInfo(name, dict(identity.checkpoint)))

    @contextmanager
    def open(self, phase: Phase) -> Iterator[tuple[OpenReference, None]]:
        answers = self.saved.original if phase == "original" else self.saved.as_built
        yield lambda: answers, None

    def prompt(self, document: Document) -> ComparedPrompt | None:
        return ComparedPrompt(tuple(self.saved.prompts[document.id]), continues=document.summary is not None)

    def window(self, token_ids: Sequence[int], max_seq_len: int) -> tuple[Sequence[int], str]:
        asked = [asked for asked, every in self.saved.as_built.sequences if every > 1 and len(asked) <= max_seq_len]
        return (max(asked, key=len), "as many as the saved reference was asked") if asked else ((), "")

    def checks(self, engine: Path) -> list[Check]:
        return compare_text_facts(engine, self.saved.text_facts)

    def cost(self, prompts: Sequence[Sequence[int]], threads: int) -> Cost | None:
        return self.saved.cost
