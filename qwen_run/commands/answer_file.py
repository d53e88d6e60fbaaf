"""Where the answers to a file of prompts go: one line of JSON each, in input order or as they are known.

A file is a journal too: every answer is in it as soon as it is known, with a key of what it depends on, so that a
run that was interrupted goes on where it stopped. It is put in input order at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

import click
import tqdm

from qwen_engine.errors import RequestError
from qwen_engine.json_output import to_json
from qwen_engine.whole_files import lock, whole_file
from qwen_run.api.llm import LLM
from qwen_run.api.outputs import CompletionOutput, Logprobs, RequestOutput
from qwen_run.api.pending_request import PendingRequest
from qwen_run.commands.command import printable
from qwen_run.commands.prompt_file import FilePrompt
from qwen_run.runtime.machine import peak_memory_bytes

Record = Mapping[str, Any]

KEY_LENGTH = 16  # hexadecimal digits

_START = b'{"line": '  # of every record


def _head(line: int, key: str) -> bytes:
    """How the record of a line begins in a file."""
    return to_json({"line": line, "key": key}).encode()[:-1]


class AnswersOut(Protocol):
    """Where answers go.

    Attributes:
        answered: those that are there already, by line.
        num_left_out: how many records belong to no prompt.
        is_terminal: somebody reads them while they come.
    """

    answered: Mapping[int, Record]
    num_left_out: int
    is_terminal: bool

    def write(self, record: Record) -> None:
        """Take the answer to one prompt."""


class AnswerStream:
    """Answers to something that cannot be read again, such as a pipe.

    Args:
        lines: the numbers of all prompts' lines, rising: answers wait for those before them. None writes each answer
            when it is given.
    """

    def __init__(self, out: TextIO, lines: Sequence[int] | None) -> None:
        self.answered: Mapping[int, Record] = {}
        self.num_left_out = 0
        self.is_terminal = out.isatty()
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
    """Answers in the file ``path``, those of an interrupted run and of an earlier file of prompts among them.

    An answer belongs to the prompt with its key, wherever the prompt stands by now. Answers that belong to none are
    left out when all others are there.

    Args:
        keys: for the line of each prompt, what its answer depends on.
        in_order: put the answers in the order of the lines when all are there.
        retry_errors: count prompts whose record is an error as not answered.

    Attributes:
        answered: the answers that are there already, by line.
        num_left_out: how many records belong to no prompt.

    Raises:
        RequestError: the file cannot be written, or holds anything but answers, or only answers to other prompts.
    """

    is_terminal = False

    def __init__(self, path: Path, keys: Mapping[int, str], in_order: bool, retry_errors: bool = False) -> None:
        self._path, self._keys, self._in_order = path, keys, in_order
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}; choose another --output-file") from error
        try:
            lock(self._file.fileno(), wait=False)  # keeps other processes out
            found = self._read()
        except BlockingIOError:
            self._file.close()
            raise RequestError(f"{path} is being written by another qwen-run; wait for it to end") from None
        except BaseException:
            self._file.close()
            raise
        self._answered = {line: record for line, record in found.items() if not (retry_errors and "error" in record)}
        self.answered: Mapping[int, Record] = self._answered

    def _read(self) -> dict[int, Record]:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        records = [self._record(number, line) for number, line in enumerate(lines, start=1)]
        found = assign(records, self._keys)
        self.num_left_out = len(records) - len(found)
        if not found and any("error" not in record for record in records):
            raise RequestError(
                f"{self._path} answers none of these prompts with these options; "
                "remove the file or choose another --output-file"
            )
        if torn and not (self._began(torn) or (records and torn.startswith(_START))):
            raise self._foreign(len(lines) + 1)
        if torn:
            self._file.truncate(sum(len(line) + 1 for line in lines))
        return found

    def _record(self, number: int, line: bytes) -> Record:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("line"), int) or "key" not in record:
            raise self._foreign(number)
        return record

    def _began(self, torn: bytes) -> bool:
        """Whether a record of ours begins as ``torn`` does, which an interruption cut short."""
        heads = (_head(line, key) for line, key in self._keys.items())
        return any(head.startswith(torn) or torn.startswith(head) for head in heads)

    def _foreign(self, number: int) -> RequestError:
        return RequestError(
            f"{self._path}: line {number} is no answer of qwen-run; remove the file or choose another --output-file"
        )

    def write(self, record: Record) -> None:
        """Keep ``record``; it is there even if the process ends now."""
        line = record["line"]
        kept = {"line": line, "key": self._keys[line], **record}
        self._file.write(to_json(kept).encode() + b"\n")
        self._file.flush()
        self._answered[line] = kept

    def close(self) -> None:
        """End; if there is an answer to every prompt, leave out what is no answer to one, and put them in order."""
        with self._file:
            if len(self.answered) == len(self._keys):
                order = sorted(self.answered) if self._in_order else self.answered
                lines = [to_json(self.answered[line]).encode() + b"\n" for line in order]
                self._file.seek(0)
                if self._file.read() != b"".join(lines):
                    with whole_file(Path(os.path.realpath(self._path))) as whole:
                        whole.writelines(lines)


def assign(records: Sequence[Record], keys: Mapping[int, str]) -> dict[int, Record]:
    """The record of each line that has one, with the line's number in it, in the order of ``records``.

    Equal prompts have equal keys: each gets a record of its own, that of its own line first, an answer before an error.

    >>> assign([{"line": 1, "key": "b"}, {"line": 2, "key": "a"}, {"line": 3, "key": "z"}], {1: "a", 2: "b"})
    {2: {'line': 2, 'key': 'b'}, 1: {'line': 1, 'key': 'a'}}
    """
    free: dict[str, dict[int, None]] = {}  # lines in order
    for line, key in keys.items():
        free.setdefault(key, {})[line] = None

    def preference(index: int) -> tuple[bool, bool, int]:
        record = records[index]
        return "error" in record, keys.get(record["line"]) != record["key"], index

    lines: dict[int, int] = {}
    for index in sorted(range(len(records)), key=preference):
        record = records[index]
        if waiting := free.get(record["key"]):
            lines[index] = record["line"] if record["line"] in waiting else next(iter(waiting))
            del waiting[lines[index]]
    return {lines[index]: {**records[index], "line": lines[index]} for index in sorted(lines)}


class AnswerTally:
    """The answers to a file of prompts while they come: written, counted, shown beside a bar, and summed up.

    Args:
        num_prompts: of the file.
        answers: where they go.
    """

    def __init__(self, num_prompts: int, answers: AnswersOut) -> None:
        if answers.answered:
            click.echo(f"{len(answers.answered)} of {num_prompts} prompts are answered already", err=True)
        if answers.num_left_out:
            click.echo(f"{answers.num_left_out} records answer none of these prompts and will be left out", err=True)
        self._num_prompts, self._answers = num_prompts, answers
        self._failed = {line for line, record in answers.answered.items() if "error" in record}
        self._started_s = time.perf_counter()
        self._num_answers = self._num_tokens = self._num_cut = 0
        self._num_refused = self._num_shown = 0
        # no bar where answers are read, which would break their lines; None: nor where standard error is no terminal
        hidden = True if answers.is_terminal else None
        self.bar = tqdm.tqdm(total=num_prompts, initial=len(answers.answered), unit="prompt", disable=hidden)

    def take(self, prompt: FilePrompt, output: RequestOutput) -> None:
        """``prompt`` is answered, or the engine could not."""
        if error := output.error:
            self.refuse(prompt, error)
            return
        self._answers.write({"line": prompt.line, **_id_of(prompt), **record_of(output)})
        self._num_answers += 1
        self._num_tokens += sum(len(answer.token_ids) for answer in output.outputs)
        self._num_cut += any(answer.finish_reason == "length" for answer in output.outputs)

    def refuse(self, prompt: FilePrompt, error: str) -> None:
        """``prompt`` gets no answer, for the reason ``error``."""
        self._failed.add(prompt.line)
        self._num_refused += 1
        tqdm.tqdm.write(f"Line {prompt.line}: {printable(error)}", file=sys.stderr)  # beside the bar
        self._answers.write({"line": prompt.line, **_id_of(prompt), "error": error})

    def show(self) -> None:
        """Bring the bar to where the answers stand."""
        num_done = self._num_answers + self._num_refused
        self.bar.update(num_done - self._num_shown)
        self._num_shown = num_done

    def finish(self, more: str = "") -> None:
        """Say what has been done.

        Args:
            more: what else there is to say of it.

        Raises:
            RequestError: some prompts could not be answered.
        """
        seconds = time.perf_counter() - self._started_s
        cut = f" ({self._num_cut} cut at a limit: finish_reason length)" if self._num_cut else ""
        click.echo(
            f"{self._num_answers} answers{cut}, {self._num_tokens} output tokens in {seconds:.1f} s, "
            f"{self._num_tokens / seconds:.1f} tokens/s; peak memory {peak_memory_bytes() / 2**20:.0f} MiB{more}",
            err=True,
        )
        if self._failed:
            raise RequestError(
                f"{len(self._failed)} of {self._num_prompts} prompts could not be answered, see their records"
            )


def answer_all(
    llm: LLM,
    prompts: Sequence[FilePrompt],
    prepare: Callable[[FilePrompt], PendingRequest],
    answers: AnswersOut,
) -> None:
    """Answer those of ``prompts`` that ``answers`` does not have, many at once.

    Raises:
        RequestError: at the end, if some prompts could not be answered; what was wrong stands in their records.
    """
    tally = AnswerTally(len(prompts), answers)
    waiting = iter([prompt for prompt in prompts if prompt.line not in answers.answered])
    running: dict[PendingRequest, FilePrompt] = {}
    with tally.bar:
        try:
            while _fill(llm, waiting, prepare, running, tally):
                for answering in llm.step():
                    if answering.request.is_finished:
                        tally.take(running.pop(answering), answering.output())
                tally.show()
        finally:
            llm.close()
    tally.finish()


def _fill(
    llm: LLM,
    waiting: Iterator[FilePrompt],
    prepare: Callable[[FilePrompt], PendingRequest],
    running: dict[PendingRequest, FilePrompt],
    tally: AnswerTally,
) -> bool:
    """Submit prompts until a batch of them waits; write down those that cannot be answered. False when none is left."""
    while llm.core.statistics.num_waiting < llm.core.options.max_batch_size and (prompt := next(waiting, None)):
        try:
            answering = prepare(prompt)
            llm.submit(answering)
            running[answering] = prompt
        except RequestError as error:
            tally.refuse(prompt, str(error))
    return bool(running)


def record_of(output: RequestOutput, token_ids: bool = False) -> Record:
    """An answered prompt as one object: its answer, or ``answers`` where it has several."""
    answers = [_answer_of(answer, token_ids) for answer in output.outputs]
    only = answers[0] if len(answers) == 1 else {"answers": answers}
    seed = {} if output.seed is None else {"seed": output.seed}
    return {**only, "input_tokens": len(output.prompt_token_ids), **seed}


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
