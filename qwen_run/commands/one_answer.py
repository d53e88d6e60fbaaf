"""The answer to one prompt: streamed, or printed with counts and timing as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import click
import numpy as np

from qwen_engine import json_output
from qwen_engine.errors import EngineError, RequestError
from qwen_run.api.llm import LLM
from qwen_run.api.outputs import CompletionOutput, RequestOutput
from qwen_run.api.pending_request import PendingRequest
from qwen_run.commands.answer_file import record_of
from qwen_run.commands.terminal import TerminalText, visible
from qwen_run.runtime.machine import peak_memory_bytes

MIB = 1 << 20


def answer_one(
    llm: LLM,
    answering: PendingRequest,
    out: TextIO,
    json_head: Mapping[str, Any] | None = None,
    logits_file: BinaryIO | None = None,
) -> None:
    """Stream the answer to ``out``; several, and JSON, are printed when they are there.

    Args:
        json_head: print one JSON object that begins with this.
        logits_file: takes the logits each token was chosen from.
    """
    shown = _Shown(out)
    streams = answering.request.width == 1 and json_head is None
    times, output = [time.perf_counter()], None
    with closing(llm.run([answering])) as outputs, shown:
        for output in outputs:
            times.append(time.perf_counter())
            if streams:
                shown.stream(output.outputs[0].text)
        assert output is not None
        if output.error is not None:
            raise EngineError(output.error)
    figures = _figures(output, times)
    if json_head is not None:
        record = {**json_head, **record_of(output, token_ids=True), **json_output.rounded(figures)}
        print(json_output.to_json(record), file=out, flush=True)
    elif streams:
        shown.end()
    else:
        shown.all(output, answering.request.max_tokens)
    if logits_file is not None:
        _save_logits(logits_file, answering.logits)
    if streams and (cut := cut_at(output.outputs[0], answering.request.max_tokens)):
        click.echo(f"The answer is {cut}", err=True)
    _tell(output, figures)


def cut_at(answer: CompletionOutput, max_tokens: int) -> str:
    """Where an answer of at most ``max_tokens`` was cut, and what to do; empty for one that ended by itself."""
    if answer.finish_reason != "length":
        return ""
    count = len(answer.token_ids)
    if count < max_tokens:
        return f"cut at {count} tokens, where the engine's room for prompt and answer ends"
    return f"cut at {count} tokens; set another limit with --max-new-tokens"


class _Shown:
    """Where an answer is read. On a terminal, control characters are shown and words are kept whole."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = TerminalText(out) if out.isatty() else None
        self._streamed = 0

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """End the line of an answer that was interrupted."""
        if kind is not None and self._streamed:
            self.end()

    def stream(self, text: str) -> None:
        """Show what ``text`` has more than the last one."""
        self._write(text[self._streamed :])
        self._streamed = len(text)

    def end(self) -> None:
        """End the line of what was streamed."""
        self._write("\n")

    def all(self, output: RequestOutput, max_tokens: int) -> None:
        """Show every answer; where they are several, each below its number."""
        for number, answer in enumerate(output.outputs, start=1):
            if len(output.outputs) > 1:
                cut = cut_at(answer, max_tokens)
                head = f"Answer {number} of {len(output.outputs)}{f' ({cut})' if cut else ''}:"
                self._write(f"{'' if number == 1 else chr(10)}{head}\n")
            self._write(f"{answer.text}\n")

    def _write(self, text: str) -> None:
        if self._terminal:
            self._terminal.write(visible(text))
        else:
            self._out.write(text)
            self._out.flush()


def _figures(output: RequestOutput, times: list[float]) -> dict[str, Any]:
    """Counts and timing; ``times``: when it began, and when each piece came, in seconds of one clock."""
    num_tokens = sum(len(answer.token_ids) for answer in output.outputs)
    seconds = times[-1] - times[1]
    return {
        "ttft_ms": (times[1] - times[0]) * 1e3,
        "decode_tokens_per_s": (num_tokens - 1) / seconds if seconds else None,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _tell(output: RequestOutput, figures: Mapping[str, Any]) -> None:
    num_tokens = sum(len(answer.token_ids) for answer in output.outputs)
    speed = figures["decode_tokens_per_s"]
    click.echo(
        f"{len(output.prompt_token_ids)} input tokens, {num_tokens} output tokens; first after "
        f"{figures['ttft_ms']:.0f} ms{'' if speed is None else f', then {speed:.1f} tokens/s'}; "
        f"peak memory {figures['peak_memory_bytes'] / MIB:.0f} MiB",
        err=True,
    )


def _save_logits(file: BinaryIO, rows: list[np.ndarray]) -> None:
    """Write logits, each row (vocab_size,) float32, as one array."""
    try:
        np.save(file, np.stack(rows))
    except OSError as error:  # NumPy's own have no strerror
        reason = error.strerror or error
        raise RequestError(f"{file.name} cannot be written: {reason}; choose another --output-logits") from error


@contextmanager
def open_logits(path: Path | None) -> Iterator[BinaryIO | None]:
    """The file for logits, open before an answer is waited for; it is removed again where it does not get them."""
    if path is None:
        yield None
        return
    try:
        file = path.open("wb", buffering=0)  # closing it then fails no second time
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}; choose another --output-logits") from error
    try:
        with file:
            yield file
    except BaseException:
        if path.is_file():  # and not a device
            path.unlink()
        raise
