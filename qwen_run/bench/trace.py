"""When requests arrive and how long they are: a CSV, or a number of them at once."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from qwen_engine.errors import RequestError
from qwen_engine.regular_files import read_regular

SAMPLE_TRACE = Path(__file__).parent / "data" / "sample_trace.csv"

# The columns of a trace: our own names, and those of the traces Azure publishes of its language models.
COLUMNS = (("arrival_s", "input_tokens", "output_tokens"), ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))


@dataclass(frozen=True)
class Arrival:
    """A request that comes ``arrived_s`` seconds after the start, with so many tokens, and asks for so many."""

    arrived_s: float
    input_tokens: int
    output_tokens: int


def at_once(count: int, input_tokens: int, output_tokens: int) -> list[Arrival]:
    """``count`` equal requests at the start."""
    return [Arrival(0.0, input_tokens, output_tokens)] * count


def read_trace(path: Path, most: int | None = None) -> list[Arrival]:
    """The requests of a CSV in order of arrival, the first at 0 s.

    The first line names the columns, in any order, others are ignored: ``arrival_s`` (seconds, or a date and time of
    ISO 8601), ``input_tokens``, ``output_tokens``; or ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``.

    Args:
        most: read no more requests than the first so many.

    Raises:
        RequestError: the file cannot be read, lacks a column or a request, or holds something else than numbers.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_regular(path).decode("utf-8-sig"), newline=""))
        found = reader.fieldnames or ()
        columns = next((names for names in COLUMNS if set(names) <= set(found)), None)
        if columns is None:
            wanted = " or ".join(",".join(names) for names in COLUMNS)
            raise RequestError(f"{path} has columns {','.join(found)[:80]!r}, expected {wanted}")
        arrivals: list[Arrival] = []
        for row in reader:
            if len(arrivals) == most:
                break
            arrivals.append(_arrival([row[name] for name in columns], f"{path}:{reader.line_num}"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}; choose another --trace") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{path} is no CSV in UTF-8: {error}; choose another --trace") from error
    if not arrivals:
        raise RequestError(f"{path} has no requests, expected one a line")
    arrivals.sort(key=lambda arrival: arrival.arrived_s)
    return [replace(arrival, arrived_s=arrival.arrived_s - arrivals[0].arrived_s) for arrival in arrivals]


def mean_rate(arrivals: Sequence[Arrival]) -> float | None:
    """Requests a second between the first and the last; None where all come at once."""
    span_s = arrivals[-1].arrived_s - arrivals[0].arrived_s
    return (len(arrivals) - 1) / span_s if span_s > 0 else None


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same requests, their pauses stretched so that ``rate`` come each second.

    Raises:
        RequestError: all come at once, which no stretching changes.
    """
    own_rate = mean_rate(arrivals)
    if own_rate is None:
        raise RequestError("all requests of the trace arrive at once; leave out --rate, or use a trace with pauses")
    return [replace(arrival, arrived_s=arrival.arrived_s * own_rate / rate) for arrival in arrivals]


def _arrival(cells: Sequence[str | None], where: str) -> Arrival:
    moment, input_tokens, output_tokens = (cell or "" for cell in cells)
    try:
        arrival = Arrival(_seconds(moment), int(input_tokens), int(output_tokens))
        if arrival.input_tokens >= 1 and arrival.output_tokens >= 1 and abs(arrival.arrived_s) < float("inf"):
            return arrival
    except ValueError:
        pass
    raise RequestError(
        f"{where} is {moment!r}, {input_tokens!r}, {output_tokens!r}; "
        "expected seconds or a date and time, and two whole numbers from 1"
    )


def _seconds(moment: str) -> float:
    try:
        return float(moment)
    except ValueError:
        return datetime.fromisoformat(moment).timestamp()
