"""What every command of this project does alike: one line for a user's mistake, a traceback for ours."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import click

from qwen_engine.errors import QwenError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Command(click.Command):
    """A click command with ``-h``, and with ``Error: ...`` and exit 1 for a :class:`QwenError`.

    Ctrl-C exits 130 without a word; click itself is as quiet when a reader closes the pipe.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", {"help_option_names": ["-h", "--help"], "show_default": True})
        super().__init__(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except QwenError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # Python flushes stdout once more on its way out; let what is still buffered go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            click.echo("Error: no space is left where the output goes; free some and run again", err=True)
            ctx.exit(1)


def peak_memory_bytes() -> int:
    """The most resident memory this process has held so far, mapped files included."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
