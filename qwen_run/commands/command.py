"""What every command of this project does alike: one line for a user's mistake, a traceback for ours."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_engine import __version__
from qwen_engine.errors import QwenError
from qwen_engine.manifest import MIN_SEQ_LEN

if TYPE_CHECKING:
    from qwen_run.reports.tables import Table

MIB = 1 << 20
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
ENDING_SIGNALS = ("SIGTERM", "SIGHUP")  # where the system has them

# What a write that finds no room says, in our words.
_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "your quota is used up",
    errno.EFBIG: "a file may not become larger",
}


class Command(click.Command):
    """A click command with ``-h`` and ``--version``, and with ``Error: ...`` and its exit code for a
    :class:`QwenError`.

    Ctrl-C exits 130 without a word, SIGTERM and SIGHUP 128 more than their number, each after everything half-written
    was removed; click itself is as quiet when a reader closes the pipe.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", {"help_option_names": ["-h", "--help"], "show_default": True})
        super().__init__(*args, **kwargs)
        click.version_option(__version__)(self)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _open_closed_streams()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            # Python flushes stdout once more on its way out; let what is still buffered go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            click.echo(f"Error: {_FULL[error.errno]} where the output goes; make room and run again", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _exit_on_signals(), warnings.catch_warnings():
                warnings.showwarning = _note
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
        except QwenError as error:
            click.echo(f"Error: {printable(str(error))}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


class SvgFile(click.Path):
    """The name of a picture, which is always SVG: another ending would promise another format."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if path.suffix.lower() != ".svg":
            self.fail(f"pictures are SVG; name it {path.stem or 'plot'}.svg instead of {path.name}", param, ctx)
        return path


kv_cache_memory_option = click.option(
    "--kv-cache-memory",
    "cache_bytes",
    type=click.IntRange(1, 1 << 30),
    metavar="MIB",
    callback=lambda context, option, mebibytes: mebibytes and mebibytes * MIB,
    help="Memory of the cache of keys and values.  [default: from the free memory]",
)
max_seq_len_option = click.option(
    "--max-seq-len",
    type=click.IntRange(MIN_SEQ_LEN, 1 << 30),
    metavar="TOKENS",
    help="Most tokens of prompt and answer together.  [default: the engine's, as far as the cache's memory goes]",
)
pipeline_parallel_size_option = click.option(
    "--pipeline-parallel-size",
    type=click.IntRange(1),
    metavar="N",
    help="Processes that share the engine's layers, and the memory of each; answers stay the same.  [default: 1]",
)


def printable(text: str) -> str:
    r"""``text`` in one line that cannot drive a terminal: what is not printable is written as its escape.

    >>> print(printable("a\x1b[2J\nb \udcff"))
    a\x1b[2J\nb \udcff
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def sentence(message: object) -> str:
    """``message`` with the mark that ends it, as click's own errors have it.

    >>> sentence("n is 0, expected 1"), sentence("did you mean n?")
    ('n is 0, expected 1.', 'did you mean n?')
    """
    text = str(message)
    return text if text.endswith(("?", ".")) else f"{text}."


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning of Python's as a note to a user, who wants no line of a program."""
    click.echo(f"Note: {printable(str(message))}", err=True)


def _open_closed_streams() -> None:
    """Let nothing come from and everything go to nowhere where a caller closed a standard stream (``>&-``)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open as long as the process


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """While the block runs, end it with an exception where a signal would end the process and leave scratch files.

    A second signal does not disturb the cleaning up; one that the caller ignores (``nohup``) stays ignored.
    """
    numbers = [getattr(signal, name) for name in ENDING_SIGNALS if hasattr(signal, name)]
    previous = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)]
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers nowhere else
        ours = []

    def leave(number: int, _: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, previous[number])


def print_table(table: Table) -> None:
    """A table in columns as wide as their widest cell."""
    rows = [table.head, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
    for row in rows:
        click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo()
