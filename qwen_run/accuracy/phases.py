"""The phases of an assessment: every document through both sides, and the engine beside itself.

The phases follow one another so that only one reference is in memory at a time. What each finds of a document is
kept in a journal as soon as it is known.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from qwen_engine.manifest import LAYERS_GRAPH_FILE, Manifest
from qwen_run.accuracy.answer_cost import ANSWER_TOKENS, measure_cost
from qwen_run.accuracy.both_sides import (
    Beside,
    compare_sequence,
    engine_layers,
    engine_logits,
    greedy,
    greedy_together,
    layer_errors,
    make_prompt,
    timed,
)
from qwen_run.accuracy.datasets import Document
from qwen_run.accuracy.findings import Findings, Sample
from qwen_run.accuracy.journal import Journal
from qwen_run.accuracy.logits import FullLogits, Positions, ReferenceLogits, compare, following_tokens
from qwen_run.accuracy.reference import CHUNK_TOKENS, RoundingCost
from qwen_run.accuracy.reference_sources import Layers, LiveSources, OpenReference, Phase, SavedSources
from qwen_run.accuracy.report import Cost, LayerError
from qwen_run.accuracy.step_checks import Difference, compare_ways, longest
from qwen_run.api.llm import LLM
from qwen_run.runtime.engine import Engine

# Prompts whose answers are timed.
TIMED_PROMPTS = 3
# Documents on which what rounding of inputs costs is compared with what it costs the reference.
ROUNDED_DOCUMENTS = 5
# Of so many positions of a long sequence one is compared.
WINDOW_EVERY = 8
# Where standard error is no terminal, progress is told at the begin of a phase and then so often.
TELL_EVERY_S = 30.0


class Assessment:
    """The work on one engine, phase by phase; every method keeps its results in the journal.

    ``seconds``: how long reference and engine took, for what was not in the journal already.
    """

    def __init__(self, engine_directory: Path, threads: int, llm: LLM, journal: Journal, max_new_tokens: int) -> None:
        self.engine_directory, self.threads = engine_directory, threads
        num_blocks = llm.core.engine.cache.num_blocks
        self._open = partial(Engine.load, engine_directory, threads, num_blocks, max_seq_len=llm.max_seq_len)
        self.llm, self.journal, self.max_new_tokens = llm, journal, max_new_tokens
        self.seconds = {"reference": 0.0, "engine": 0.0}
        self._float_engine: Engine | None = None
        self._originals: dict[str, list[ReferenceLogits]] = {}

    def run(
        self,
        documents: Sequence[Document],
        sources: LiveSources | SavedSources,
        manifest: Manifest,
        with_cost: bool,
        with_checks: bool,
    ) -> Findings:
        """Every phase, one after the other.

        Args:
            with_cost: measure what answers cost.
            with_checks: feed documents in other ways, and one window of the engine's full length.
        """
        samples = [
            Sample(document, sources.prompt(document) or make_prompt(self.llm.text, document, self.max_new_tokens))
            for document in documents
        ]
        with sources.open("original") as (reference, layers_of):
            samples = self.continue_samples(samples, reference)
            original = self.compare("original", samples, reference)
            self._keep_originals(samples, reference)
            layers = self.layers("original", samples[0], layers_of)
        with sources.open("as_built") as (reference, layers_of):
            as_built = self.compare("as_built", samples, reference)
            rounded = self.rounded(samples, reference)
            window = self.window(samples, sources, reference) if with_checks else None
            layers += self.layers("as_built", samples[0], layers_of)
        self._float_engine = None
        continued = [sample for sample in samples if sample.prompt.continues]
        answers = self.answer(continued)
        together = self.answer_together(continued) if with_checks else []
        ways = self.ways(samples) if with_checks else {}
        costs = self.costs(manifest, samples, sources) if with_cost else []
        return Findings(
            samples, original, as_built, rounded, tuple(layers), answers, together, ways, window, tuple(costs)
        )

    def continue_samples(self, samples: Sequence[Sample], reference: OpenReference) -> list[Sample]:
        """Each sample with the reference's greedy continuation."""

        def continuation(sample: Sample) -> list[int]:
            with self._clock("reference"):
                return reference().continuation(
                    sample.prompt.token_ids, self.max_new_tokens, self.llm.text.eos_token_ids
                )

        return [
            replace(sample, continuation=tuple(self._do("continuation", sample, continuation)))
            if sample.prompt.continues
            else sample
            for sample in self._progress("reference writes", samples)
        ]

    def compare(self, phase: Phase, samples: Sequence[Sample], reference: OpenReference) -> list[Any]:
        """Both sides on every sample; what :class:`qwen_run.accuracy.both_sides.Comparison` holds, as plain data.

        Against what was meant, the engine computes with float32 activations, see ``float_activations.py``. On some
        samples it is then compared with itself as it runs: "rounding" has the KL at each position.
        """

        def comparison(sample: Sample) -> dict[str, Any]:
            token_ids, beside = sample.token_ids, None
            expected = timed(iter(reference().logits(token_ids)), self.seconds, "reference")
            found = engine_logits(self._engine(phase), token_ids)
            if sample in self._judged(samples) and phase == "original":
                expected = self._kept(sample, expected)
            elif sample in self._judged(samples) and self._rounds_inputs:
                beside = Beside(found, engine_logits(self._engine("original"), token_ids), token_ids)
                found = iter(beside)
            result = compare_sequence(expected, timed(found, self.seconds, "engine"), token_ids)
            positions = {f.name: getattr(result.positions, f.name).tolist() for f in fields(Positions)}
            rounding = {"rounding": beside.positions.kl.tolist()} if beside else {}
            return {"positions": positions, "worst": result.worst, "pairs": result.pairs} | rounding

        label = {"original": "compare with the original", "as_built": "compare with what was meant"}[phase]
        return [self._do(phase, sample, comparison) for sample in self._progress(label, samples)]

    def rounded(self, samples: Sequence[Sample], reference: OpenReference) -> list[RoundingCost]:
        """What rounding costs the reference that rounds what the engine rounds, on the first samples."""

        def rounded(sample: Sample) -> dict[str, float]:
            with self._clock("reference"):
                return asdict(reference().rounded(sample.token_ids, self._originals.pop(sample.document.id, [])))

        judged = self._progress("reference rounds", self._judged(samples))
        return [RoundingCost(**self._do("rounded", sample, rounded)) for sample in judged]

    def window(
        self, samples: Sequence[Sample], sources: LiveSources | SavedSources, reference: OpenReference
    ) -> dict[str, Any] | None:
        """One sequence as long as the engine takes, or as can be afforded: of every few positions the KL.

        None where there is no such sequence. "tokens": how many it has; "bounded": by what.
        """

        def window() -> dict[str, Any] | None:
            joined = [token for sample in samples for token in sample.token_ids]
            token_ids, bounded = sources.window(joined, self.llm.max_seq_len)
            if len(token_ids) < 2:
                return None
            expected = timed(iter(reference().logits(token_ids, WINDOW_EVERY)), self.seconds, "reference")
            found = timed(engine_logits(self._engine("as_built"), token_ids, WINDOW_EVERY), self.seconds, "engine")
            kl = [compare(e, f, np.full(len(f), -1)).kl.tolist() for e, f in zip(expected, found, strict=True)]
            return {"tokens": len(token_ids), "bounded": bounded, "kl": [value for chunk in kl for value in chunk]}

        return cast("dict[str, Any] | None", self.journal.do("window", "", window))

    def ways(self, samples: Sequence[Sample]) -> dict[str, Difference]:
        """The longest texts fed in other ways, beside one run of each."""

        def ways() -> dict[str, Any]:
            joined = [token for sample in samples for token in sample.token_ids]
            texts = longest([joined, *(sample.token_ids for sample in samples[1:])], self.llm.max_seq_len)
            with self._clock("engine"):
                found = compare_ways(self._engine("original"), texts) if texts else {}
            return {name: asdict(difference) for name, difference in found.items()}

        return {name: Difference(**found) for name, found in self.journal.do("ways", "", ways).items()}

    def answer_together(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Answers to all prompts at once, when the engine has seen them before."""

        def together() -> list[list[int]]:
            with self._clock("engine"):
                return greedy_together(self.llm, [one.prompt.token_ids for one in samples], self.max_new_tokens)

        return cast("list[list[int]]", self.journal.do("together", "", together)) if samples else []

    def _judged(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        return samples[:ROUNDED_DOCUMENTS]

    @property
    def _rounds_inputs(self) -> bool:
        linears = self.llm.core.engine.manifest.linears
        return any(linear.quantization.activations != "float32" for linear in linears)

    def _engine(self, phase: Phase) -> Engine:
        """The engine as it runs, or with float activations."""
        if phase == "original":
            engine = self.llm.core.engine
            assert isinstance(engine, Engine), "judged as it runs in one process"
            return engine
        if self._float_engine is None:
            self._float_engine = self._open(float_activations=True)
        return self._float_engine

    def _kept(self, sample: Sample, chunks: Iterator[ReferenceLogits]) -> Iterator[ReferenceLogits]:
        """``chunks`` of logits of the original weights, of which some are kept for :meth:`rounded`."""
        following = following_tokens(sample.token_ids)
        kept = self._originals[sample.document.id] = []
        for number, chunk in enumerate(chunks):
            start = CHUNK_TOKENS * number
            if isinstance(chunk, FullLogits):
                kept.append(chunk.top(following[start : start + len(chunk)]))
            else:
                kept.append(chunk)
            yield chunk

    def _keep_originals(self, samples: Sequence[Sample], reference: OpenReference) -> None:
        """Keep what :meth:`rounded` needs of samples whose comparison was in the journal."""
        for sample in self._judged(samples):
            name = sample.document.id
            if name not in self._originals and not self.journal.has("rounded", name):
                for _ in self._kept(sample, iter(reference().logits(sample.token_ids))):
                    pass

    def layers(self, phase: Phase, sample: Sample, layers_of: Layers | None) -> list[LayerError]:
        """The error of every sub-block on one sample; none where the reference has no layers to show.

        Against the original, errors add up from layer to layer. Against what was meant, the reference computes each
        sub-block from what the engine fed it, so that an error shows where it is made and nowhere else.
        """
        if layers_of is None:
            return []

        def errors() -> list[dict[str, Any]]:
            token_ids = sample.token_ids[:CHUNK_TOKENS]
            engine = self._open(graph=LAYERS_GRAPH_FILE, float_activations=phase == "as_built")
            found = engine_layers(engine, token_ids)
            return [asdict(error) for error in layer_errors(layers_of(token_ids, found), found, phase)]

        return [LayerError(**error) for error in self.journal.do("layers", phase, errors)]

    def costs(self, manifest: Manifest, samples: Sequence[Sample], sources: LiveSources | SavedSources) -> list[Cost]:
        """What answers cost on both sides."""

        def costs() -> list[dict[str, Any]]:
            continued = [sample.prompt.token_ids for sample in samples if sample.prompt.continues]
            prompts = (continued or [sample.prompt.token_ids for sample in samples])[:TIMED_PROMPTS]
            longest = manifest.limits.max_seq_len - ANSWER_TOKENS
            prompts = [prompt[:longest] for prompt in prompts]
            size_bytes = sum(part.size_bytes for part in manifest.parts.values())
            engine = measure_cost("engine", self.engine_directory, self.threads, prompts, size_bytes)
            return [asdict(cost) for cost in (engine, sources.cost(prompts, self.threads)) if cost]

        return [Cost(**cost) for cost in self.journal.do("cost", "", costs)]

    def answer(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The engine's own greedy continuations of the prompts that are continued."""

        def answer(sample: Sample) -> list[int]:
            with self._clock("engine"):
                return greedy(self.llm, sample.prompt.token_ids, self.max_new_tokens)

        return [self._do("answer", sample, answer) for sample in self._progress("engine writes", samples)]

    def _do(self, phase: str, sample: Sample, compute: Callable[[Sample], Any]) -> Any:
        return self.journal.do(phase, sample.document.id, lambda: compute(sample))

    def _progress(self, label: str, samples: Sequence[Sample]) -> Iterator[Sample]:
        """``samples`` one after the other, told as they go: a bar on a terminal, a line now and then elsewhere."""
        if sys.stderr.isatty():
            yield from tqdm(samples, desc=label, unit="document")
            return
        told_s = -math.inf
        for number, sample in enumerate(samples):
            if time.monotonic() - told_s >= TELL_EVERY_S:
                print(f"{label}: {number} of {len(samples)} documents", file=sys.stderr, flush=True)
                told_s = time.monotonic()
            yield sample

    @contextmanager
    def _clock(self, side: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[side] += time.perf_counter() - started
