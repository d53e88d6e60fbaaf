"""The files for text of an engine, as the builder decides them from those of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen_build.checkpoint import generation_defaults, qwen1, tokenizer_files
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.fields import token_ids
from qwen_build.checkpoint.files import read_bytes, read_json, read_optional_json
from qwen_build.checkpoint.tokenizer_files import CONFIG_FILE, EngineTokenizer, engine_tokenizer
from qwen_engine.errors import CheckpointError
from qwen_engine.manifest import TEXT_FILES
from qwen_run.text.tokenizer import TOKENIZER_FILE

# ends an answer in the chat templates of all families, whatever generation_config.json says
END_OF_TURN = "<|im_end|>"
# ends an answer of Qwen-1's besides
QWEN1_STOPS = ("<|im_start|>",)
TEMPLATE_FILE = "chat_template.jinja"

# files of a checkpoint that decide what its engine does with text
SOURCES = tuple(dict.fromkeys((*TEXT_FILES, *tokenizer_files.SOURCES)))


@dataclass(frozen=True)
class TextFiles:
    """What an engine has for text.

    Attributes:
        contents: its files, by name.
        eos_token_ids: every token that ends an answer.
        notes: what of the checkpoint's files is left out, a sentence each.
    """

    contents: Mapping[str, bytes]
    eos_token_ids: tuple[int, ...]
    notes: tuple[str, ...]


def read_text_files(checkpoint: Path, config: ModelConfig) -> TextFiles:
    """Decide the files for text of the engine of the directory ``checkpoint``.

    Raises:
        CheckpointError: names the file that cannot be read or is not what the runtime takes.
    """
    for path in (checkpoint / name for name in SOURCES):
        if not path.is_file() and (path.exists() or path.is_symlink()):
            found = "is not a file" if path.exists() else "is a link to nothing"
            raise CheckpointError(f"{path} {found}; download it again or remove it")
    contents: dict[str, bytes] = {}
    notes: list[str] = []
    tokenizer = engine_tokenizer(checkpoint)
    for name in TEXT_FILES:
        path = checkpoint / name
        if name == TOKENIZER_FILE:
            if tokenizer is not None:
                contents[name] = tokenizer.content
                notes += tokenizer.notes
        elif path.is_file():
            if name == generation_defaults.FILE:
                defaults, said = generation_defaults.generation_defaults(read_json(path), config.vocab_size)
                contents[name] = (json.dumps(defaults, indent=2) + "\n").encode()
                notes += said
            else:
                contents[name] = read_bytes(path)
    if config.model_type == qwen1.MODEL_TYPE and _chats(checkpoint):
        contents[TEMPLATE_FILE] = qwen1.CHAT_TEMPLATE.encode()
    return TextFiles(contents, _end_of_sequence_ids(checkpoint, config, tokenizer), tuple(notes))


def _chats(checkpoint: Path) -> bool:
    """Whether a Qwen-1, which has no template in its files, is one that answers in turns."""
    if (checkpoint / TEMPLATE_FILE).exists() or "chat_template" in read_optional_json(checkpoint / CONFIG_FILE):
        return False
    return read_optional_json(checkpoint / generation_defaults.FILE).get("chat_format") != "raw"


def _end_of_sequence_ids(checkpoint: Path, config: ModelConfig, tokenizer: EngineTokenizer | None) -> tuple[int, ...]:
    """Every token id that ends an answer: what generation_config.json, config.json and the tokenizer name."""
    ids: dict[int, None] = {}
    for name, own in _named_ids(checkpoint, config, tokenizer):
        if beyond := [i for i in own if not 0 <= i < config.vocab_size]:
            raise CheckpointError(
                f"{checkpoint / name}: end-of-sequence ids {beyond} are outside the vocabulary of {config.vocab_size}; "
                "correct eos_token_id there"
            )
        ids |= dict.fromkeys(own)
    return tuple(ids)


def _named_ids(
    checkpoint: Path, config: ModelConfig, tokenizer: EngineTokenizer | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The end-of-sequence ids of each file that names some."""
    name = generation_defaults.FILE
    yield name, token_ids(read_optional_json(checkpoint / name).get("eos_token_id"))
    yield "config.json", config.eos_token_ids
    eos_token = read_optional_json(checkpoint / CONFIG_FILE).get("eos_token")
    if isinstance(eos_token, dict):  # an AddedToken written out
        eos_token = eos_token.get("content")
    if not isinstance(eos_token, str | None):
        raise CheckpointError(f"{checkpoint / CONFIG_FILE}: eos_token is {eos_token!r}, expected a token")
    added = tokenizer.added if tokenizer else {}
    stops = (eos_token, END_OF_TURN, *(QWEN1_STOPS if config.model_type == qwen1.MODEL_TYPE else ()))
    yield TOKENIZER_FILE, tuple(added[token] for token in stops if token and token in added)
