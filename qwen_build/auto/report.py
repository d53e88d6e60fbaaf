"""What ``--quant auto`` chose and why: a page that stands beside the engine's other parts, and figures for programs."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_build.auto.sensitivity import Unit
from qwen_build.plan.options import BuildOptions
from qwen_run.reports.html_page import STYLE
from qwen_run.reports.plots import scatter_plot

# Parts of the engine: a file for --quant-config that makes it again, and the page.
CHOICES_FILE, REPORT_FILE = "quant-config.json", "auto.html"

# Points of the plotted front.
_FRONT_POINTS = 60


@dataclass(frozen=True)
class Trial:
    """An engine that was built and measured.

    Attributes:
        choice: the index of each unit's scheme.
        predicted_kl: the sum of what its units were predicted to cause; all KLs are means over tokens, in nats.
        calibration_kl, held_out_kl: measured on either text.
        size_bytes: of all its files.
    """

    choice: tuple[int, ...]
    predicted_kl: float
    calibration_kl: float
    held_out_kl: float
    size_bytes: int

    @property
    def kl(self) -> float:
        """The larger one of the measured; NaN if one is: no budget allows that."""
        return float(np.max([self.calibration_kl, self.held_out_kl]))


@dataclass(frozen=True)
class AutoReport:
    """The outcome of a search.

    Attributes:
        kl: predicted of each unit and each of its schemes.
        best: the one of ``trials`` that was taken.
        budget: what was asked for, in words.
        held_out: what ``held_out_tokens`` tokens of it were measured, in words.
        rebuild: the command that makes the engine again, without a search.
    """

    name: str
    units: Sequence[Unit]
    kl: Sequence[Sequence[float]]
    best: Trial
    trials: Sequence[Trial]
    budget: str
    held_out: str
    held_out_tokens: int
    rebuild: str

    def summary(self) -> dict[str, Any]:
        """The figures, for programs."""
        return {
            "budget": self.budget,
            "held_out_kl": self.best.held_out_kl,
            "calibration_kl": self.best.calibration_kl,
            "predicted_kl": self.best.predicted_kl,
            "held_out": self.held_out,
            "held_out_tokens": self.held_out_tokens,
            "trials": len(self.trials),
            "page": REPORT_FILE,
            "rebuild": self.rebuild,
        }


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def rebuild_command(options: BuildOptions, source: str, choices: Path) -> str:
    """What a user types to build with ``options`` again, their ``quant_config`` in the file ``choices``."""
    command = ["qwen-build", source, "--quant-config", str(choices)]
    names = ("activations", "kv_cache_dtype", "max_seq_len", "int4_method", "calibration", "calibration_tokens")
    given = {"kernels": options.kernels} | {name: getattr(options, name) for name in names}
    for name, value in given.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(command)


def to_html(report: AutoReport) -> str:
    """The page, which needs nothing else."""
    units = [
        (unit.name, unit.schemes[i].record.words, f"{unit.stored_bytes(unit.schemes[i]) / 1e6:.3f}", f"{kl[i]:.2e}")
        for unit, kl, i in zip(report.units, report.kl, report.best.choice, strict=True)
    ]
    trials = [
        (megabytes(t.size_bytes), f"{t.predicted_kl:.3e}", f"{t.calibration_kl:.3e}", f"{t.held_out_kl:.3e}")
        for t in report.trials
    ]
    content = [
        f"<h1>{html.escape(report.name)}: {html.escape(report.budget)}</h1>",
        f"<p>The mean KL of this engine is {report.best.held_out_kl:.3g} on {report.held_out_tokens:,} tokens of "
        f"{html.escape(report.held_out)}, and {report.best.calibration_kl:.3g} on calibration text.</p>",
        "<p>KL is the mean over tokens of KL(float model || engine), in nats. That of a linear is predicted from a "
        "probe in which it alone was rounded; those of an engine's linears add up to its prediction. As predictions "
        "are some percent off, every engine below was built and measured.</p>",
        f"<p>The same engine without a search:</p><pre>{html.escape(report.rebuild)}</pre>",
        f"<figure>{_front(report)}</figure>",
        "<h2>Engines built</h2>" + _table(("size", "KL predicted", "calibration text", "held-out text"), trials),
        "<h2>What was chosen</h2>" + _table(("linear", "stored as", "MB", "KL predicted"), units),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(report.name)}: what --quant auto chose</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(content)
        + "\n</body>\n</html>\n"
    )


def _front(report: AutoReport) -> str:
    """KL against size: the best that can be chosen, one scheme for everything, and what was measured."""
    sizes = [np.array([unit.stored_bytes(scheme) for scheme in unit.schemes]) for unit in report.units]
    kl = [np.array(one) for one in report.kl]
    rest = report.best.size_bytes - sum(int(one[i]) for one, i in zip(sizes, report.best.choice, strict=True))

    def point(choice: Sequence[int]) -> tuple[float, float]:
        size = rest + sum(int(one[i]) for one, i in zip(sizes, choice, strict=True))
        return size / 1e6, float(sum(one[i] for one, i in zip(kl, choice, strict=True)))

    # Each price of a nat, in bytes, has the choice that costs least; together they are the front's convex corners.
    prices = np.geomspace(1e-3, 1e6, _FRONT_POINTS) * sum(one.max() for one in sizes)
    front = [[int(np.argmin(size + price * one)) for size, one in zip(sizes, kl, strict=True)] for price in prices]
    many = max(map(len, kl))
    uniform = [[i if len(one) == many else 0 for one in kl] for i in range(many)]
    series = {
        "best choices, predicted": [point(choice) for choice in front],
        "one scheme for all, predicted": [point(choice) for choice in uniform],
        "measured on held-out text": [(trial.size_bytes / 1e6, trial.held_out_kl) for trial in report.trials],
    }
    positive = {name: [pair for pair in pairs if pair[1] > 0] for name, pairs in series.items()}
    return scatter_plot("KL against the engine's size", "engine, MB", "KL, nats", positive)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(head, "th")}</thead>\n<tbody>\n{body}\n</tbody></table></div>'
