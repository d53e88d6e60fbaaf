"""The table and the plot of a match of programs: medians, ratios, and shares of what the machine can do."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.int8_peak import int8_peak
from benchmarks.peer_environments import PACKAGES
from benchmarks.peer_match import BEFORE, CONTENDERS, QUESTION, Match, Measured, Models, Row
from qwen_engine import __version__
from qwen_engine.manifest import Manifest
from qwen_run.bench.measure import processor_name
from qwen_run.bench.sides import engine_reads
from qwen_run.engine_files.weights import EMBEDDING
from qwen_run.reports import svg
from qwen_run.reports.plots import stacked


def report(arguments: argparse.Namespace, match: Match, rows: Mapping[str, Row], drawing: str, stem: str) -> None:
    """Print the table with its conditions, and write both to ``--output``."""
    found, label = match.found, Path(arguments.checkpoint).name
    versions = {"qwen-engine": __version__, "onnxruntime": metadata.version("onnxruntime")}
    versions |= {program: version for program, version in found.versions.items() if program not in ("engine", BEFORE)}
    limits = [f"fastest read {median_of(found.bandwidths) / 1e9:.1f} GB/s"] if found.bandwidths else []
    if found.peaks and (peak := int8_peak(arguments.threads)):
        limits.append(f"int8 peak {median_of(found.peaks) / 1e12:.2f} TOPS ({peak[0]})")
    conditions = [
        label, f"{datetime.now(UTC):%Y-%m-%d}", processor_name(), f"{arguments.threads} threads",
        f"{arguments.activations} activations", f"median of {arguments.rounds} rounds", *limits,
    ]  # fmt: skip
    parts = [
        ", ".join(conditions),
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Share of the limit: the fastest read for decode, the peak of int8 products for prefill and many requests.",
        markdown_table(rows, found, shares_of_limit(rows, found, match.models)),
    ]
    if any(found.answers.values()):  # random weights answer with nothing that is text
        answers = [f"- {name}: {answer!r}" for name, answer in found.answers.items()]
        parts.append("\n".join([f"{QUESTION!r} is continued by", *answers]))
    text = "\n\n".join(parts) + "\n"
    name = f"{stem}-{label}{'' if arguments.activations == 'int8' else f'-{arguments.activations}'}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.md").write_text(text, encoding="utf-8")
    (arguments.output / f"{name}.svg").write_text(drawing, encoding="utf-8")
    print(text)


def best_of(program: str, row: Row, values: Mapping[str, Sequence[float]]) -> tuple[str, float] | None:
    """The contender of ``program`` with the best median in a row, and that median; None where none was measured."""
    better: Callable[..., tuple[str, float]] = max if row.amount else min
    medians = {name: statistics.median(found) for name, found in values.items() if CONTENDERS[name].program == program}
    return better(medians.items(), key=lambda item: item[1]) if medians else None


def markdown_table(rows: Mapping[str, Row], found: Measured, shares: Mapping[str, float]) -> str:
    """One line a row: the best of every program, ours over what the goal names and over the best peer, our share."""
    programs = ["engine", *(program for program in (BEFORE, *PACKAGES) if program in found.versions)]
    lines = [
        f"| | {' | '.join(programs)} | engine over | goal | share of the limit |",
        "|---" * (len(programs) + 4) + "|",
    ]
    for name, values in found.values.items():
        row = rows[name]
        best = {program: best_of(program, row, values) for program in programs}
        cells = [_cell(item, len([n for n in values if CONTENDERS[n].program == p]) > 1) for p, item in best.items()]
        ratio = "; ".join(_ratios(row, best["engine"], values))
        share = f"{shares[name]:.0%}" if name in shares else ""
        title = f"{row.title}, {row.unit}" if row.amount else row.title
        lines.append(f"| {title} | {' | '.join(cells)} | {ratio} | {row.goal} | {share} |")
    return "\n".join(lines)


def _ratios(row: Row, ours: tuple[str, float] | None, values: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """Our rate over that of the best contender that the goal names, and over that of the best peer if it is another."""
    if ours is None or row.amount is None:
        return
    others = {n: statistics.median(found) for n, found in values.items() if CONTENDERS[n].program != "engine"}
    peers = {name: rate for name, rate in others.items() if CONTENDERS[name].program != BEFORE}
    named = [name for name in row.against if name in peers]
    for name in others.keys() - peers.keys():
        yield f"{name} {ours[1] / others[name]:.2f} ×"
    for name in dict.fromkeys(max(names, key=peers.__getitem__) for names in (named, peers) if names):
        yield f"{name} {ours[1] / peers[name]:.2f} ×"


def _cell(best: tuple[str, float] | None, several: bool) -> str:
    if best is None:
        return ""
    name, value = best
    note = f" ({CONTENDERS[name].note})" if several and CONTENDERS[name].note else ""
    return f"{value:.3g}{note}" if value < 100 else f"{value:.0f}{note}"


def shares_of_limit(rows: Mapping[str, Row], found: Measured, models: Models) -> dict[str, float]:
    """Row -> what our engine must read or multiply a second, over what the machine can in the same rounds."""
    shares = {}
    for name, values in found.values.items():
        row = rows[name]
        ours = best_of("engine", row, values)
        if ours is None or row.amount is None:
            continue
        manifest = Manifest.read(models.path(CONTENDERS[ours[0]].model))
        if row.limit == "memory":
            work, limits = bytes_read(manifest, row.command), found.bandwidths
        else:
            work, limits = operations(manifest, row.command), found.peaks
        if name in limits:
            shares[name] = ours[1] / row.amount * work / statistics.median(limits[name])
    return shares


def bytes_read(manifest: Manifest, command: Mapping[str, Any]) -> float:
    """By a whole ``decode`` command, from memory."""
    reads = engine_reads(manifest)
    context = command["past"] + (command["count"] + 1) / 2
    return float(command["count"] * (reads.weight_bytes + context * reads.cache_bytes_per_token))


def operations(manifest: Manifest, command: Mapping[str, Any]) -> float:
    """Products and sums of a whole ``prefill`` or ``batch`` command, without attention."""
    if command["do"] == "prefill":
        tokens, logits = command["length"], 1
    else:
        tokens = command["requests"] * (command["prompt_length"] + command["new"] - 1)
        logits = command["requests"] * command["new"]
    elements = {linear.name: linear.in_features * linear.out_features for linear in manifest.linears}
    head = elements.pop("lm_head")
    del elements[EMBEDDING]
    return float(2 * (tokens * sum(elements.values()) + logits * head))


def plot(rows: Mapping[str, Row], found: Measured, notes: Sequence[str] = ()) -> str:
    """Bars of every row of rates, one drawing below the other; the longest of each is the best.

    Args:
        notes: on which machine, when.
    """
    drawings = []
    for name, values in found.values.items():
        row = rows[name]
        if row.amount:
            medians = {contender: statistics.median(each) for contender, each in values.items()}
            bars = [
                (contender, median / max(medians.values()), f"{median:.0f}") for contender, median in medians.items()
            ]
            drawings.append(svg.bars(row.title, bars, f"{row.title}, {row.unit}: % of the best"))
    return stacked(drawings, "Output of programs, in per cent of the best", notes)


def machine_notes(threads: int) -> list[str]:
    """Where and when something is measured, for below its plot."""
    return [f"{processor_name()}, {threads} threads, {datetime.now(UTC):%Y-%m-%d}"]


def median_of(rounds: Mapping[str, Sequence[float]]) -> float:
    """Over the rounds of all rows."""
    return statistics.median(value for values in rounds.values() for value in values)
