"""From the CHECKPOINT argument of the command line to a local Hugging Face directory."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from qwen_build.checkpoint.demo import demo_checkpoint
from qwen_build.checkpoint.gguf_file import model_name
from qwen_build.checkpoint.gguf_text import as_directory
from qwen_engine.errors import CheckpointError, first_line
from qwen_engine.user_cache import user_cache

HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/(?P<name>[\w-][\w.-]*))(@(?P<revision>[\w./-]+))?", re.ASCII)

# everything the builder reads, and nothing of other formats that often lie beside it
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "model*.safetensors",
    "model.safetensors.index.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
HUB_SUBDIRECTORIES = "[!1]*/*"

EXPECTED = "give a Hugging Face directory, a .gguf file, or a Hub id such as Qwen/Qwen2.5-0.5B-Instruct"


@dataclass(frozen=True)
class Located:
    """A checkpoint on this machine.

    ``name`` is what its engines are called; ``source`` what to record as their origin: the Hub id, or the
    absolute directory; ``revision`` the Hub's commit, None of what is not from there.
    """

    path: Path
    name: str
    revision: str | None
    source: str


def resolve_checkpoint(argument: str | None) -> Located:
    """What ``argument`` names: a directory, a GGUF file, a Hub id ``owner/name[@revision]``, or None for the demo.

    A directory that exists goes before a Hub id of the same name. What is already in the Hub's cache is
    not downloaded again.

    Raises:
        CheckpointError: there is no such directory, or the Hub cannot or will not give it.
        BuildError: the demo cannot be made.
    """
    if argument is None:
        return _local(demo_checkpoint(user_cache()))
    path = Path(os.path.expanduser(argument))
    if argument and os.path.isdir(path):  # os.path takes what the system refuses to look at for absent
        return _local(path)
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise CheckpointError(f"no such file: {argument!r}; {EXPECTED}")
        path = path.absolute()
        return Located(as_directory(path), model_name(path), None, str(path))
    if argument and os.path.exists(path):
        raise CheckpointError(f"{argument} is a file; give the directory it is in")
    match = HUB_ID.fullmatch(argument)
    if match is None:
        raise CheckpointError(f"no such directory: {argument!r}; {EXPECTED}")
    return _download(match["repo"], match["name"], match["revision"])


def _local(path: Path) -> Located:
    path = path.resolve()
    return Located(path, path.name or "checkpoint", None, str(path))


def _download(repo: str, name: str, revision: str | None) -> Located:
    from huggingface_hub import snapshot_download

    try:
        path = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=HUB_SUBDIRECTORIES
            )
        )
    # whatever goes wrong in there is the network's, the Hub's or the disk's; its libraries share no base class
    except Exception as error:
        raise CheckpointError(_explain(error, repo, revision)) from error
    return Located(path, name, path.name, repo)  # a snapshot's directory is called like its commit


def _explain(error: Exception, repo: str, revision: str | None) -> str:
    """One line for what ``snapshot_download`` raised: what happened, what to do."""
    from huggingface_hub import errors

    local = "or give a local directory"
    # the first row that fits: special cases stand before their base classes
    rows: tuple[tuple[type[Exception], str], ...] = (
        (
            errors.GatedRepoError,
            f"{repo} is gated: accept its terms on https://huggingface.co/{repo}, then run `hf auth login`, {local}",
        ),
        (
            errors.RevisionNotFoundError,
            f"{repo} has no revision {revision!r} on the Hugging Face Hub; name a branch, a tag or a commit of it",
        ),
        (
            errors.RepositoryNotFoundError,
            f"no directory {repo!r} here and no such model on the Hugging Face Hub; "
            f"check the name, run `hf auth login` if it is private, {local}",
        ),
        (
            errors.LocalEntryNotFoundError,
            f"no directory {repo!r} here, and the Hugging Face Hub cannot be reached nor is the whole model in its "
            f"cache; check the network and HF_HUB_OFFLINE, {local}",
        ),
        (errors.HFValidationError, f"{repo!r} is neither a directory nor a Hub id; {EXPECTED}"),
    )
    for kind, message in rows:
        if isinstance(error, kind):
            return message
    reason = first_line(error)
    return f"{repo} cannot be downloaded from the Hugging Face Hub: {reason}; try again, {local}"
