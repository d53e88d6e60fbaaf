"""Whether an engine belongs to a checkpoint: same files, same tokenizer and chat template, same end-of-sequence ids."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_engine.errors import CheckpointError, EngineError
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.report import Check
from qwen_run.text.tokenizer import TOKENIZER_FILE

if TYPE_CHECKING:
    from qwen_build.checkpoint.text_files import TextFiles

# check -> files that the builder decides: the engine must have them byte for byte, or not have them either
FILES = {
    "tokenizer": (TOKENIZER_FILE,),
    "chat template": ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"),
    "generation defaults": ("generation_config.json",),
}
END_OF_SEQUENCE = "end of sequence"

# what a message shows of differing entries
_SHOWN_ENTRIES, _SHOWN_LETTERS = 3, 80


@dataclass(frozen=True)
class TextFacts:
    """What text depends on in a checkpoint: sha256 of what engines have of it, and the end-of-answer ids."""

    sha256: Mapping[str, str]
    eos_token_ids: tuple[int, ...]


def check_checkpoint(manifest: Manifest, checkpoint: Path) -> None:
    """Make sure that ``checkpoint`` is what the engine of ``manifest`` was built from, byte for byte.

    Raises:
        CheckpointError: names the files that are missing or changed.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"{checkpoint}, which the engine was built from, is not here; name its directory with --checkpoint"
        )
    complaints = []
    for name, expected in manifest.origin.sha256.items():
        found = _sha256(checkpoint / name)
        if found != expected:
            complaints.append(f"{name} {'is missing' if found is None else 'has changed'}")
    for adapter in manifest.origin.adapters:
        for name, expected in adapter.sha256.items():
            if _sha256(path := Path(adapter.directory) / name) != expected:
                raise CheckpointError(
                    f"{path}, which is merged into the engine, is not there or has changed; put it back, or build the "
                    "engine again"
                )
    if complaints:
        raise CheckpointError(
            f"{checkpoint} is not what the engine was built from: {', '.join(complaints)}; "
            "build the engine again, or name the checkpoint it was built from"
        )


def read_text_facts(checkpoint: Path) -> TextFacts:
    """The facts of the directory ``checkpoint``: what the builder makes of its files for text.

    Raises:
        BuildError: a file of the checkpoint is missing or damaged.
    """
    return _facts(_text_files(checkpoint))


def compare_text_files(engine: Path, checkpoint: Path) -> list[Check]:
    """Compare tokenizer, chat template, generation defaults and end-of-sequence ids of both directories.

    Raises:
        EngineError: ``engine`` has no manifest that can be read.
        BuildError: a file of the checkpoint is missing or damaged.
    """
    files = _text_files(checkpoint)
    return compare_text_facts(engine, _facts(files), files.contents.get(TOKENIZER_FILE))


def _text_files(checkpoint: Path) -> TextFiles:
    from qwen_build.checkpoint.config import ModelConfig
    from qwen_build.checkpoint.text_files import read_text_files

    return read_text_files(checkpoint, ModelConfig.from_hf(checkpoint))


def _facts(files: TextFiles) -> TextFacts:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.contents.items()}
    return TextFacts(digests, files.eos_token_ids)


def compare_text_facts(engine: Path, facts: TextFacts, tokenizer: bytes | None = None) -> list[Check]:
    """As :func:`compare_text_files`, with what is known of a checkpoint that may not be here.

    Args:
        tokenizer: what the builder makes of the checkpoint's, to say which entries differ.
    """
    manifest = Manifest.read(engine)
    checks = []
    for name, files in FILES.items():
        differing = [file for file in files if _sha256(engine / file) != facts.sha256.get(file)]
        message = f"{' and '.join(differing)} of the engine differs from the checkpoint's" if differing else "equal"
        if TOKENIZER_FILE in differing and tokenizer is not None:
            message += f": {describe_difference(tokenizer, engine / TOKENIZER_FILE)}"
        checks.append(Check(name, not differing, message))
    lacking = sorted(set(facts.eos_token_ids) - set(manifest.eos_token_ids))
    excess = sorted(set(manifest.eos_token_ids) - set(facts.eos_token_ids))
    complaints = [f"lacks {lacking}"] * bool(lacking) + [f"has {excess} besides"] * bool(excess)
    message = f"the engine {' and '.join(complaints)}" if complaints else f"{sorted(facts.eos_token_ids)}"
    return [*checks, Check(END_OF_SEQUENCE, not complaints, message)]


def describe_difference(expected: bytes, found: Path) -> str:
    """In which entries the file ``found`` differs from ``expected``; both are a ``tokenizer.json``."""
    if not found.is_file():
        return "the engine has none"
    try:
        ours, theirs = (_entries(json.loads(content)) for content in (expected, found.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "one of them is not a tokenizer of the kind Qwen has"
    said = []
    for kind in ours:
        for verb, entries in (("lacks", ours[kind].keys() - theirs[kind]), ("adds", theirs[kind].keys() - ours[kind])):
            if entries:
                shown = [textwrap.shorten(entry, _SHOWN_LETTERS) for entry in sorted(entries)[:_SHOWN_ENTRIES]]
                said.append(f"it {verb} {len(entries)} of the {kind} ({'; '.join(shown)})")
    if not said and list(ours["merges"]) != list(theirs["merges"]):
        return "the merges stand in another order"
    return "; ".join(said) or "only in how the same content is written"


def _entries(tokenizer: dict[str, Any]) -> dict[str, dict[str, None]]:
    """What can be compared one by one, as it would be shown, in order."""
    model = tokenizer["model"]
    settings = {name: value for name, value in tokenizer.items() if name not in ("model", "added_tokens")}
    settings |= {f"model.{name}": value for name, value in model.items() if name not in ("vocab", "merges")}
    pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    return {
        "vocabulary": dict.fromkeys(f"{token!r} = {id}" for token, id in model["vocab"].items()),
        "merges": dict.fromkeys(map(repr, pairs)),
        "added tokens": dict.fromkeys(json.dumps(token) for token in tokenizer.get("added_tokens") or ()),
        "settings": dict.fromkeys(f"{name} = {json.dumps(value)}" for name, value in settings.items()),
    }


def _sha256(path: Path) -> str | None:
    """Of the file at ``path``, in hexadecimal; None where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}") from error
