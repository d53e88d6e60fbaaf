"""The files of a report: one table of names and makers, one function that writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qwen_engine.errors import RequestError
from qwen_run.accuracy.report import Report
from qwen_run.reports.ci import to_junit, to_markdown
from qwen_run.reports.html_page import to_html

FILES: dict[str, Callable[[Report], str]] = {
    "report.json": Report.to_json,
    "report.md": to_markdown,
    "report.xml": to_junit,
    "report.html": to_html,
}


def write_report(report: Report, directory: Path) -> list[Path]:
    """Write every file of :data:`FILES` into ``directory``, made if need be; earlier ones are replaced, each at once.

    Raises:
        RequestError: the directory cannot be made or written to.
    """
    texts = {name: make(report) for name, make in FILES.items()}
    unfinished = {name: directory / f".{name}.{os.getpid()}.tmp" for name in FILES}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, path in unfinished.items():
            # Text of a model may hold half a surrogate pair, which no UTF-8 file can.
            path.write_bytes(texts[name].encode("utf-8", errors="replace"))
        for name, path in unfinished.items():
            path.replace(directory / name)
    except OSError as error:
        raise RequestError(
            f"{directory}: the report cannot be written: {error.strerror}; give another --report"
        ) from error
    finally:
        for path in unfinished.values():
            with suppress(OSError):
                path.unlink()
    return [directory / name for name in FILES]
