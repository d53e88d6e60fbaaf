"""The text a build calibrates with, as token ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from qwen_build.config import ModelConfig
from qwen_engine.errors import BuildError, EngineError, RequestError
from qwen_run.datasets import BUILT_IN, Document, built_in_documents, load_dataset
from qwen_run.tokenizer import TOKENIZER_FILE, Tokenizer

DEFAULT_TOKENS = 16_384
SEQUENCE_TOKENS = 512
MIN_SEQUENCES = 2


def read_sequences(
    directory: Path, config: ModelConfig, text: Path | None = None, tokens: int | None = None
) -> np.ndarray:
    """The beginning of a text, cut into sequences: token ids int64 (S, L).

    Args:
        directory: of the checkpoint, whose tokenizer counts.
        text: a file as :func:`load_dataset` reads it; None: the calibration half of the built-in samples.
        tokens: how many in all, in whole sequences; None: what there is, up to ``DEFAULT_TOKENS``.

    Raises:
        BuildError: the text or the tokenizer cannot be read, or does not make as many tokens.
    """
    length = min(SEQUENCE_TOKENS, config.max_position_embeddings)
    if not (directory / TOKENIZER_FILE).is_file():
        raise BuildError(
            f"{directory} has no {TOKENIZER_FILE}, which calibration needs; add it, or leave calibration out"
        )
    if tokens is not None and tokens < MIN_SEQUENCES * length:
        raise BuildError(f"--calibration-tokens {tokens} is too few, expected {MIN_SEQUENCES * length} or more")
    wanted = (tokens or DEFAULT_TOKENS) // length * length
    ids: list[int] = []
    try:
        tokenizer = Tokenizer.load(directory)
        for document in built_in_documents("default", "calibration") if text is None else _documents(text):
            ids += tokenizer.encode(document.document)
            if len(ids) >= wanted:
                break
    except (RequestError, EngineError) as error:
        raise BuildError(f"--calibration: {error}") from error
    needed = MIN_SEQUENCES * length if tokens is None else wanted
    if len(ids) < needed:
        name = "the built-in text" if text is None else text
        remedy = "give a longer text with --calibration" + ("" if tokens is None else ", or fewer --calibration-tokens")
        raise BuildError(f"{name} has {len(ids):,} tokens, calibration takes {needed:,}; {remedy}")
    ids = ids[: min(wanted, len(ids) // length * length)]
    if (largest := max(ids)) >= config.vocab_size:
        raise BuildError(f"{TOKENIZER_FILE} has token {largest}, the model {config.vocab_size}; use the model's own")
    return np.array(ids, np.int64).reshape(-1, length)


def _documents(text: Path) -> Iterable[Document]:
    source = str(text)
    if source in BUILT_IN:  # a file of that name: the sample's evaluation half is not for calibration
        source = f"./{source}"
    return load_dataset(source).documents
