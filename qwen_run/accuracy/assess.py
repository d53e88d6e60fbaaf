"""One engine judged: every document through both sides, the metrics, the verdicts, the report.

The phases follow one another so that only one reference is in memory at a time. What each finds of a document is
kept in a journal as soon as it is known.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_engine import __version__
from qwen_engine.graph_io import HEAD
from qwen_engine.json_output import now
from qwen_engine.manifest import LAYERS_GRAPH_FILE, Manifest, Quantization
from qwen_run.accuracy.answer_cost import ANSWER_TOKENS, measure_cost
from qwen_run.accuracy.both_sides import (
    compare_sequence,
    engine_layers,
    engine_logits,
    greedy,
    layer_errors,
    make_prompt,
    timed,
)
from qwen_run.accuracy.datasets import Document, load_dataset
from qwen_run.accuracy.findings import Findings, Sample
from qwen_run.accuracy.gate import THRESHOLDS, Threshold, judge, load_thresholds, parse_threshold
from qwen_run.accuracy.journal import Journal
from qwen_run.accuracy.logits import Positions
from qwen_run.accuracy.reference import CHUNK_TOKENS, Recipe
from qwen_run.accuracy.reference_sources import Layers, LiveSources, OpenReference, Phase, SavedSources, find_checkpoint
from qwen_run.accuracy.report import (
    SCHEMA_VERSION,
    Cost,
    DatasetInfo,
    EngineInfo,
    LayerError,
    Report,
    compare_baseline,
)
from qwen_run.accuracy.saved_reference import Identity
from qwen_run.api.llm import LLM
from qwen_run.runtime.capacity import with_limit
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.machine import physical_cores

# Packages whose versions the report names.
VERSIONED = ("onnxruntime", "numpy", "tokenizers", "rouge-score")
# Prompts whose answers are timed.
TIMED_PROMPTS = 3
# Where standard error is no terminal, progress is told at the begin of a phase and then so often.
TELL_EVERY_S = 30.0
# Tokens shown on each side of the worst position.
CONTEXT_TOKENS = 24


@dataclass(frozen=True)
class AssessOptions:
    """The options of ``qwen-summarize``, by their names there."""

    checkpoint: str | None = None
    dataset: str = "default"
    document_field: str = "document"
    summary_field: str = "summary"
    max_samples: int | None = 20
    max_new_tokens: int = 64
    check: bool = False
    thresholds: Path | None = None
    threshold: Sequence[str] = ()
    baseline: Path | None = None
    save_reference: Path | None = None
    reference: Path | None = None
    cost: bool = True
    resume: bool = False
    threads: int | None = None
    max_seq_len: int | None = None
    cache_bytes: int | None = None
    command: str = ""


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

    def run(
        self, documents: Sequence[Document], sources: LiveSources | SavedSources, manifest: Manifest, with_cost: bool
    ) -> Findings:
        """Every phase, one after the other."""
        samples = [
            Sample(document, sources.prompt(document) or make_prompt(self.llm.text, document, self.max_new_tokens))
            for document in documents
        ]
        with sources.open("original") as (reference, layers_of):
            samples = self.continue_samples(samples, reference)
            original = self.compare("original", samples, reference)
            layers = self.layers("original", samples[0], layers_of)
        with sources.open("as_built") as (reference, layers_of):
            as_built = self.compare("as_built", samples, reference)
            layers += self.layers("as_built", samples[0], layers_of)
        answers = self.answer([sample for sample in samples if sample.prompt.continues])
        costs = self.costs(manifest, samples, sources) if with_cost else []
        return Findings(samples, original, as_built, tuple(layers), answers, tuple(costs))

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

        Against what was meant, the engine computes with float32 activations, see ``float_activations.py``.
        """

        @cache
        def engine() -> Engine:
            return self._open(float_activations=phase == "as_built")

        def comparison(sample: Sample) -> dict[str, Any]:
            token_ids = sample.token_ids
            expected = timed(iter(reference().logits(token_ids)), self.seconds, "reference")
            found = timed(engine_logits(engine(), token_ids), self.seconds, "engine")
            result = compare_sequence(expected, found, token_ids)
            positions = {f.name: getattr(result.positions, f.name).tolist() for f in fields(Positions)}
            return {"positions": positions, "worst": result.worst, "pairs": result.pairs}

        label = {"original": "compare with the original", "as_built": "compare with what was meant"}[phase]
        return [self._do(phase, sample, comparison) for sample in self._progress(label, samples)]

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


def assess(engine_directory: Path, report_directory: Path, options: AssessOptions) -> Report:
    """Compare the engine with its references and judge it.

    Raises:
        EngineError: the engine cannot be opened or run.
        CheckpointError: the checkpoint is gone, was changed, or cannot be loaded.
        RequestError: the data set, thresholds, journal or saved reference are not what they should be.
    """
    started = time.perf_counter()
    manifest = Manifest.read(engine_directory)
    if options.max_seq_len is not None:
        manifest = with_limit(manifest, options.max_seq_len)
    thresholds = chosen_thresholds(manifest, options)
    baseline = Report.read(options.baseline) if options.baseline else None
    dataset = load_dataset(options.dataset, options.document_field, options.summary_field, options.max_samples)
    threads = options.threads or physical_cores()
    identity = Identity(
        checkpoint=dict(manifest.origin.sha256),
        dataset=dataset.sha256,
        recipe=Recipe.read(engine_directory).with_float_activations().digest,
        options={"max_new_tokens": options.max_new_tokens, "max_seq_len": manifest.limits.max_seq_len},
    )
    sources = find_sources(engine_directory, manifest, threads, identity, dataset.documents, options)
    checks = sources.checks(engine_directory)

    llm = open_llm(engine_directory, threads, options)
    key = {
        "schema": SCHEMA_VERSION,
        "engine": {name: part.sha256 for name, part in manifest.parts.items()},
        "reference": asdict(identity) | {"kind": type(sources).__name__},
    }
    with Journal(report_directory / "progress.jsonl", key, options.resume) as journal:
        work = Assessment(engine_directory, threads, llm, journal, options.max_new_tokens)
        found = work.run(dataset.documents, sources, manifest, with_cost=options.cost)
    if options.save_reference and isinstance(sources, LiveSources):
        cost = next((cost for cost in found.costs if cost.side == "reference"), None)
        sources.save(options.save_reference, identity, found.prompts, cost)
    texts = found.texts(llm.text)
    metrics = found.metrics(texts)
    positions = found.original_positions
    report = Report(
        schema_version=SCHEMA_VERSION,
        engine=engine_info(engine_directory, manifest),
        checkpoint=sources.checkpoint,
        dataset=DatasetInfo(dataset.name, dataset.sha256, len(positions), sum(len(each.kl) for each in positions)),
        versions={"qwen-engine": __version__, **{name: version(name) for name in VERSIONED}},
        command=options.command,
        created=now(),
        seconds={**work.seconds, "all": time.perf_counter() - started},
        metrics=tuple(metrics),
        checks=tuple(checks),
        verdicts=tuple(judge(metrics, thresholds)),
        samples=tuple(found.sample_results(texts)),
        worst=found.worst(llm.tokenizer),
        logits=found.logit_pairs,
        layers=found.layers,
        costs=found.costs,
        baseline=None,
    )
    return replace(report, baseline=compare_baseline(report, baseline)) if baseline else report


def open_llm(engine_directory: Path, threads: int, options: AssessOptions) -> LLM:
    """What answers for the engine."""
    engine = Engine.load(engine_directory, threads, max_seq_len=options.max_seq_len, cache_bytes=options.cache_bytes)
    return LLM(engine)


def find_sources(
    engine_directory: Path,
    manifest: Manifest,
    threads: int,
    identity: Identity,
    documents: Sequence[Document],
    options: AssessOptions,
) -> LiveSources | SavedSources:
    """Where the references come from: what ``--reference`` kept of ``documents``, else the checkpoint."""
    if options.reference:
        ids = [document.id for document in documents]
        return SavedSources.load(options.reference, identity, Path(manifest.origin.checkpoint).name, ids)
    path = find_checkpoint(manifest, options.checkpoint)
    return LiveSources(manifest, engine_directory, path, threads, record=options.save_reference is not None)


def chosen_thresholds(manifest: Manifest, options: AssessOptions) -> tuple[Threshold, ...]:
    """The thresholds the options ask for; with ``--check`` alone those of the engine's coarsest rounding.

    Raises:
        RequestError: a threshold does not parse.
    """
    chosen: tuple[Threshold, ...] = ()
    if options.thresholds:
        chosen = load_thresholds(options.thresholds)
    elif options.check:
        chosen = THRESHOLDS[coarsest_scheme(manifest)]
    return (*chosen, *map(parse_threshold, options.threshold))


def coarsest_scheme(manifest: Manifest) -> str:
    """The scheme with the fewest bits; a float engine with a float16 cache is held to what int8 is."""
    coarsest = min((linear.quantization for linear in manifest.linears), key=lambda quantization: quantization.bits)
    return "int8" if coarsest.scheme == "none" and manifest.cache.dtype != "float32" else coarsest.scheme


def engine_info(directory: Path, manifest: Manifest) -> EngineInfo:
    """The engine as the report names it."""
    weights: Counter[str] = Counter()
    for linear in manifest.linears:
        if linear.name.startswith("model.layers."):
            weights[_scheme_words(linear.quantization)] += linear.in_features * linear.out_features
    words = "; ".join(
        kind if len(weights) == 1 else f"{count / weights.total():.0%} of the layers' weights {kind}"
        for kind, count in weights.most_common()
    )
    head = next(record for record in manifest.linears if record.name == HEAD).quantization
    words += f"; head {head.scheme if head.group_size else 'float32'}; {manifest.cache.dtype} cache"
    parts = manifest.parts
    size_bytes = sum(part.size_bytes for part in parts.values())
    sha256 = {name: part.sha256 for name, part in parts.items()}
    return EngineInfo(directory.resolve().name, str(directory), words, size_bytes, sha256)


def _scheme_words(stored: Quantization) -> str:
    if not stored.group_size:
        return "float32"
    grid = "symmetric" if stored.symmetric else "asymmetric"
    scales = f"groups of {stored.group_size}" if stored.weight_scales == "group" else f"per {stored.weight_scales}"
    return f"{stored.scheme}, {scales}, {grid}, {stored.activation_words} activations"
