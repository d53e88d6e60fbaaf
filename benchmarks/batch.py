"""How output tokens a second grow with the number of requests at once, beside the peers that batch.

    python -m benchmarks.batch --venv build/peers-venv
    python -m benchmarks.batch --venv build/peers-venv --checkpoint demo --batch 1,4,16 --rounds 3

Every request has a prompt of 128 random tokens and 64 new ones; the time is from the first prompt to the last token.
What is measured and how is said in ``benchmarks/peers.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.command import run
from benchmarks.peer_match import Row
from benchmarks.peer_report import machine_notes, report
from benchmarks.peers import OPENVINO, common_arguments, set_up
from qwen_run.reports.plots import line_plot

PROMPT, NEW = 128, 64


def make_rows(counts: Sequence[int]) -> dict[str, Row]:
    """A row of the table for each number of requests at once."""
    return {
        str(count): Row(
            f"{count} at once", {"do": "batch", "requests": count, "prompt_length": PROMPT, "new": NEW},
            count * NEW, "output tok/s", ("engine", "llama.cpp", *OPENVINO), ("llama.cpp",), limit="compute",
        )
        for count in counts
    }  # fmt: skip


def main() -> None:
    parser = common_arguments(__doc__ or "")
    parser.add_argument("--batch", default="1,2,4,8,16,32", help="requests at once, with commas")
    arguments = parser.parse_args()
    rows = make_rows([int(count) for count in arguments.batch.split(",")])
    match = set_up(arguments)
    series: dict[str, list[tuple[float, float]]] = {}
    for count, values in match.play(rows).values.items():
        for contender, rates in values.items():
            series.setdefault(contender, []).append((float(count), statistics.median(rates)))
    title, notes = "Output tokens a second against requests at once", machine_notes(arguments.threads)
    drawing = line_plot(title, "requests at once", "output tok/s", series, notes)
    report(arguments, match, rows, drawing, "batch")


if __name__ == "__main__":
    run(main)
