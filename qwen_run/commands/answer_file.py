"""Where the answers to a file of prompts go: one line of JSON each, in input order or as they are known.

A file is a journal too: every answer is in it as soon as it is known, with a key of what it depends on, so that a
run that was interrupted goes on where it stopped. It is put in input order at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import click
import tqdm

from qwen_engine.errors import RequestError
from qwen_run.api.llm import LLM
from qwen_run.api.outputs import CompletionOutput, Logprobs, RequestOutput
from qwen_run.api.pending_request import PendingRequest
from qwen_run.commands.command import printable
from qwen_run.commands.prompt_file import FilePrompt
from qwen_run.runtime.machine import peak_memory_bytes

Record = Mapping[str, Any]

KEY_LENGTH = 16  # hexadecimal digits

_START = b'{"line": '  # of every record


class AnswerStream:
    """Answers to something that cannot be read again, such as a pipe.

    Args:
        lines: the numbers of all prompts' lines, rising: answers wait for those before them. None writes each answer
            when it is given.
    """

    def __init__(self, out: TextIO, lines: Sequence[int] | None) -> None:
        self.answered: Mapping[int, Record] = {}
        self._out = out
        self._missing = None if lines is None else list(reversed(lines))
        self._waiting: dict[int, Record] = {}

    def write(self, record: Record) -> None:
        """Take the answer to one prompt."""
        self._waiting[record["line"]] = record
        while self._waiting:
            line = record["line"] if self._missing is None else self._missing[-1]
            if line not in self._waiting:
                return
            print(to_json(self._waiting.pop(line)), file=self._out, flush=True)
            if self._missing is not None:
                self._missing.pop()


class AnswerFile:
    """Answers in the file ``path``, those of an interrupted run among them.

    Args:
        keys: for the line of each prompt, what its answer depends on.
        in_order: put the answers in the order of the lines when all are there.

    Attributes:
        answered: the answers that are there already, by line.

    Raises:
        RequestError: the file cannot be written, or holds anything but answers with these keys.
    """

    def __init__(self, path: Path, keys: Mapping[int, str], in_order: bool) -> None:
        self._path, self._keys, self._in_order = path, keys, in_order
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}; choose another --output-file") from error
        try:
            self._lock()
            self.answered = self._read()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        """Keep other processes out, where the file system has locks."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{self._path} is being written by another qwen-run; wait for it to end") from None
        except OSError:
            pass

    def _read(self) -> dict[int, Record]:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if torn and not (torn.startswith(_START) or _START.startswith(torn)):
            raise self._foreign(len(lines) + 1)
        answered: dict[int, Record] = {}
        for number, line in enumerate(lines, start=1):
            record = _from_json(line)
            if record is None or self._keys.get(record["line"]) != record["key"] or record["line"] in answered:
                raise self._foreign(number)
            answered[record["line"]] = record
        if torn:
            self._file.truncate(sum(len(line) + 1 for line in lines))
        return answered

    def _foreign(self, number: int) -> RequestError:
        return RequestError(
            f"{self._path}: line {number} answers none of these prompts with these options; "
            "remove the file or choose another --output-file"
        )

    def write(self, record: Record) -> None:
        """Keep ``record``; it is there even if the process ends now."""
        self._file.write(to_json({**record, "key": self._keys[record["line"]]}).encode() + b"\n")
        self._file.flush()
        self.answered[record["line"]] = record

    def close(self) -> None:
        """End; put the answers in order if there is one to every prompt."""
        with self._file:
            if self._in_order and len(self.answered) == len(self._keys):
                self._file.seek(0)
                lines = self._file.read().splitlines(keepends=True)
                order = [json.loads(line)["line"] for line in lines]
                if order != sorted(order):
                    self._replace([line for _, line in sorted(zip(order, lines, strict=True))])

    def _replace(self, lines: list[bytes]) -> None:
        """Put ``lines`` in the place of the file, which is whole at any time."""
        target = Path(os.path.realpath(self._path))
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as scratch:
            try:
                scratch.writelines(lines)
                os.fchmod(scratch.fileno(), target.stat().st_mode & 0o777)
                os.replace(scratch.name, target)
            except BaseException:
                os.unlink(scratch.name)
                raise


def answer_all(
    llm: LLM,
    prompts: Sequence[FilePrompt],
    prepare: Callable[[FilePrompt], PendingRequest],
    answers: AnswerFile | AnswerStream,
) -> None:
    """Answer those of ``prompts`` that ``answers`` does not have, many at once.

    Raises:
        RequestError: at the end, if some prompts could not be answered; what was wrong stands in their records.
    """
    if answers.answered:
        click.echo(f"{len(answers.answered)} of {len(prompts)} prompts are answered already", err=True)
    failed = {line for line, record in answers.answered.items() if "error" in record}
    waiting = iter([prompt for prompt in prompts if prompt.line not in answers.answered])
    running: dict[PendingRequest, FilePrompt] = {}
    started_s, num_answers, num_tokens = time.perf_counter(), 0, 0
    # disable=None: no bar where standard error is not a terminal
    with tqdm.tqdm(total=len(prompts), initial=len(answers.answered), unit="prompt", disable=None) as bar:
        try:
            while _fill(llm, waiting, prepare, running, failed, answers):
                for answering in llm.step():
                    if answering.request.is_finished:
                        output = answering.output()
                        prompt = running.pop(answering)
                        if error := next((answer.error for answer in output.outputs if answer.error), None):
                            _refuse(prompt, error, failed, answers)
                            continue
                        answers.write({"line": prompt.line, **_id_of(prompt), **record_of(output)})
                        num_answers += 1
                        num_tokens += sum(len(answer.token_ids) for answer in output.outputs)
                bar.update(num_answers + len(failed) - bar.n)
        finally:
            llm.close()
    seconds = time.perf_counter() - started_s
    click.echo(
        f"{num_answers} answers, {num_tokens} output tokens in {seconds:.1f} s, "
        f"{num_tokens / seconds:.1f} tokens/s; peak memory {peak_memory_bytes() / 2**20:.0f} MiB",
        err=True,
    )
    if failed:
        raise RequestError(f"{len(failed)} of {len(prompts)} prompts could not be answered, see their records")


def _fill(
    llm: LLM,
    waiting: Iterator[FilePrompt],
    prepare: Callable[[FilePrompt], PendingRequest],
    running: dict[PendingRequest, FilePrompt],
    failed: set[int],
    answers: AnswerFile | AnswerStream,
) -> bool:
    """Submit prompts until a batch of them waits; write down those that cannot be answered. False when none is left."""
    while llm.core.statistics.num_waiting < llm.core.options.max_batch_size and (prompt := next(waiting, None)):
        try:
            answering = prepare(prompt)
            llm.submit(answering)
            running[answering] = prompt
        except RequestError as error:
            _refuse(prompt, str(error), failed, answers)
    return bool(running)


def _refuse(prompt: FilePrompt, error: str, failed: set[int], answers: AnswerFile | AnswerStream) -> None:
    """Say that ``prompt`` gets no answer, and why."""
    failed.add(prompt.line)
    click.echo(f"Line {prompt.line}: {printable(error)}", err=True)
    answers.write({"line": prompt.line, **_id_of(prompt), "error": error})


def record_of(output: RequestOutput, token_ids: bool = False) -> Record:
    """An answered prompt as one object: its answer, or ``answers`` where it has several."""
    answers = [_answer_of(answer, token_ids) for answer in output.outputs]
    only = answers[0] if len(answers) == 1 else {"answers": answers}
    return {**only, "prompt_tokens": len(output.prompt_token_ids)}


def _answer_of(answer: CompletionOutput, token_ids: bool) -> Record:
    record: dict[str, Any] = {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "output_tokens": len(answer.token_ids),
    }
    if token_ids:
        record["token_ids"] = answer.token_ids
    if answer.logprobs is not None:
        pairs = zip(answer.token_ids, answer.logprobs, strict=True)
        record["logprobs"] = [_token_of(token_id, likely) for token_id, likely in pairs]
    return record


def _token_of(token_id: int, likely: Logprobs) -> Record:
    """One token of an answer, and the likeliest in its place, best first."""
    found = sorted(likely.items(), key=lambda item: item[1].rank)
    top = [{"token_id": i, "token": each.decoded_token, "logprob": each.logprob} for i, each in found]
    own = likely[token_id]
    return {"token_id": token_id, "token": own.decoded_token, "logprob": own.logprob, "rank": own.rank, "top": top}


def _id_of(prompt: FilePrompt) -> Record:
    return {} if prompt.id is None else {"id": prompt.id}


def key_of(source: str, settings: Any) -> str:
    """What an answer depends on, in short: the line of its prompt, and everything else that was chosen."""
    text = json.dumps([source, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def to_json(record: Record) -> str:
    """``record`` in one line that can be encoded as UTF-8."""
    text = json.dumps(record, ensure_ascii=False)
    return text if _is_utf8(text) else json.dumps(record)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_json(line: bytes) -> Record | None:
    """The record in a line; None where there is no record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("line"), int) and "key" in record
    return record if is_record else None
