"""``qwen.tiktoken``, the tokenizer of Qwen-1, as the ``tokenizer.json`` that other checkpoints have.

A line is a token in base64 and its rank. tiktoken merges, of all neighbours, those that make the token of lowest rank;
a BPE of ``tokenizers`` merges listed pairs. The pair of a token is what tiktoken has before the merge that makes it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, models

from qwen_build.checkpoint.files import read_bytes
from qwen_engine.errors import CheckpointError
from qwen_run.text.token_text import BYTES_OF_CHARACTERS

FILE = "qwen.tiktoken"
# the ids behind the last rank; ordinary text never becomes one of them in tiktoken
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

_CHARACTERS = {byte: character for character, byte in BYTES_OF_CHARACTERS.items()}


def read_tiktoken(path: Path) -> tokenizers.Tokenizer:
    """The vocabulary, merges and special tokens of the file; not yet how text is cut into words.

    Raises:
        CheckpointError: a line is no token with a rank, or ranks are missing.
    """
    ranks = _read_ranks(path)
    vocabulary = {_spelled(token): rank for token, rank in ranks.items()}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, list(_merges(ranks))))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return core


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(f"{path}: line {number} is no token with its rank; download it again") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(f"{path} has not every rank once, or not every byte; download it again")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[str, str]]:
    """The pair of each token, in the order of ranks; a token that two others do not make has none."""
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if len(token) > 1 and len(parts := _parts(token, rank, ranks)) == 2:
            yield _spelled(parts[0]), _spelled(parts[1])


def _parts(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What tiktoken makes of ``token`` with the tokens of a rank below ``limit``."""
    parts = [bytes([byte]) for byte in token]
    while True:
        found = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        best, i = min(found, default=(limit, 0))
        if best >= limit:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _spelled(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)
