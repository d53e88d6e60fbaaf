"""``qwen-run`` with an engine that writes no text: the embedding, score or classes of each text, a line of JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import tqdm

from qwen_engine.errors import EngineError, RequestError
from qwen_engine.json_output import head, to_json
from qwen_engine.manifest import Manifest
from qwen_engine.tasks import check_task
from qwen_run.api.llm import LLM
from qwen_run.api.pooling import PoolingParams, PoolingRequestOutput
from qwen_run.commands.answer_file import AnswerFile, AnswerStream, Record
from qwen_run.commands.command import MIB, printable
from qwen_run.commands.prompt_file import FilePrompt, parse_prompts
from qwen_run.commands.run_files import open_output, output_of_many
from qwen_run.commands.run_options import RunOptions
from qwen_run.pipeline.staged_engine import open_engine
from qwen_run.runtime.machine import peak_memory_bytes

# what is asked for -> the tasks of engines that can say it; embeddings are compared by their cosine
TASKS_FOR = {"embed": ("embed",), "score": ("score", "embed"), "classify": ("classify",)}
TEXTS_AT_A_TIME = 256  # of a file; what is made of them is written before others are read


def run_pooled(engine: Path, text: str, asked: RunOptions) -> None:
    """Write what is made of ``text``, or of each line of it where it is a file.

    Raises:
        RequestError: the engine is for something else, or a text cannot be read.
        EngineError: the engine is damaged, or cannot run.
    """
    manifest = Manifest.read(engine)
    check_task(manifest.task, *TASKS_FOR[asked.pooled[0]])
    opened = open_engine(
        engine,
        asked.threads,
        cache_bytes=asked.cache_bytes,
        max_seq_len=asked.max_seq_len,
        pipeline_parallel_size=asked.pipeline_parallel_size,
    )
    with LLM(opened) as llm:
        if asked.input_file is None:
            with open_output(asked.output_file) as out:
                (record,) = records_of(llm, [text], asked)
                most = {"peak_memory_bytes": peak_memory_bytes()}
                print(to_json(head("qwen-run", engine) | record | most if asked.as_json else record), file=out)
            return
        prompts = list(parse_prompts(text))
        parts = {name: part.sha256 for name, part in manifest.parts.items()}
        settings = [parts, asked.pooled, asked.score, asked.dimensions, asked.instruction]
        with output_of_many(prompts, settings, asked) as answers:
            _write_all(llm, prompts, answers, asked)


def records_of(llm: LLM, texts: Sequence[str], asked: RunOptions) -> list[dict[str, Any]]:
    """What is made of each of ``texts``, and how many tokens it has.

    Raises:
        RequestError: a text is empty or too long.
        EngineError: a text's output is no number, or the engine cannot run.
    """
    params, made = PoolingParams(dimensions=asked.dimensions), list[dict[str, Any]]()
    if asked.embed:
        for embedded in llm.embed(texts, params, False, instruction=asked.instruction):
            made.append(_record(embedded, embedding=shortest(embedded.outputs.embedding)))
    elif asked.score is not None:
        for scored in llm.score(asked.score, texts, params, False, instruction=asked.instruction):
            made.append(_record(scored, score=scored.outputs.score))
    else:
        for classed in llm.classify(texts, params, False):
            made.append(_record(classed, label=classed.outputs.label, probs=classed.outputs.probs))
    return made


def _record(result: PoolingRequestOutput[Any], **made: Any) -> dict[str, Any]:
    return made | {"input_tokens": len(result.prompt_token_ids)}


def shortest(numbers: Sequence[float]) -> list[float]:
    """Numbers of float32 with as few digits as tell them apart.

    >>> shortest([0.10000000149011612, -2.0])
    [0.1, -2.0]
    """
    return [float(str(number)) for number in np.array(numbers, np.float32)]


def _write_all(llm: LLM, prompts: Sequence[FilePrompt], answers: AnswerFile | AnswerStream, asked: RunOptions) -> None:
    """Write the records of those of ``prompts`` that ``answers`` does not have.

    Raises:
        RequestError: at the end, if some texts could not be read; what was wrong stands in their records.
    """
    waiting = [prompt for prompt in prompts if prompt.line not in answers.answered]
    if done := len(answers.answered):
        click.echo(f"{done} of {len(prompts)} texts are done already", err=True)
    num_failed = sum("error" in record for record in answers.answered.values())
    started_s, num_tokens = time.perf_counter(), 0
    hidden = True if answers.is_terminal else None
    with tqdm.tqdm(total=len(prompts), initial=done, unit="text", disable=hidden) as bar:
        for start in range(0, len(waiting), TEXTS_AT_A_TIME):
            some = waiting[start : start + TEXTS_AT_A_TIME]
            for prompt, record in _records(llm, some, asked):
                if error := record.get("error"):
                    num_failed += 1
                    tqdm.tqdm.write(f"Line {prompt.line}: {printable(error)}", file=sys.stderr)
                num_tokens += record.get("input_tokens", 0)
                answers.write({"line": prompt.line, **({} if prompt.id is None else {"id": prompt.id}), **record})
            bar.update(len(some))
    seconds = time.perf_counter() - started_s
    click.echo(
        f"{len(waiting)} texts, {num_tokens} input tokens in {seconds:.1f} s, {num_tokens / seconds:.1f} tokens/s; "
        f"peak memory {peak_memory_bytes() / MIB:.0f} MiB",
        err=True,
    )
    if num_failed:
        raise RequestError(f"{num_failed} of {len(prompts)} texts could not be read, see their records")


def _records(llm: LLM, prompts: Sequence[FilePrompt], asked: RunOptions) -> Iterator[tuple[FilePrompt, Record]]:
    """The record of each of ``prompts``, in their order: an error for one that cannot be read."""
    texts = {prompt.line: prompt.text for prompt in prompts if _fault(prompt) is None and prompt.text is not None}
    make = partial(records_of, llm, asked=asked)
    records: dict[int, Record] = {}
    try:
        records = dict(zip(texts, make(list(texts.values())), strict=True)) if texts else {}
    except (RequestError, EngineError):  # of one of them: which one is seen when each is alone
        for line, text in texts.items():
            try:
                (records[line],) = make([text])
            except (RequestError, EngineError) as error:
                records[line] = {"error": str(error)}
    for prompt in prompts:
        yield prompt, records.get(prompt.line) or {"error": _fault(prompt)}


def _fault(prompt: FilePrompt) -> str | None:
    """Why a line cannot be used; None: it can."""
    if prompt.error is not None:
        return prompt.error
    if prompt.text is None or prompt.tools or prompt.params:
        others = [*(["messages"] if prompt.messages is not None else []), *(["tools"] if prompt.tools else [])]
        names = " and ".join(f'"{name}"' for name in [*others, *prompt.params])
        return f'{names} are for answers, expected "prompt" and "id" alone'
    return None if prompt.text.strip() else "the text is empty"
