"""Which check of `qwen-summarize --check` finds which fault: a table, for every scheme.

    python -m benchmarks.gate_faults --output build/gate             # random models of two sizes
    python -m benchmarks.gate_faults --output build/gate --checkpoint DIR --schemes int8 int4

Healthy engines come first and have to pass. Then every fault of `benchmarks.plant_faults` is planted in a copy of each,
and the gate runs again on six documents. A cell names what failed: a check by its name, a threshold by its metric. A
fault that the comparison of the weights names is not run. The exit code is 1 where a healthy engine fails, or a fault
is not found that changes answers.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.command import run, say
from benchmarks.gate_models import CONFIGS, SCHEMES, build_engine, make_checkpoint
from benchmarks.plant_faults import FILE_FAULTS, KERNEL_FAULTS, OF_ROUNDED_INPUTS, plant, wrong_kernel
from qwen_engine.json_output import now
from qwen_run.accuracy.assess import AssessOptions, assess
from qwen_run.accuracy.report import Report
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.bench.measure import processor_name

# Faults that leave answers as they are: where int8 is rounded to the nearest they are seen all the same.
HARMLESS = ("scales of a block to bfloat16",)
DOCUMENTS, NEW_TOKENS = 6, 8


def judge(engine: Path, checkpoint: Path, directory: Path, reference: Path | None = None) -> Report:
    """Run the gate; with ``reference``, beside what was saved there."""
    options = AssessOptions(
        checkpoint=str(checkpoint), max_samples=DOCUMENTS, max_new_tokens=NEW_TOKENS, check=True, cost=False, threads=1,
        reference=reference, save_reference=None if reference else directory / "reference.npz",
    )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    return assess(engine, directory, options)


def complaints(report: Report) -> list[str]:
    """What failed, and what could not be decided with a question mark behind it."""
    failed = [check.name for check in report.checks if not check.passed]
    found = {"failed": "", "undecided": "?"}
    metrics = [v.threshold.metric + found[v.outcome] for v in report.verdicts if v.outcome in found]
    return [*failed, *dict.fromkeys(metrics)]


class Bench:
    """A checkpoint and its engines, each tried with every fault.

    Attributes:
        cells: (fault, scheme) -> what was found; None where the fault is none to the scheme.
        seconds: scheme -> how long the gate took on the healthy engine, the reference's side computed.
    """

    def __init__(self, checkpoint: Path, directory: Path, name: str) -> None:
        self.checkpoint, self.directory, self.name = checkpoint, directory, name
        self.cells: dict[tuple[str, str], list[str] | None] = {}
        self.seconds: dict[str, float] = {}

    def try_scheme(self, scheme: str, faults: list[str]) -> list[str]:
        """Fill the column of ``scheme``; what the gate says of the healthy engine."""
        engine = self.directory / scheme
        if not engine.exists():
            build_engine(self.checkpoint, scheme, engine)
        place = self.directory / "reports" / scheme
        started = time.perf_counter()
        healthy = complaints(judge(engine, self.checkpoint, place))
        self.seconds[scheme] = time.perf_counter() - started
        say(f"{self.name}, {scheme}: healthy {healthy or 'passed'}")
        for fault in faults:
            self.cells[fault, scheme] = self._try(fault, scheme, engine, place / "reference.npz")
            say(f"{self.name}, {scheme}: {fault}: {self.cells[fault, scheme]}")
        return healthy

    def _try(self, fault: str, scheme: str, engine: Path, reference: Path) -> list[str] | None:
        with tempfile.TemporaryDirectory(dir=self.directory) as name:
            directory = Path(name)
            if fault in KERNEL_FAULTS:
                if fault in OF_ROUNDED_INPUTS and scheme == "none":
                    return None
                with wrong_kernel(KERNEL_FAULTS[fault]):
                    return complaints(judge(engine, self.checkpoint, directory / "report", reference))
            copy = Path(shutil.copytree(engine, directory / "engine"))
            plant(fault, copy)
            if not compare_weights(copy, self.checkpoint).passed:
                return ["weights"]
            return complaints(judge(copy, self.checkpoint, directory / "report"))


def healthy_table(bench: Bench, healthy: Mapping[str, list[str]]) -> Iterator[str]:
    """Markdown: a row a scheme, what the gate says of its engine as it is, and how long that took."""
    yield from ("| healthy engine | the gate says | s |", "|---|---|---|")
    for scheme, found in healthy.items():
        yield f"| {scheme} | {', '.join(found) or 'passed'} | {bench.seconds[scheme]:.0f} |"


def table(bench: Bench, schemes: list[str], faults: list[str]) -> str:
    """Markdown: a row a fault, a column a scheme."""

    def cell(fault: str, scheme: str) -> str:
        found = bench.cells.get((fault, scheme))
        if found is None:
            return "–"
        harmless = "not seen, harmless" if fault in HARMLESS else "**not seen**"
        return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "") or harmless

    rows = [["fault", *schemes], ["---"] * (1 + len(schemes))]
    rows += [[fault, *(cell(fault, scheme) for scheme in schemes)] for fault in faults]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def is_found(bench: Bench, fault: str, scheme: str) -> bool:
    """Whether something failed; what is undecided is not found."""
    found = bench.cells.get((fault, scheme))
    return found is None or fault in HARMLESS or any(not name.endswith("?") for name in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for checkpoints, engines, reports")
    parser.add_argument("--sizes", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="random models")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="this in place of random models")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of random models")
    parser.add_argument("--faults", nargs="*", metavar="FAULT", help="some in place of all; none: healthy engines only")
    arguments = parser.parse_args()
    faults = [*FILE_FAULTS, *KERNEL_FAULTS] if arguments.faults is None else arguments.faults
    print(f"What failed for which fault; {DOCUMENTS} documents; {now()[:10]}, {processor_name()}\n")
    bad = []
    named = [(f"{size}-{seed}", size, seed) for size in arguments.sizes for seed in arguments.seeds]
    for name, size, seed in [(arguments.checkpoint.name, "", 0)] if arguments.checkpoint else named:
        directory = arguments.output / name
        checkpoint = arguments.checkpoint or directory / "checkpoint"
        if not checkpoint.exists():
            make_checkpoint(size, seed, checkpoint)
        bench = Bench(checkpoint, directory, name)
        healthy = {scheme: bench.try_scheme(scheme, faults) for scheme in arguments.schemes}
        print(f"## {name}\n", flush=True)
        print("\n".join(healthy_table(bench, healthy)))
        if faults:
            print("\n" + table(bench, arguments.schemes, faults), flush=True)
        bad += [f"{name}, {scheme}: a healthy engine" for scheme, found in healthy.items() if found]
        bad += [f"{name}, {s}: {f}" for f in faults for s in arguments.schemes if not is_found(bench, f, s)]
    if bad:
        sys.exit("Not as it should be: " + "; ".join(bad))


if __name__ == "__main__":
    run(main)
