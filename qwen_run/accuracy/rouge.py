"""ROUGE: words that two texts share, as the rouge-score package counts them."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scores(prediction: str, reference: str) -> dict[str, float]:
    """F1 of ROUGE-1, 2, L and Lsum (Lin, 2004) of one text, as the rouge-score package counts with stemming.

    Two things that package leaves to its caller: Chinese, Japanese and Korean characters are words of one character
    (it would drop them), and sentences are put on lines, as ROUGE-Lsum wants them.
    """
    scores = _rouge_scorer().score(_lines(reference), _lines(prediction))
    return {name: float(scores[name].fmeasure) for name in ROUGE_TYPES}


@cache
def _rouge_scorer() -> Any:
    from rouge_score import rouge_scorer, tokenizers  # imports nltk, which takes a second

    default = tokenizers.DefaultTokenizer(use_stemmer=True)

    class Tokenizer:
        def tokenize(self, text: str) -> list[str]:
            pieces = re.split(r"([\u3041-\u30ff\u3400-\u9fff\uac00-\ud7a3])", text)
            return [word for i, piece in enumerate(pieces) for word in ([piece] if i % 2 else default.tokenize(piece))]

    return rouge_scorer.RougeScorer(ROUGE_TYPES, tokenizer=Tokenizer())


def _lines(text: str) -> str:
    return re.sub(r"(?<=[.!?])\s+|(?<=[。！？])\s*", "\n", text.strip())
