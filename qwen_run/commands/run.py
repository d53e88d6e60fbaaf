"""``qwen-run``: answer prompts, or chat, with an engine."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_engine.errors import RequestError
from qwen_plugin import MOST_THREADS
from qwen_run.commands.command import (
    Command,
    kv_cache_memory_option,
    max_seq_len_option,
    pipeline_parallel_size_option,
    printable,
    sentence,
)
from qwen_run.commands.run_options import CONTRADICTIONS, RunOptions, option_of

# What runs a model takes most of a second to import: the functions below do it when help and usage are done with.
if TYPE_CHECKING:
    from qwen_run.api.llm import LLM
    from qwen_run.api.pending_request import PendingRequest
    from qwen_run.commands.prompt_file import FilePrompt
    from qwen_run.sampling.params import SamplingParams
    from qwen_run.text.text_model import TextModel


@click.command("qwen-run", cls=Command)
@click.argument("prompt", required=False)
@click.option("--engine", type=click.Path(path_type=Path), help="Engine directory.  [default: newest under engines/]")
@click.option("--input-text", metavar="TEXT", help="The same as PROMPT.")
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
@click.option("--retry-errors", is_flag=True, help="Ask again what --output-file holds an error for.")
@click.option("--as-finished", is_flag=True, help="Answers to --input-file come as they are known, in any order.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--raw", is_flag=True, help="Send prompts as they are, without the chat template.")
@click.option(
    "--thinking/--no-thinking", default=None, help="Whether to think first.  [default: as the template has it]"
)
@click.option("--max-new-tokens", type=int, help="Most tokens of an answer.  [default: the engine's, else 512]")
@click.option("--temperature", type=float, help="0 takes the likeliest token.  [default: the engine's, else 0]")
@click.option(
    "--top-p",
    type=float,
    help="Sample among the likeliest tokens that reach this probability; 1 is off.  [default: the engine's, else 1]",
)
@click.option(
    "--top-k", type=int, help="Sample among this many likeliest tokens; 0 is off.  [default: the engine's, else 50]"
)
@click.option(
    "--min-p",
    type=float,
    help="Least probability, as a share of the likeliest token's; 0 is off.  [default: the engine's, else 0]",
)
@click.option(
    "--repetition-penalty",
    type=float,
    help="Above 1 makes tokens seen before less likely.  [default: the engine's, else 1]",
)
@click.option("--presence-penalty", type=float, help="Above 0 makes tokens of the answer less likely.  [default: 0]")
@click.option("--frequency-penalty", type=float, help="The same, for each time a token is there.  [default: 0]")
@click.option("--seed", type=int, help="Same seed, same answer.  [default: drawn; --json tells it]")
@click.option("-n", "--n", "n", type=int, help="Answers to each prompt.  [default: 1]")
@click.option("--num-beams", type=int, help="Width of a beam search.  [default: 1, off]")
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End an answer before this text; may be given again.  [default: the engine's]",
)
@click.option("--min-tokens", type=int, help="Tokens an answer has before it may end.  [default: the engine's, else 0]")
@click.option("--ignore-eos", is_flag=True, default=None, help="Answers end at --max-new-tokens or --stop alone.")
@click.option(
    "--logprobs", type=int, metavar="N", help="Report how likely tokens were, and the N likeliest.  [default: none]"
)
@click.option(
    "--json-schema",
    metavar="FILE",
    help="Answers are JSON that keeps to this schema, from where thinking ends; needs llguidance.",
)
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="Threads of a run.  [default: physical cores]")
@kv_cache_memory_option
@max_seq_len_option
@pipeline_parallel_size_option
@click.option(
    "--draft-tokens",
    type=click.IntRange(0, 64),
    help="Most tokens to guess ahead from what the text repeats, 0 for none; answers stay the same.  [default: 8]",
)
@click.option("--embed", is_flag=True, help="Write the embedding of each text, a line of JSON; of an engine for that.")
@click.option("--score", metavar="QUERY", help="The same of how well each text answers QUERY.")
@click.option("--classify", is_flag=True, help="The same of each text's classes.")
@click.option(
    "--dimensions", type=click.IntRange(1), help="First numbers of an embedding to write.  [default: all of them]"
)
@click.option(
    "--instruction", metavar="TEXT", help="What queries are for, to --embed and --score.  [default: the model's]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the answer with counts and timing as one JSON object.")
@click.option(
    "--output-logits",
    type=click.Path(path_type=Path),
    metavar="FILE.npy",
    help="Write the logits each token of the answer was chosen from, its end included: (n, vocab) float32.",
)
def main(**given: Any) -> None:
    """Answer PROMPT, or many prompts, with an engine that qwen-build made.

    Without a prompt, and with a terminal, this is an interactive chat (:help lists its commands). What comes through a
    pipe is the prompt, or stands after PROMPT and an empty line. Sampling defaults come from the checkpoint's
    generation_config.json. Results go to standard output; timing, peak memory and progress to standard error.

    \b
    Examples:
      qwen-run                                         chat with the newest engine under engines/
      qwen-run "What is a paged cache?"                one answer, streamed
      cat report.txt | qwen-run "Summarise this:"      the prompt, an empty line, and what comes through the pipe
      qwen-run --temperature 0.7 --seed 1 < essay.txt  the whole of standard input is the prompt
      qwen-run --engine engines/q3 --input-file questions.jsonl --output-file answers.jsonl
                                                       many; run again, it goes on where it stopped
      qwen-run --engine engines/e --embed --input-file texts.txt
                                                       embeddings, a line of JSON for each
    """
    asked = _options(given)
    for excluded, message in CONTRADICTIONS:
        if excluded(asked):
            raise click.UsageError(message)
    if asked.pooled and (idle := asked.of_answers):
        raise click.UsageError(f"--{asked.pooled[0]} writes no answer; leave out {' and '.join(idle)}.")
    from qwen_run.commands.run_files import check_written, prompt_text, read_schema
    from qwen_run.runtime.engine import newest_engine

    sampling = _checked_sampling(asked.sampling)
    if asked.json_schema is not None:
        sampling["structured_outputs"] = read_schema(asked.json_schema)
    text = None if asked.interactive else prompt_text(asked)
    _check_not_empty(text)
    engine = asked.engine or newest_engine()
    check_written(engine, asked)
    if asked.pooled:
        from qwen_run.commands.run_pooled import run_pooled

        assert text is not None  # else it was refused
        return run_pooled(engine, text, asked)
    model, params = _load(engine, asked, sampling)
    if text is None:
        _chat(engine, model, params, asked)
    elif asked.input_file is None:
        _answer_one(engine, model, text, params, asked)
    else:
        _answer_file(model, text, params, asked)


def _options(given: dict[str, Any]) -> RunOptions:
    from qwen_run.text.encoding import decode_utf8

    names = {field.name for field in dataclasses.fields(RunOptions)}
    sampling = {name: value for name, value in given.items() if name not in names}
    own = {name: value for name, value in given.items() if name in names}
    if own["system"] is not None:  # an argument may hold bytes the locale cannot decode
        own["system"] = decode_utf8(os.fsencode(own["system"]), "--system")
    unprompted = all(own[name] is None for name in ("prompt", "input_text", "input_file"))
    return RunOptions(**own, sampling=sampling, interactive=unprompted and sys.stdin.isatty())


def _checked_sampling(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams that options set; what is out of range is refused as the option parser does."""
    from qwen_run.sampling.rules import checked

    fields = {}
    for name, value in sampling.items():
        if value is not None and value != ():  # not given, or not once
            field = "max_tokens" if name == "max_new_tokens" else name
            try:
                fields[field] = checked(field, value)
            except RequestError as error:
                raise click.BadParameter(sentence(error), param_hint=f"'{option_of(name)}'") from error
    return fields


def _load(engine: Path, asked: RunOptions, sampling: dict[str, Any]) -> tuple[TextModel, SamplingParams]:
    """The model, and its sampling defaults with what the user asked for over them."""
    from qwen_run.text.text_model import TextModel

    model = TextModel.load(
        engine, asked.threads, asked.raw, asked.cache_bytes, asked.max_seq_len, asked.pipeline_parallel_size
    )
    try:
        params = model.defaults.with_options(**sampling)
    except RequestError as error:  # each is in its range
        raise click.UsageError(sentence(error)) from error
    idle = [option_of(name) for name in ("top_p", "top_k", "min_p", "seed") if name in sampling]
    if params.greedy and idle:
        click.echo(f"Note: {' and '.join(idle)} without effect at temperature 0; add --temperature.", err=True)
    return model, params


def _chat(engine: Path, model: TextModel, params: SamplingParams, asked: RunOptions) -> None:
    from qwen_run.api.llm import LLM
    from qwen_run.commands import console

    click.echo(f"Chat with {printable(str(engine))}.")
    console.run(console.Console(LLM(model), params, asked.system, _variables(asked)))


def _answer_one(engine: Path, model: TextModel, text: str, params: SamplingParams, asked: RunOptions) -> None:
    from qwen_engine.json_output import head
    from qwen_run.api.llm import LLM
    from qwen_run.commands.one_answer import answer_one, open_logits
    from qwen_run.commands.prompt_file import FilePrompt
    from qwen_run.commands.run_files import open_output

    llm = LLM(model, keep_logits=asked.output_logits is not None, **_guessing(asked))
    answering = _prepare(llm, FilePrompt(1, text, text), params, asked)
    json_head = head("qwen-run", engine) if asked.as_json else None
    with open_logits(asked.output_logits) as logits_file, open_output(asked.output_file) as out:
        answer_one(llm, answering, out, json_head, logits_file)


def _answer_file(model: TextModel, text: str, params: SamplingParams, asked: RunOptions) -> None:
    from qwen_run.api.llm import LLM
    from qwen_run.commands.answer_file import answer_all
    from qwen_run.commands.prompt_file import parse_prompts
    from qwen_run.commands.run_files import output_of_many

    llm, prompts = LLM(model, **_guessing(asked)), list(parse_prompts(text))
    parts = {name: part.sha256 for name, part in model.engine.manifest.parts.items()}
    settings = [parts, dataclasses.asdict(params), asked.system, asked.raw, _variables(asked)]
    with output_of_many(prompts, settings, asked) as answers:
        answer_all(llm, prompts, partial(_prepare, llm, params=params, asked=asked), answers)


def _variables(asked: RunOptions) -> dict[str, Any]:
    """What the chat template is told."""
    return {} if asked.thinking is None else {"enable_thinking": asked.thinking}


def _guessing(asked: RunOptions) -> dict[str, Any]:
    return {} if asked.draft_tokens is None else {"max_drafts": asked.draft_tokens}


def _prepare(llm: LLM, prompt: FilePrompt, params: SamplingParams, asked: RunOptions) -> PendingRequest:
    """What a line of a file, or the one prompt, asks of the model.

    Raises:
        RequestError: the model cannot answer that.
    """
    if prompt.error is not None:
        raise RequestError(prompt.error)
    _check_not_empty(prompt.text)
    params = params.with_options(**prompt.params)
    if llm.has_template:
        messages = [{"role": "user", "content": prompt.text}] if prompt.messages is None else list(prompt.messages)
        if asked.system is not None and messages and messages[0].get("role") not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": asked.system})
        return llm.prepare(llm.chat_prompt(messages, prompt.tools, **_variables(asked)), params)
    if prompt.text is None:
        raise RequestError('"messages" need the chat template; leave out --raw')
    return llm.prepare(prompt.text, params)


def _check_not_empty(text: str | None) -> None:
    if text is not None and not text.strip():
        raise RequestError("the prompt is empty, expected text")
