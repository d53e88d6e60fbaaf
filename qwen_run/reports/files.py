"""The files of a report: one table of names and makers, one function that writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from qwen_engine.errors import RequestError
from qwen_engine.whole_files import whole_file
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
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files:
            for name, text in reversed(texts.items()):  # the last one entered is the first that is renamed
                file = files.enter_context(whole_file(Path(os.path.realpath(directory / name))))
                # Text of a model may hold half a surrogate pair, which no UTF-8 file can.
                file.write(text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise RequestError(
            f"{directory}: the report cannot be written: {error.strerror}; give another --report"
        ) from error
    return [directory / name for name in FILES]
