"""``qwen-run``: answer prompts, or chat, with an engine."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import click

from qwen_engine.errors import RequestError
from qwen_run.command import Command, peak_memory_bytes, printable

# What runs a model takes most of a second to import: the functions below do it when help and usage are done with.
if TYPE_CHECKING:
    import numpy as np

    from qwen_run.prompts import Prompt
    from qwen_run.request import Request
    from qwen_run.sampling import SamplingParams
    from qwen_run.text import Answer, TextModel

ENGINES = Path("engines")
MIB = 1 << 20

EXAMPLES = """\b
Examples:
  qwen-run                                         chat with the newest engine under engines/
  qwen-run --input-text "What is a paged cache?"   one answer, streamed
  qwen-run --temperature 0.7 --seed 1 < essay.txt  the whole of standard input is the prompt
  qwen-run --input-file questions.jsonl --output-file answers.jsonl
"""


@click.command("qwen-run", cls=Command, epilog=EXAMPLES)
@click.option("--engine", type=click.Path(path_type=Path), help="Engine directory.  [default: newest under engines/]")
@click.option("--input-text", metavar="TEXT", help="Answer this prompt, streaming the answer.")
@click.option(
    "--input-file",
    metavar="FILE",
    help='Answer every line: JSON Lines with "prompt" or "messages" (and "tools"), or text, one prompt a line; '
    "- is standard input. Answers are JSON Lines in input order.",
)
@click.option("--output-file", type=click.Path(path_type=Path), help="Write answers here, not to standard output.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--raw", is_flag=True, help="Send prompts as they are, without the chat template.")
@click.option(
    "--thinking/--no-thinking", default=None, help="Whether to think first.  [default: as the template has it]"
)
@click.option("--max-new-tokens", type=int, help="Most tokens of an answer.")
@click.option("--temperature", type=float, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens that reach this probability; 1 is off.")
@click.option("--top-k", type=int, help="Sample among this many likeliest tokens; 0 is off.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes tokens seen before less likely.")
@click.option("--seed", type=int, help="Same seed, same answer.  [default: 0]")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of a run.  [default: physical cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the answer with counts and timing as one JSON object.")
@click.option(
    "--output-logits",
    type=click.Path(path_type=Path),
    metavar="FILE.npy",
    help="Write the logits each token of the answer was chosen from, its end included: (n, vocab) float32.",
)
def main(
    engine: Path | None,
    input_text: str | None,
    input_file: str | None,
    output_file: Path | None,
    system: str | None,
    raw: bool,
    thinking: bool | None,
    threads: int | None,
    as_json: bool,
    output_logits: Path | None,
    **sampling: float | None,
) -> None:
    """Answer prompts with an engine that qwen-build made.

    Without a prompt, and with a terminal, this is an interactive chat (:help lists its commands); a pipe on
    standard input is one prompt. Sampling defaults come from the checkpoint's generation_config.json. Results go to
    standard output; timing, peak memory and progress to standard error.
    """
    if input_text is not None and input_file is not None:
        raise click.UsageError("--input-text and --input-file exclude each other.")
    if input_file is not None and (as_json or output_logits):
        raise click.UsageError("--json and --output-logits are for one prompt; --input-file always writes JSON Lines.")
    if raw and (system is not None or thinking is not None):
        raise click.UsageError("--system and --thinking need the chat template; leave out --raw.")
    interactive = input_text is None and input_file is None and sys.stdin.isatty()
    if interactive and (as_json or output_logits or output_file):
        raise click.UsageError("--json, --output-file and --output-logits need --input-text, --input-file or a pipe.")

    from qwen_run.prompts import Prompt, decode_utf8, parse_prompts

    # an argument may hold bytes the locale cannot decode
    system = None if system is None else decode_utf8(os.fsencode(system), "--system")
    text = None if interactive else _prompt_text(input_text, input_file)
    _check_not_empty(text)

    asked = _asked(sampling)
    from qwen_run.engine import newest_engine

    engine = engine or newest_engine(ENGINES)
    _check_written(engine, input_text, input_file, {"--output-file": output_file, "--output-logits": output_logits})
    model, params = _load(engine, threads, raw, asked)
    variables = {} if thinking is None else {"enable_thinking": thinking}
    if interactive:
        from qwen_run import console

        console.run(console.Console(model, params, system, variables))
        return
    assert text is not None
    if input_file is None:
        request = _request(model, Prompt(1, text), params, system, variables)
        with _logits_file(output_logits) as logits_file, _output(output_file) as out:
            _answer_one(model, request, out, as_json, logits_file)
    else:
        prompts = list(parse_prompts(text))
        requests = [_request_or_error(model, prompt, params, system, variables) for prompt in prompts]
        with _output(output_file) as out:
            _answer_all(model, prompts, requests, out)


def _prompt_text(input_text: str | None, input_file: str | None) -> str:
    """The prompt, or the file of prompts: what the options name, else standard input."""
    from qwen_run.prompts import decode_utf8

    if input_text is not None:
        return decode_utf8(os.fsencode(input_text), "--input-text")
    if input_file is None:
        return decode_utf8(_read_bytes("-"), "standard input").removesuffix("\n")
    return decode_utf8(_read_bytes(input_file), "standard input" if input_file == "-" else input_file)


def _asked(sampling: dict[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams that options set; what is out of range is refused before the engine is opened."""
    from qwen_run.sampling import SamplingParams

    asked = {}
    for name, value in sampling.items():
        if value is not None:
            field = "max_tokens" if name == "max_new_tokens" else name
            try:
                SamplingParams(**{field: value})
            except RequestError as error:
                raise RequestError(f"--{name.replace('_', '-')}: {error}") from error
            asked[field] = value
    return asked


def _check_written(
    engine: Path, input_text: str | None, input_file: str | None, outputs: dict[str, Path | None]
) -> None:
    """Refuse to write over the prompts or a file of the engine, whose weights are mapped while it answers."""
    source = None if input_text is not None else 0 if input_file in (None, "-") else input_file
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


def _load(engine: Path, threads: int | None, raw: bool, asked: dict[str, Any]) -> tuple[TextModel, SamplingParams]:
    """The model, and its sampling defaults with what the user asked for over them."""
    import dataclasses

    from qwen_run.text import TextModel

    model = TextModel.load(engine, threads, raw)
    params = dataclasses.replace(model.defaults, **asked)
    idle = [f"--{name.replace('_', '-')}" for name in ("top_p", "top_k", "seed") if name in asked]
    if params.greedy and idle:
        click.echo(f"Note: {' and '.join(idle)} without effect at temperature 0; add --temperature.", err=True)
    return model, params


def _request(
    model: TextModel, prompt: Prompt, params: SamplingParams, system: str | None, variables: dict[str, Any]
) -> Request:
    if prompt.error is not None:
        raise RequestError(prompt.error)
    _check_not_empty(prompt.text)
    if model.template is None:
        if prompt.text is None:
            raise RequestError('"messages" need the chat template; leave out --raw')
        return model.request(model.encode_raw(prompt.text), params)
    messages = [{"role": "user", "content": prompt.text}] if prompt.messages is None else list(prompt.messages)
    if system is not None and messages and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": system})
    return model.request(model.encode_chat(messages, prompt.tools, **variables), params)


def _check_not_empty(text: str | None) -> None:
    if text is not None and not text.strip():
        raise RequestError("the prompt is empty, expected text")


def _request_or_error(*arguments: Any) -> Request | RequestError:
    try:
        return _request(*arguments)
    except RequestError as error:
        return error


def _answer_one(model: TextModel, request: Request, out: TextIO, as_json: bool, logits_file: BinaryIO | None) -> None:
    from qwen_run.text import Answer

    answer, logits = Answer(), []
    with closing(model.stream([request], keep_logits=logits_file is not None)) as pieces:
        for piece in pieces:
            answer.add(piece)
            logits.append(piece.token.logits)
            if not as_json:
                print(piece.text, end="", flush=True, file=out)
    if as_json:
        figures = {
            "ttft_ms": answer.ttft_ms,
            "tokens_per_s": answer.tokens_per_s,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        _print_json(out, {**_record(request, answer), "token_ids": answer.token_ids, **figures})
    else:
        print(file=out)
    if logits_file is not None:
        _save_logits(logits_file, logits)
    speed = "" if answer.tokens_per_s is None else f", then {answer.tokens_per_s:.1f} tokens/s"
    click.echo(
        f"{len(request.prompt)} prompt tokens, {len(answer.token_ids)} output tokens; "
        f"first after {answer.ttft_ms:.0f} ms{speed}; peak memory {peak_memory_bytes() / MIB:.0f} MiB",
        err=True,
    )


def _answer_all(model: TextModel, prompts: list[Prompt], requests: list[Request | RequestError], out: TextIO) -> None:
    """Answer all good requests together and print a line for every prompt, each as soon as those before it are done.

    Raises:
        RequestError: at the end, if some lines could not be answered.
    """
    import time
    from collections import deque

    import tqdm

    from qwen_run.text import Answer

    good = [request for request in requests if not isinstance(request, RequestError)]
    answers = {request: Answer() for request in good}
    unprinted = deque(zip(prompts, requests, strict=True))

    def print_finished() -> None:
        while unprinted:
            prompt, request = unprinted[0]
            if isinstance(request, RequestError):
                click.echo(f"Line {prompt.line}: {printable(str(request))}", err=True)
                _print_json(out, {"line": prompt.line, "error": str(request)})
            elif answers[request].finish_reason:
                _print_json(out, {"line": prompt.line, **_record(request, answers[request])})
            else:
                return
            unprinted.popleft()

    started_s = time.perf_counter()
    print_finished()
    # disable=None: no bar where standard error is not a terminal
    with closing(model.stream(good)) as pieces, tqdm.tqdm(total=len(good), unit="prompt", disable=None) as bar:
        for piece in pieces:
            answers[good[piece.request_index]].add(piece)
            if piece.token.finish_reason:
                bar.update()
                print_finished()
    seconds = time.perf_counter() - started_s
    output_tokens = sum(len(answer.token_ids) for answer in answers.values())
    click.echo(
        f"{len(good)} answers, {output_tokens} output tokens in {seconds:.1f} s, "
        f"{output_tokens / seconds:.1f} tokens/s; peak memory {peak_memory_bytes() / MIB:.0f} MiB",
        err=True,
    )
    if len(good) < len(requests):
        raise RequestError(f"{len(requests) - len(good)} of {len(requests)} prompts could not be answered, see above")


def _record(request: Request, answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(request.prompt),
        "output_tokens": len(answer.token_ids),
    }


def _print_json(out: TextIO, record: dict[str, Any]) -> None:
    import json

    print(json.dumps(record, ensure_ascii=False), file=out, flush=True)


def _save_logits(file: BinaryIO, rows: list[np.ndarray | None]) -> None:
    import numpy as np

    try:
        np.save(file, np.stack([row for row in rows if row is not None]))
    except OSError as error:  # NumPy's own have no strerror
        reason = error.strerror or error
        raise RequestError(f"{file.name} cannot be written: {reason}; choose another --output-logits") from error


@contextmanager
def _logits_file(path: Path | None) -> Iterator[BinaryIO | None]:
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


def _read_bytes(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise RequestError(f"{name} cannot be read: {error.strerror}; choose another --input-file") from error


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
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
