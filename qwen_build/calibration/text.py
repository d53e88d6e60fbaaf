"""The text a build calibrates with, as token ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from qwen_build.calibration.built_in import built_in_text
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.tokenizer_files import engine_tokenizer
from qwen_engine.errors import BuildError, EngineError, RequestError
from qwen_run.accuracy.datasets import BUILT_IN, Document, Half, half_of, load_dataset
from qwen_run.text.tokenizer import TOKENIZER_FILE

DEFAULT_TOKENS = 16_384
SEQUENCE_TOKENS = 512
MIN_SEQUENCES = 2

# A token stands for fewer characters on average: what a long text has beyond is not even tokenised.
_MOST_CHARACTERS = 64

# Of a text that is one document, one sequence in so many is held out.
_HELD_OUT = 4


def read_sequences(
    directory: Path, config: ModelConfig, text: Path | None = None, tokens: int | None = None
) -> np.ndarray:
    """The beginning of a text, cut into sequences: token ids int64 (S, L).

    Args:
        directory: of the checkpoint, whose tokenizer counts.
        text: a file as :func:`load_dataset` reads it, the documents that :func:`read_halves` calibrates with first;
            None: the calibration half of the built-in text, see :mod:`qwen_build.calibration.built_in`.
        tokens: how many in all, in whole sequences; None: what there is, up to ``DEFAULT_TOKENS``.

    Raises:
        BuildError: the text or the tokenizer cannot be read, or does not make as many tokens.
    """
    calibration, evaluation = _halves(directory, text)
    if text is None:
        return _sequences(directory, config, calibration, "the built-in text", *_counts(config, tokens))
    return _sequences(directory, config, [*calibration, *evaluation], str(text), *_counts(config, tokens))


def read_halves(
    directory: Path, config: ModelConfig, text: Path | None, tokens: int | None, most_held_out: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Text to calibrate with and text that is held out to verify with, as :func:`read_sequences` makes sequences.

    Documents are in one half or the other by their hash; of one document the last quarter is held out. The former is
    what :func:`read_sequences` reads of as many ``tokens``.

    Args:
        most_held_out: sequences.

    Returns:
        Both, and what the latter is, in words.

    Raises:
        BuildError: see :func:`read_sequences`.
    """
    calibration, evaluation = _halves(directory, text)
    if evaluation:
        name = "the built-in text" if text is None else str(text)
        first = _sequences(directory, config, calibration, f"one half of {name}", *_counts(config, tokens))
        held_out = _sequences(directory, config, evaluation, f"the other half of {name}", 1, most_held_out)
        return first, held_out, f"the half of {name} whose documents do not calibrate"
    sequences = read_sequences(directory, config, text, tokens)
    count, length = sequences.shape
    kept_back = -(-count // _HELD_OUT)
    if count - kept_back < MIN_SEQUENCES:
        raise BuildError(
            f"{text} makes {sequences.size:,} tokens, {(MIN_SEQUENCES + 1) * length:,} are needed to calibrate and to "
            "verify; give a longer text with --calibration"
        )
    return sequences[:-kept_back], sequences[-kept_back:], f"the end of {text}, which does not calibrate"


def _counts(config: ModelConfig, tokens: int | None) -> tuple[int, int]:
    """The least and the most sequences that calibration takes, see :func:`read_sequences`."""
    length = _length(config)
    if tokens is None:
        return MIN_SEQUENCES, DEFAULT_TOKENS // length
    if tokens < MIN_SEQUENCES * length:
        raise BuildError(f"--calibration-tokens {tokens} is too few, expected {MIN_SEQUENCES * length} or more")
    return tokens // length, tokens // length


def _length(config: ModelConfig) -> int:
    return min(SEQUENCE_TOKENS, config.longest.tokens)


def _sequences(
    directory: Path, config: ModelConfig, documents: Iterable[Document], name: str, least: int, most: int
) -> np.ndarray:
    """At least and at most so many sequences of ``documents``, which a message calls ``name``."""
    length = _length(config)
    found = engine_tokenizer(directory)
    if found is None:
        raise BuildError(
            f"{directory} has no {TOKENIZER_FILE}, which calibration needs; add it, or leave calibration out"
        )
    tokenizer, wanted = found.open(), most * length
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document.document[: _MOST_CHARACTERS * (wanted - len(ids))])
        if len(ids) >= wanted:
            break
    if len(ids) < least * length:
        remedy = "give a longer text with --calibration"
        remedy += ", or fewer --calibration-tokens" if least > MIN_SEQUENCES else ""
        raise BuildError(f"{name} has {len(ids):,} tokens, calibration takes {least * length:,}; {remedy}")
    ids = ids[: min(wanted, len(ids) // length * length)]
    if (largest := max(ids)) >= config.vocab_size:
        raise BuildError(f"{TOKENIZER_FILE} has token {largest}, the model {config.vocab_size}; use the model's own")
    return np.array(ids, np.int64).reshape(-1, length)


def _halves(directory: Path, text: Path | None) -> tuple[list[Document], list[Document]]:
    """The documents to calibrate with and those to verify with; one alone calibrates."""
    if text is None:
        return built_in_text(directory, "calibration"), built_in_text(directory, "evaluation")
    # of a file by the name of a sample, that sample's evaluation half would be read
    source = f"./{text}" if str(text) in BUILT_IN else str(text)
    try:
        documents = load_dataset(source).documents
    except (RequestError, EngineError) as error:
        raise BuildError(f"--calibration: {error}") from error
    if len(documents) == 1:
        return list(documents), []
    halves: dict[Half, list[Document]] = {"calibration": [], "evaluation": []}
    for document in documents:
        halves[half_of(document.document)].append(document)
    return halves["calibration"], halves["evaluation"]
