"""Where ``qwen-run`` reads prompts and writes answers."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TextIO

import click

from qwen_engine.errors import RequestError
from qwen_engine.regular_files import MOST_BYTES, read_regular
from qwen_run.commands.answer_file import AnswerFile, AnswersOut, AnswerStream, key_of
from qwen_run.commands.answer_parts import AnswerParts
from qwen_run.commands.prompt_file import FilePrompt
from qwen_run.commands.run_options import RunOptions
from qwen_run.commands.storage import is_address, read_prompts
from qwen_run.sampling.structured import StructuredOutputsParams
from qwen_run.text.encoding import decode_utf8

SILENCE_S = 2  # of a pipe beside a prompt, after which a user is told what is waited for


def prompt_text(asked: RunOptions) -> str:
    """The prompt, or the file of prompts: what the command line names, and what comes through a pipe."""
    if asked.input_file is not None:
        name = asked.input_file
        return decode_utf8(_read_bytes(name), "standard input" if name == "-" else name)
    if asked.text is None:
        return decode_utf8(_read_bytes("-"), "standard input").removesuffix("\n")
    text = decode_utf8(os.fsencode(asked.text), "--input-text" if asked.prompt is None else "PROMPT")
    piped = decode_utf8(_piped(), "standard input").removesuffix("\n")
    return f"{text}\n\n{piped}" if text.strip() and piped.strip() else text


def _piped() -> bytes:
    """What comes through a pipe or from a file; nothing from a terminal or a device."""
    if sys.stdin.isatty():
        return b""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except OSError:  # no file, but an object of a program's
        return _read_stdin()
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        if not select.select([sys.stdin], [], [], SILENCE_S)[0]:
            click.echo("Waiting for the end of standard input; < /dev/null does without it.", err=True)
    elif not stat.S_ISREG(mode):
        return b""
    return _read_stdin()


def read_schema(name: str) -> StructuredOutputsParams:
    """The form of answers that keep to the JSON schema in a file.

    Raises:
        RequestError: the file cannot be read, or holds no schema.
    """
    try:
        return StructuredOutputsParams(json=decode_utf8(_read_bytes(name, "--json-schema"), name), strict=False)
    except RequestError as error:
        raise RequestError(str(error).replace("json is", f"{name} holds", 1)) from None


def _read_bytes(name: str, option: str = "--input-file") -> bytes:
    if name == "-":
        return _read_stdin()
    if is_address(name) or Path(name).is_dir():
        return read_prompts(name)
    try:
        return read_regular(Path(name))
    except OSError as error:
        piped = f", or {option} - < {name}" if Path(name).is_fifo() else ""
        raise RequestError(f"{name} cannot be read: {error.strerror}; choose another {option}{piped}") from error


def _read_stdin() -> bytes:
    content = sys.stdin.buffer.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise RequestError(f"standard input has more than {MOST_BYTES} bytes; give it in several parts")
    return content


def check_written(engine: Path, asked: RunOptions) -> None:
    """Refuse to write over the prompts or a file of the engine, whose weights are mapped while it answers."""
    outputs = {"--output-file": asked.output_file, "--output-logits": asked.output_logits}
    source = 0 if asked.input_file in (None, "-") else asked.input_file
    read = [("the prompts", source), *((f"the engine {engine}", path) for path in _files(engine))]
    for option, path in outputs.items():
        if path is None:
            continue
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(engine)):
            raise RequestError(f"{path} is inside the engine {engine}; choose another {option}")
        for name, other in read:
            if other is not None and _is_same_file(path, other):
                raise RequestError(f"{path} is a file of {name}; choose another {option}")
    first, second = outputs.values()
    if first is not None and second is not None and os.path.realpath(first) == os.path.realpath(second):
        raise RequestError(f"{' and '.join(outputs)} are both {first}; choose another for one")


def _files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _is_same_file(path: Path, other: Path | str | int) -> bool:
    """Whether both are one regular file; ``other`` may be a descriptor. Terminals and /dev/null may well be both."""
    try:
        mine, others = os.stat(path), os.stat(other)
    except OSError:
        return False
    return stat.S_ISREG(mine.st_mode) and os.path.samestat(mine, others)


@contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
    """Where answers go, as UTF-8."""
    if path is None:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        yield sys.stdout
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}; choose another --output-file") from error
    with file:
        yield file


@contextmanager
def output_of_many(prompts: list[FilePrompt], settings: list[Any], asked: RunOptions) -> Iterator[AnswersOut]:
    """Where the answers to a file of prompts go: a file that keeps those it has, or what can only be written."""
    path, in_order = asked.output_file, not asked.as_finished
    if asked.output_address is not None:
        keys = {prompt.line: key_of(prompt.source, settings) for prompt in prompts}
        with closing(AnswerParts(asked.output_address, keys, asked.retry_errors)) as parts:
            yield parts
    elif path is not None and (not path.exists() or path.is_file()):
        keys = {prompt.line: key_of(prompt.source, settings) for prompt in prompts}
        with closing(AnswerFile(path, keys, in_order, asked.retry_errors)) as answers:
            yield answers
    else:
        with open_output(path) as out:
            yield AnswerStream(out, [prompt.line for prompt in prompts] if in_order else None)
