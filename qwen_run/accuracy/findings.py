"""What the phases of an assessment have found, and the parts of a report that are made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qwen_run.accuracy.both_sides import ComparedPrompt, answer_text
from qwen_run.accuracy.datasets import Document
from qwen_run.accuracy.logits import Positions
from qwen_run.accuracy.metrics import (
    Metric,
    RoundedDocument,
    continuation_agreement,
    first_divergence,
    rouge,
    rounding_metrics,
    router_agreement,
    summarise_positions,
    worst_position,
)
from qwen_run.accuracy.reference import RoundingCost
from qwen_run.accuracy.report import Cost, LayerError, LogitPairs, RouterAgreement, SampleResult, WorstPosition
from qwen_run.accuracy.rouge import rouge_scores
from qwen_run.accuracy.step_checks import Difference
from qwen_run.text.text_model import TextModel
from qwen_run.text.tokenizer import Tokenizer

# Tokens shown on each side of the worst position.
CONTEXT_TOKENS = 24


@dataclass(frozen=True)
class Sample:
    """A document, its prompt and the reference's continuation of it; both sides are compared on ``token_ids``."""

    document: Document
    prompt: ComparedPrompt
    continuation: tuple[int, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt.token_ids + self.continuation


@dataclass(frozen=True)
class Texts:
    """What each side wrote of a document, and the summary a person wrote."""

    engine: str
    reference: str
    summary: str


@dataclass(frozen=True)
class Findings:
    """What both sides said of every document.

    Attributes:
        samples: the documents, with what the reference wrote.
        original: a comparison with the original weights for each, see
            :class:`qwen_run.accuracy.both_sides.Comparison`, as plain data.
        as_built: the same with the weights as they are stored.
        rounded: what rounding costs the reference that rounds what the engine rounds, on the first samples.
        layers: errors of sub-blocks on the first sample.
        routed: of each of the first samples, how often each router chose as the original does, see
            :meth:`qwen_run.accuracy.phases.Assessment.routed`.
        answers: ids that the engine wrote, for each sample that is continued.
        together: the same of prompts that were asked at once; empty where they were not.
        ways: how far other ways of feeding a text are from one run of it, by name.
        window: KL in one long sequence, see :meth:`qwen_run.accuracy.phases.Assessment.window`.
        costs: what answers cost on each side.
    """

    samples: Sequence[Sample]
    original: Sequence[Mapping[str, Any]]
    as_built: Sequence[Mapping[str, Any]]
    rounded: Sequence[RoundingCost]
    layers: tuple[LayerError, ...]
    routed: Sequence[Mapping[str, int]]
    answers: Sequence[Sequence[int]]
    together: Sequence[Sequence[int]]
    ways: Mapping[str, Difference]
    window: Mapping[str, Any] | None
    costs: tuple[Cost, ...]

    @property
    def prompts(self) -> dict[str, tuple[int, ...]]:
        """Ids before anything is answered, by the document's id."""
        return {sample.document.id: sample.prompt.token_ids for sample in self.samples}

    @property
    def continued(self) -> list[Sample]:
        """The samples that both sides continue."""
        return [sample for sample in self.samples if sample.prompt.continues]

    @cached_property
    def original_positions(self) -> list[Positions]:
        """Against the original weights, one entry a sample."""
        return [_positions(found) for found in self.original]

    @property
    def logit_pairs(self) -> LogitPairs:
        """Some logits of both sides, to be plotted."""
        return LogitPairs(*(tuple(x for found in self.original for x in found["pairs"][side]) for side in (0, 1)))

    @property
    def rounded_documents(self) -> list[RoundedDocument]:
        """Engine and reference, both rounding alike, on the first samples."""
        found = zip(self.rounded, self.original_positions, self.as_built, strict=False)
        return [
            RoundedDocument(
                positions=len(original.kl),
                tokens=len(original.log_likelihood),
                rounding_kl=(sum(as_built.get("rounding", ())), reference.rounding_kl),
                original_kl=(float(original.kl.sum()), reference.original_kl),
                log_likelihood=(float(original.log_likelihood.sum()), reference.log_likelihood),
            )
            for reference, original, as_built in found
        ]

    @property
    def routers(self) -> tuple[RouterAgreement, ...]:
        """How often each router chose as the original does, over the samples."""
        tokens = sum(found["tokens"] for found in self.routed)
        names = [name for name in (self.routed[0] if self.routed else ()) if name != "tokens"]
        return tuple(RouterAgreement(name, sum(found[name] for found in self.routed) / tokens) for name in names)

    def texts(self, model: TextModel) -> list[Texts]:
        """What was written of each sample that is continued."""
        return [
            Texts(answer_text(model, answer), answer_text(model, sample.continuation), sample.document.summary or "")
            for answer, sample in zip(self.answers, self.continued, strict=True)
        ]

    def metrics(self, texts: Sequence[Texts]) -> list[Metric]:
        """Every metric of the report; ``texts`` are those of :meth:`texts`."""
        engine, reference, summary = ([getattr(text, name) for text in texts] for name in Texts.__dataclass_fields__)
        return [
            *summarise_positions("original", self.original_positions),
            *summarise_positions("as_built", [_positions(found) for found in self.as_built]),
            *rounding_metrics(self.rounded_documents),
            *router_agreement(self.routed),
            *continuation_agreement(self.answers, [sample.continuation for sample in self.continued]),
            *rouge(engine, summary, "rouge.engine"),
            *rouge(reference, summary, "rouge.reference"),
            *rouge(engine, reference, "rouge.agreement"),
        ]

    def sample_results(self, texts: Sequence[Texts]) -> Iterator[SampleResult]:
        """One result a document; ``texts`` are those of :meth:`texts`."""
        written = iter(zip(self.answers, texts, strict=True))
        for sample, found in zip(self.samples, self.original_positions, strict=True):
            answer, text = next(written) if sample.prompt.continues else (None, None)
            scores: dict[str, float] = {}
            if text:
                pairs = {
                    "rouge.engine": (text.engine, text.summary),
                    "rouge.reference": (text.reference, text.summary),
                    "rouge.agreement": (text.engine, text.reference),
                }
                scores = {f"{p}.{name}": x for p, pair in pairs.items() for name, x in rouge_scores(*pair).items()}
            yield SampleResult(
                id=sample.document.id,
                kl=tuple(found.kl.tolist()),
                top1=float(found.top1.mean()),
                engine_text=text.engine if text else None,
                reference_text=text.reference if text else None,
                summary=sample.document.summary,
                first_divergence=None if answer is None else first_divergence(answer, sample.continuation),
                rouge=scores,
            )

    def worst(self, tokenizer: Tokenizer) -> WorstPosition:
        """The position with the largest KL against the original weights, with the text around it."""
        positions, samples = self.original_positions, self.samples
        index, position = worst_position(positions)
        token_ids = samples[index].token_ids
        _, reference_choice, engine_choice = self.original[index]["worst"]

        def text(ids: Sequence[int]) -> str:
            return tokenizer.decode(list(ids), skip_special_tokens=False)

        return WorstPosition(
            sample=samples[index].document.id,
            position=position,
            kl=float(positions[index].kl[position]),
            before=text(token_ids[max(0, position + 1 - CONTEXT_TOKENS) : position + 1]),
            following=text(token_ids[position + 1 : position + 2]),
            after=text(token_ids[position + 2 : position + 2 + CONTEXT_TOKENS]),
            reference_choice=text([reference_choice]),
            engine_choice=text([engine_choice]),
        )


def _positions(found: Mapping[str, Any]) -> Positions:
    return Positions(**{name: np.array(values, np.float64) for name, values in found["positions"].items()})
