"""qwen-run as it is typed."""

import io

from click.testing import CliRunner

from cases.scripted import Script
from qwen_run.commands import run as cli


def run_command(*arguments, stdin=None):
    return CliRunner().invoke(cli.main, [str(each) for each in arguments], input=stdin, catch_exceptions=False)


ASK = ("--input-file", "q.jsonl", "--output-file", "a.jsonl", "--seed", "0")


def stop_after(monkeypatch, num_runs, error=KeyboardInterrupt):
    """Let the engine fail after some runs: once where a user interrupts it, else for good."""
    original = Script.run

    def run(self, batch):
        if self.num_runs == num_runs:
            if error is KeyboardInterrupt:
                monkeypatch.setattr(Script, "run", original)
            raise error
        return original(self, batch)

    monkeypatch.setattr(Script, "run", run)


class Terminal(io.StringIO):
    def isatty(self):
        return True
