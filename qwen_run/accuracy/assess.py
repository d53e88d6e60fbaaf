"""One engine judged: what is compared with what, the metrics, the verdicts, the report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from qwen_engine import __version__
from qwen_engine.graph_io import HEAD
from qwen_engine.json_output import now
from qwen_engine.manifest import Manifest, Quantization
from qwen_engine.tasks import GENERATE, check_task
from qwen_run.accuracy.datasets import Document, load_dataset
from qwen_run.accuracy.gate import Threshold, healthy_thresholds, judge, load_thresholds, parse_threshold
from qwen_run.accuracy.journal import Journal
from qwen_run.accuracy.phases import Assessment
from qwen_run.accuracy.recipe import Recipe
from qwen_run.accuracy.reference_sources import LiveSources, SavedSources, find_checkpoint
from qwen_run.accuracy.report import (
    SCHEMA_VERSION,
    DatasetInfo,
    EngineInfo,
    Report,
    compare_baseline,
)
from qwen_run.accuracy.run_checks import checks
from qwen_run.accuracy.saved_reference import Identity
from qwen_run.api.llm import LLM
from qwen_run.runtime.capacity import with_limit
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.machine import physical_cores

# Packages whose versions the report names.
VERSIONED = ("onnxruntime", "numpy", "tokenizers", "rouge-score")


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


def assess(engine_directory: Path, report_directory: Path, options: AssessOptions) -> Report:
    """Compare the engine with its references and judge it.

    Raises:
        EngineError: the engine cannot be opened or run.
        CheckpointError: the checkpoint is gone, was changed, or cannot be loaded.
        RequestError: the data set, thresholds, journal or saved reference are not what they should be.
    """
    started = time.perf_counter()
    manifest = Manifest.read(engine_directory)
    check_task(manifest.task, GENERATE)
    if options.max_seq_len is not None:
        manifest = with_limit(manifest, options.max_seq_len)
    thresholds = chosen_thresholds(manifest, options)
    baseline = Report.read(options.baseline) if options.baseline else None
    dataset = load_dataset(options.dataset, options.document_field, options.summary_field, options.max_samples)
    threads = options.threads or physical_cores()
    identity = Identity(
        checkpoint=manifest.origin.digests,
        dataset=dataset.sha256,
        recipe=Recipe.read(engine_directory).digest,
        options={"max_new_tokens": options.max_new_tokens, "max_seq_len": manifest.limits.max_seq_len},
    )
    sources = find_sources(engine_directory, manifest, threads, identity, dataset.documents, options)
    checks_of_files = sources.checks(engine_directory)
    llm = open_llm(engine_directory, threads, options)
    key = {
        "schema": SCHEMA_VERSION,
        "engine": {name: part.sha256 for name, part in manifest.parts.items()},
        "reference": asdict(identity) | {"kind": type(sources).__name__},
    }
    with Journal(report_directory / "progress.jsonl", key, options.resume) as journal:
        work = Assessment(engine_directory, threads, llm, journal, options.max_new_tokens)
        with_checks = options.check or options.save_reference is not None
        found = work.run(dataset.documents, sources, manifest, options.cost, with_checks)
    if options.save_reference and isinstance(sources, LiveSources):
        cost = next((cost for cost in found.costs if cost.side == "reference"), None)
        sources.save(options.save_reference, identity, found.prompts, cost)
    positions, metrics = found.original_positions, found.metrics(texts := found.texts(llm.text))
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
        checks=(*checks_of_files, *checks(found, llm.core.engine.manifest, metrics)),
        verdicts=tuple(judge(metrics, thresholds)),
        samples=tuple(found.sample_results(texts)),
        worst=found.worst(llm.tokenizer),
        logits=found.logit_pairs,
        layers=found.layers,
        routers=found.routers,
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
    """The thresholds the options ask for; with ``--check`` alone those of healthy engines that round alike.

    Raises:
        RequestError: a threshold does not parse.
    """
    chosen: tuple[Threshold, ...] = ()
    if options.thresholds:
        chosen = load_thresholds(options.thresholds)
    elif options.check:
        chosen = healthy_thresholds(manifest)
    return (*chosen, *map(parse_threshold, options.threshold))


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
