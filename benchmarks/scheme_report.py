"""The table and the plot of ``benchmarks.schemes``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.command import paragraph
from qwen_run.reports.plots import scatter_plot

# A quantised weight nearer than this to the checkpoint's (relative rms; rounding a scale to float16 alone makes 2e-4)
# says that the checkpoint lies on that very grid, not that the scheme is good.
SAME_GRID = 1e-3

DEFINITIONS = """\
KL: mean over positions of KL(float || engine), natural logarithm, in float64. top-1: share of positions where both put
the same token first (or tie within 1e-4). ppl: perplexity; ratio: over the float model's, on the same windows. In
parentheses 95 % intervals, bootstrapped over windows. weights: relative rms of the layers' stored weights; none where
columns were scaled along with what goes into them. MB: all files; bits: of a weight, everything counted. KL of
summaries: on requests for a summary and the float model's answer to them; ROUGE-L: of the engine's own answer and a
person's summary. prefill: a prompt of 512 tokens; decode: 64 tokens after it, one at a time; medians of rounds in which
all schemes run in turn. build: seconds, calibration included."""


def family(name: str) -> str:
    """The series of the plot that a scheme belongs to."""
    if name.startswith("int4"):
        return next((f"int4 {method}" for method in ("awq", "gptq", "auto") if f" {method}" in name), "int4 rtn")
    return name.split()[0].rstrip(",")


def table_lines(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The lines of a Markdown table, a row a scheme."""
    summaries = any("summaries.kl_mean" in result["metrics"] for result in results.values())
    head = ["scheme", "MB", "bits", "KL", "top-1", "ppl", "ratio", "weights"]
    head += ["KL of summaries", "ROUGE-L"] * summaries
    head += ["prefill tok/s", "decode tok/s", "build s"]
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for name, result in results.items():

        def metric(name: str, digits: str, metrics: dict[str, Any] = result["metrics"]) -> str:
            value, low, high = metrics[name]
            interval = "" if low == high else f" ({low:{digits}} to {high:{digits}})"
            return f"{value:{digits}}{interval}"

        error = result["weight_error"]
        cells = [name + " *" * is_same_grid(name, result), f"{result['bytes'] / 1e6:.1f}", f"{result['bits']:.2f}"]
        cells += [metric("original.kl_mean", ".2e"), f"{result['metrics']['original.top1'][0]:.2%}"]
        cells += [metric("original.perplexity", ".2f"), metric("original.perplexity_ratio", ".4f")]
        cells += ["" if error is None else f"{error:.2e}"]
        if summaries:
            cells += [metric("summaries.kl_mean", ".2e"), f"{result['metrics']['summaries.rougeL'][0]:.3f}"]
        speed = result.get("speeds")
        cells += [f"{speed[0]:.0f}", f"{speed[1]:.1f}"] if speed else ["", ""]
        cells += [f"{result['build_s']:.0f}"]
        yield f"| {' | '.join(cells)} |"


def is_same_grid(name: str, result: dict[str, Any]) -> bool:
    """Whether a quantised engine has the weights of the checkpoint, which then lie on its grid."""
    error = result["weight_error"]
    return error is not None and error < SAME_GRID and family(name) != "float32"


def plot(results: dict[str, dict[str, Any]]) -> str:
    """KL against size, without the float engine and what is not a result: SVG."""
    series: dict[str, list[tuple[float, float]]] = {}
    for name, result in results.items():
        if family(name) != "float32" and not is_same_grid(name, result):
            point = (result["bytes"] / 1e6, result["metrics"]["original.kl_mean"][0])
            series.setdefault(family(name), []).append(point)
    return scatter_plot(
        "KL to the float model against size", "MB", "KL, nats", series, [f"{datetime.now(UTC):%Y-%m-%d}"]
    )


def write_report(path: Path, head: str, results: dict[str, Any], failed: dict[str, str]) -> None:
    """The table, what it means and what could not be built, to ``path``, and the plot beside it."""
    notes = [DEFINITIONS]
    if any(is_same_grid(*row) for row in results.items()):
        notes.append("\\* Not a result: the checkpoint's weights lie on this grid already, rounding loses nothing.")
    notes += [f"Not built: {name}: {message}" for name, message in failed.items()]
    lines = [paragraph(head), "", *table_lines(results), "", *("\n\n".join(notes).splitlines())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if any(family(name) != "float32" for name in results):
        path.with_suffix(".svg").write_text(plot(results), encoding="utf-8")
