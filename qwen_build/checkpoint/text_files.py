"""What a checkpoint's files for text say: whether the runtime can read them, and which tokens end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_build.checkpoint.config import ModelConfig, token_ids
from qwen_build.checkpoint.safetensors import read_json
from qwen_engine.errors import BuildError, CheckpointError, EngineError
from qwen_engine.manifest import TEXT_FILES
from qwen_run.text.tokenizer import TOKENIZER_FILE, Tokenizer

# ends an answer in the chat templates of all families, whatever generation_config.json says
END_OF_TURN = "<|im_end|>"


def end_of_sequence_ids(directory: Path, config: ModelConfig) -> tuple[int, ...]:
    """Every token id that ends an answer: what generation_config.json, config.json and the tokenizer name."""
    ids = [*token_ids(_optional_json(directory, "generation_config.json").get("eos_token_id")), *config.eos_token_ids]
    try:
        added = {t["content"]: t["id"] for t in _optional_json(directory, TOKENIZER_FILE).get("added_tokens", [])}
        eos_token = _optional_json(directory, "tokenizer_config.json").get("eos_token")
        if isinstance(eos_token, dict):  # an AddedToken written out
            eos_token = eos_token.get("content")
        ids += token_ids([added[token] for token in (eos_token, END_OF_TURN) if token in added])
    except (TypeError, KeyError) as error:
        where = f"added_tokens of {TOKENIZER_FILE} or eos_token of tokenizer_config.json"
        raise CheckpointError(f"{directory}: {where} is damaged; download them again") from error
    if beyond := [i for i in ids if not 0 <= i < config.vocab_size]:
        raise BuildError(f"end-of-sequence ids {beyond} are outside the vocabulary of {config.vocab_size}")
    return tuple(dict.fromkeys(ids))


def check_text_files(checkpoint: Path) -> None:
    """Refuse a directory whose tokenizer the runtime cannot read, or whose files for text are not files.

    Raises:
        CheckpointError: names the file.
    """
    for path in (checkpoint / name for name in TEXT_FILES):
        if not path.is_file() and (path.exists() or path.is_symlink()):
            found = "is not a file" if path.exists() else "is a link to nothing"
            raise CheckpointError(f"{path} {found}; download it again or remove it")
    if (checkpoint / TOKENIZER_FILE).is_file():
        try:
            Tokenizer.load(checkpoint)
        except EngineError as error:
            raise CheckpointError(str(error)) from error


def _optional_json(directory: Path, name: str) -> dict[str, Any]:
    return read_json(directory / name) if (directory / name).is_file() else {}
