"""``qwen-run``: answer prompts, or chat, with an engine."""

from __future__ import annotations

import dataclasses
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import click

from qwen_engine.errors import EngineError, RequestError
from qwen_plugin import MOST_THREADS
from qwen_run.commands.command import Command
from qwen_run.runtime.machine import peak_memory_bytes

# What runs a model takes most of a second to import: the functions below do it when help and usage are done with.
if TYPE_CHECKING:
    import numpy as np

    from qwen_run.api.llm import LLM
    from qwen_run.api.pending_request import PendingRequest
    from qwen_run.commands.answer_file import AnswerFile, AnswerStream
    from qwen_run.commands.prompt_file import FilePrompt
    from qwen_run.sampling.params import SamplingParams
    from qwen_run.text.text_model import TextModel

ENGINES = Path("engines")
MIB = 1 << 20

EXAMPLES = """\b
Examples:
  qwen-run                                         chat with the newest engine under engines/
  qwen-run --input-text "What is a paged cache?"   one answer, streamed
  qwen-run --temperature 0.7 --seed 1 < essay.txt  the whole of standard input is the prompt
  qwen-run --input-file questions.jsonl --output-file answers.jsonl      run again, it goes on where it stopped
"""


@click.command("qwen-run", cls=Command, epilog=EXAMPLES)
@click.option("--engine", type=click.Path(path_type=Path), help="Engine directory.  [default: newest under engines/]")
@click.option("--input-text", metavar="TEXT", help="Answer this prompt, streaming the answer.")
@click.option(
    "--input-file",
    metavar="FILE",
    help='Answer every line: JSON Lines with "prompt" or "messages" (and "tools", "id", sampling options such as '
    '"max_tokens"), or text, one prompt a line; - is standard input. Answers are JSON Lines in input order. Those '
    "that --output-file holds already are kept.",
)
@click.option(
    "--output-file", "--output", type=click.Path(path_type=Path), help="Write answers here, not to standard output."
)
@click.option("--as-finished", is_flag=True, help="Answers to --input-file come as they are known, in any order.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--raw", is_flag=True, help="Send prompts as they are, without the chat template.")
@click.option(
    "--thinking/--no-thinking", default=None, help="Whether to think first.  [default: as the template has it]"
)
@click.option("--max-new-tokens", type=int, help="Most tokens of an answer.")
@click.option("--temperature", type=float, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens that reach this probability; 1 is off.")
@click.option("--top-k", type=int, help="Sample among this many likeliest tokens; 0 is off.")
@click.option("--min-p", type=float, help="Least probability, as a share of the likeliest token's; 0 is off.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes tokens seen before less likely.")
@click.option("--presence-penalty", type=float, help="Above 0 makes tokens of the answer less likely.")
@click.option("--frequency-penalty", type=float, help="The same, for each time a token is there.")
@click.option("--seed", type=int, help="Same seed, same answer.  [default: 0]")
@click.option("-n", "--n", "n", type=int, help="Answers to each prompt.  [default: 1]")
@click.option("--num-beams", type=int, help="Width of a beam search.  [default: 1, off]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End an answer before this text; may be given again.")
@click.option("--min-tokens", type=int, help="Tokens an answer has before it may end.  [default: 0]")
@click.option("--ignore-eos", is_flag=True, default=None, help="Answers end at --max-new-tokens or --stop alone.")
@click.option("--logprobs", type=int, metavar="N", help="Report how likely tokens were, and the N likeliest.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="Threads of a run.  [default: physical cores]")
@click.option(
    "--kv-cache-memory",
    type=click.IntRange(1, 1 << 30),
    metavar="MIB",
    help="Memory of the cache of keys and values.  [default: from the free memory]",
)
@click.option(
    "--draft-tokens",
    type=click.IntRange(0, 64),
    help="Most tokens to guess ahead from what the text repeats, 0 for none; answers stay the same.  [default: 8]",
)
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
    as_finished: bool,
    system: str | None,
    raw: bool,
    thinking: bool | None,
    threads: int | None,
    kv_cache_memory: int | None,
    draft_tokens: int | None,
    as_json: bool,
    output_logits: Path | None,
    **sampling: Any,
) -> None:
    """Answer prompts with an engine that qwen-build made.

    Without a prompt, and with a terminal, this is an interactive chat (:help lists its commands); a pipe on
    standard input is one prompt. Sampling defaults come from the checkpoint's generation_config.json. Results go to
    standard output; timing, peak memory and progress to standard error.
    """
    interactive = input_text is None and input_file is None and sys.stdin.isatty()
    if input_text is not None and input_file is not None:
        raise click.UsageError("--input-text and --input-file exclude each other.")
    if input_file is not None and (as_json or output_logits):
        raise click.UsageError("--json and --output-logits are for one prompt; --input-file always writes JSON Lines.")
    if as_finished and input_file is None:
        raise click.UsageError("--as-finished is for --input-file.")
    if sampling["logprobs"] is not None and input_file is None and not as_json:
        raise click.UsageError("--logprobs needs --json or --input-file.")
    if interactive and any(value is not None for value in (sampling["n"], sampling["num_beams"], draft_tokens)):
        raise click.UsageError("-n, --num-beams and --draft-tokens need --input-text, --input-file or a pipe.")
    if output_logits and any(sampling[name] is not None for name in ("n", "num_beams")):
        raise click.UsageError("--output-logits is for one answer; leave out -n and --num-beams.")
    if raw and (system is not None or thinking is not None):
        raise click.UsageError("--system and --thinking need the chat template; leave out --raw.")
    if interactive and (as_json or output_logits or output_file):
        raise click.UsageError("--json, --output-file and --output-logits need --input-text, --input-file or a pipe.")

    from qwen_run.commands.prompt_file import FilePrompt, parse_prompts
    from qwen_run.text.encoding import decode_utf8

    # an argument may hold bytes the locale cannot decode
    system = None if system is None else decode_utf8(os.fsencode(system), "--system")
    text = None if interactive else _prompt_text(input_text, input_file)
    _check_not_empty(text)

    asked = _asked(sampling)
    from qwen_run.runtime.engine import newest_engine

    engine = engine or newest_engine(ENGINES)
    _check_written(engine, input_text, input_file, {"--output-file": output_file, "--output-logits": output_logits})
    model, params = _load(engine, threads, raw, kv_cache_memory, asked)
    variables = {} if thinking is None else {"enable_thinking": thinking}
    from qwen_run.api.llm import LLM

    if interactive:
        from qwen_run.commands import console

        console.run(console.Console(LLM(model), params, system, variables))
        return

    assert text is not None
    guessing: dict[str, Any] = {} if draft_tokens is None else {"max_drafts": draft_tokens}
    if input_file is None:
        llm = LLM(model, keep_logits=output_logits is not None, **guessing)
        answering = _prepare(llm, FilePrompt(1, text, text), params, system, variables)
        with _logits_file(output_logits) as logits_file, _output(output_file) as out:
            _answer_one(llm, answering, out, as_json, logits_file)
        return
    from qwen_run.commands.answer_file import answer_all

    llm, prompts = LLM(model, **guessing), list(parse_prompts(text))
    parts = {name: part.sha256 for name, part in model.engine.manifest.parts.items()}
    settings = [parts, dataclasses.asdict(params), system, raw, variables]
    with _output_of_many(output_file, prompts, settings, not as_finished) as answers:
        answer_all(llm, prompts, partial(_prepare, llm, params=params, system=system, variables=variables), answers)


def _prompt_text(input_text: str | None, input_file: str | None) -> str:
    """The prompt, or the file of prompts: what the options name, else standard input."""
    from qwen_run.text.encoding import decode_utf8

    if input_text is not None:
        return decode_utf8(os.fsencode(input_text), "--input-text")
    if input_file is None:
        return decode_utf8(_read_bytes("-"), "standard input").removesuffix("\n")
    return decode_utf8(_read_bytes(input_file), "standard input" if input_file == "-" else input_file)


def _asked(sampling: dict[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams that options set; what is out of range is refused before the engine is opened."""
    from qwen_run.sampling.params import checked

    asked = {}
    for name, value in sampling.items():
        if value is not None and value != ():  # not given, or not once
            field = "max_tokens" if name == "max_new_tokens" else name
            try:
                asked[field] = checked(field, value)
            except RequestError as error:
                raise RequestError(f"--{name.replace('_', '-')}: {error}") from error
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


def _load(
    engine: Path, threads: int | None, raw: bool, cache_mib: int | None, asked: dict[str, Any]
) -> tuple[TextModel, SamplingParams]:
    """The model, and its sampling defaults with what the user asked for over them."""
    from qwen_run.text.text_model import TextModel

    model = TextModel.load(engine, threads, raw, cache_mib and cache_mib * MIB)
    params = dataclasses.replace(model.defaults, **asked)
    idle = [f"--{name.replace('_', '-')}" for name in ("top_p", "top_k", "min_p", "seed") if name in asked]
    if params.greedy and idle:
        click.echo(f"Note: {' and '.join(idle)} without effect at temperature 0; add --temperature.", err=True)
    return model, params


def _prepare(
    llm: LLM, prompt: FilePrompt, params: SamplingParams, system: str | None, variables: dict[str, Any]
) -> PendingRequest:
    """What a line of a file, or the one prompt, asks of the model.

    Raises:
        RequestError: the model cannot answer that.
    """
    if prompt.error is not None:
        raise RequestError(prompt.error)
    _check_not_empty(prompt.text)
    params = dataclasses.replace(params, **prompt.params)
    if llm.has_template:
        messages = [{"role": "user", "content": prompt.text}] if prompt.messages is None else list(prompt.messages)
        if system is not None and messages and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": system})
        return llm.prepare(llm.chat_prompt(messages, prompt.tools, **variables), params)
    if prompt.text is None:
        raise RequestError('"messages" need the chat template; leave out --raw')
    return llm.prepare(prompt.text, params)


def _check_not_empty(text: str | None) -> None:
    if text is not None and not text.strip():
        raise RequestError("the prompt is empty, expected text")


def _answer_one(llm: LLM, answering: PendingRequest, out: TextIO, as_json: bool, logits_file: BinaryIO | None) -> None:
    """Stream the answer; several, and JSON, are printed when they are there."""
    import time

    from qwen_run.commands.answer_file import record_of, to_json

    streams = answering.request.width == 1 and not as_json
    times, shown, output = [time.perf_counter()], 0, None
    with closing(llm.run([answering])) as outputs:
        for output in outputs:
            times.append(time.perf_counter())
            if streams:
                text = output.outputs[0].text
                print(text[shown:], end="", flush=True, file=out)
                shown = len(text)
    assert output is not None
    if output.error is not None:
        raise EngineError(output.error)
    num_tokens = sum(len(answer.token_ids) for answer in output.outputs)
    ttft_ms, seconds = (times[1] - times[0]) * 1e3, times[-1] - times[1]
    tokens_per_s = (num_tokens - 1) / seconds if seconds else None
    if as_json:
        figures = {"ttft_ms": ttft_ms, "tokens_per_s": tokens_per_s, "peak_memory_bytes": peak_memory_bytes()}
        print(to_json({**record_of(output, token_ids=True), **figures}), file=out)
    else:
        print(*([] if streams else (answer.text for answer in output.outputs)), sep="\n\n", file=out)
    if logits_file is not None:
        _save_logits(logits_file, answering.logits)
    speed = "" if tokens_per_s is None else f", then {tokens_per_s:.1f} tokens/s"
    click.echo(
        f"{len(output.prompt_token_ids)} prompt tokens, {num_tokens} output tokens; "
        f"first after {ttft_ms:.0f} ms{speed}; peak memory {peak_memory_bytes() / MIB:.0f} MiB",
        err=True,
    )


def _save_logits(file: BinaryIO, rows: list[np.ndarray]) -> None:
    import numpy as np

    try:
        np.save(file, np.stack(rows))
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


@contextmanager
def _output_of_many(
    path: Path | None, prompts: list[FilePrompt], settings: list[Any], in_order: bool
) -> Iterator[AnswerFile | AnswerStream]:
    """Where the answers to a file of prompts go: a file that keeps those it has, or what can only be written."""
    from qwen_run.commands.answer_file import AnswerFile, AnswerStream, key_of

    if path is not None and (not path.exists() or path.is_file()):
        answers = AnswerFile(path, {prompt.line: key_of(prompt.source, settings) for prompt in prompts}, in_order)
        with closing(answers):
            yield answers
    else:
        with _output(path) as out:
            yield AnswerStream(out, [prompt.line for prompt in prompts] if in_order else None)
