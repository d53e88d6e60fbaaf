"""ROUGE against rouge-score, and worked by hand."""

import pytest

from qwen_run.accuracy.metrics import rouge
from qwen_run.accuracy.rouge import ROUGE_TYPES, rouge_scores

ENGLISH = [
    ("The cat sat on the mat. It was running.", "A cat was sitting on the mat. It ran away!"),
    ("Gloire was launched in 1859.", "The first ironclad, Gloire, was launched by the French in November 1859."),
    ("", "Nothing was said."),
    ("Nothing to see. Move on. Nothing to see.", "Move on. Nothing to see."),
]


def test_rouge_is_that_of_the_package():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(ROUGE_TYPES, use_stemmer=True)
    for prediction, reference in ENGLISH:
        # sentences on lines, by hand
        lines = [text.replace(". ", ".\n").replace("! ", "!\n") for text in (reference, prediction)]
        expected = {name: score.fmeasure for name, score in scorer.score(*lines).items()}
        assert rouge_scores(prediction, reference) == pytest.approx(expected)


def test_rouge_worked_by_hand():
    scores = rouge_scores("Cats running. A dog.", "A dog. Cats run!")
    assert scores["rouge1"] == 1  # stemmed
    assert scores["rouge2"] == pytest.approx(2 / 3)
    assert scores["rougeL"] == pytest.approx(1 / 2)
    assert scores["rougeLsum"] == 1  # sentence by sentence
    chinese = rouge_scores("今天天气不好。", "今天天气很好。")
    assert chinese["rouge1"] == pytest.approx(5 / 6)
    assert chinese["rouge2"] == pytest.approx(3 / 5)
    assert rouge_scores("", "") == dict.fromkeys(ROUGE_TYPES, 0)


def test_rouge_over_documents():
    predictions, references = zip(*ENGLISH, strict=True)
    metrics = {metric.name: metric for metric in rouge(predictions, references, "rouge.engine")}
    each = [rouge_scores(*pair) for pair in ENGLISH]
    assert list(metrics) == [f"rouge.engine.{name}" for name in ROUGE_TYPES]
    for name in ROUGE_TYPES:
        metric = metrics[f"rouge.engine.{name}"]
        assert metric.value == pytest.approx(sum(scores[name] for scores in each) / 4)
        assert metric.low < metric.value < metric.high
    assert rouge([], [], "rouge.engine") == []
