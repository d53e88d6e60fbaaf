"""``qwen-bench``: how fast an engine is, with one request, with many at once, with many as time goes by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qwen_engine.errors import RequestError
from qwen_engine.json_output import command_line
from qwen_plugin import MOST_THREADS
from qwen_run.commands.command import (
    Command,
    SvgFile,
    kv_cache_memory_option,
    max_seq_len_option,
    pipeline_parallel_size_option,
)

# What runs a model takes most of a second to import: the functions below do it when help and usage are done with.
if TYPE_CHECKING:
    from qwen_run.bench.load import Load
    from qwen_run.bench.measure import Setting

F = TypeVar("F", bound=Callable[..., Any])


class Numbers(click.ParamType[tuple[float, ...]]):
    """One number or several, with commas between them."""

    name = "N[,N...]"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            self.fail(f"{value!r} is not numbers above 0 with commas between them", param, ctx)
        return numbers


class Group(Command, click.Group):
    """Subcommands that all behave as :class:`Command`."""

    command_class = Command


def common_options(function: F) -> F:
    """What every benchmark takes."""
    for option in reversed(
        (
            click.option(
                "--engine", type=click.Path(path_type=Path), help="Engine directory.  [default: newest under engines/]"
            ),
            click.option("--compare", type=click.Choice(["hf"]), help="Measure transformers beside it, in turns."),
            click.option("--checkpoint", help="What transformers loads.  [default: what the engine was built from]"),
            click.option(
                "--hf-dtype",
                type=click.Choice(["float32", "bfloat16"]),
                help="What transformers computes in.  [default: bfloat16, float32 beside an engine of float32]",
            ),
            click.option(
                "--threads", type=click.IntRange(1, MOST_THREADS), help="Of every side.  [default: physical cores]"
            ),
            click.option(
                "--max-batch-tokens", type=click.IntRange(min=1), default=256, help="Most tokens of the engine's step."
            ),
            max_seq_len_option,
            pipeline_parallel_size_option,
            kv_cache_memory_option,
            click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the random prompts."),
            click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object."),
        )
    ):
        function = option(function)
    return function


def repeat_option(default: int) -> Callable[[F], F]:
    return click.option("--repeat", type=click.IntRange(min=1), default=default, help="Runs of every side, in turns.")


def length_options(input_tokens: int, output_tokens: int) -> Callable[[F], F]:
    length = click.IntRange(min=1)

    def add(function: F) -> F:
        output = click.option("--output-length", type=length, default=output_tokens, help="New tokens of a request.")
        return click.option("--input-length", type=length, default=input_tokens, help="Tokens of a prompt.")(
            output(function)
        )

    return add


plot_option = click.option("--plot", type=SvgFile(), metavar="FILE.svg", help="Draw it too.")


@click.group(cls=Group)
def main() -> None:
    """Measure how fast an engine is.

    \b
    Examples:
      qwen-bench latency                                   one request: time to first token, time per token
      qwen-bench latency --input-length 2000 --compare hf  transformers beside it, in turns
      qwen-bench throughput --batch 1,4,16 --plot grows.svg
      qwen-bench serve-trace --rate 1,2,4 --plot load.svg  requests that come as time goes by
      qwen-bench serve --url http://127.0.0.1:8000         a server, ours or another
    """


@main.command()
@click.option("--batch", type=click.IntRange(min=1), default=1, help="Requests at once.")
@length_options(512, 64)
@repeat_option(5)
@common_options
def latency(batch: int, input_length: int, output_length: int, repeat: int, **options: Any) -> None:
    """Time to the first token and for each one after it, of one shape.

    \b
    Examples:
      qwen-bench latency
      qwen-bench latency --batch 4 --input-length 1000 --output-length 128 --json
    """
    from qwen_run.bench.measure import Setting
    from qwen_run.bench.trace import at_once

    run("latency", [Setting(at_once(batch, input_length, output_length), batch=batch)], repeat, batch, **options)


@main.command()
@click.option("--batch", type=Numbers(int), default="16", help="Requests at once, one setting each.")
@length_options(128, 64)
@repeat_option(3)
@plot_option
@common_options
def throughput(batch: tuple[int, ...], input_length: int, output_length: int, repeat: int, **options: Any) -> None:
    """Output tokens a second of many requests at once.

    \b
    Examples:
      qwen-bench throughput --batch 1,2,4,8,16,32 --plot grows.svg
      qwen-bench throughput --compare hf --batch 8
    """
    from qwen_run.bench.measure import Setting
    from qwen_run.bench.trace import at_once

    settings = [Setting(at_once(count, input_length, output_length), batch=count) for count in batch]
    run("throughput", settings, repeat, max(batch), **options)


@main.command("serve-trace")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE.csv",
    help="Lines of arrival_s,input_tokens,output_tokens below a line of these names; or TIMESTAMP,ContextTokens,"
    "GeneratedTokens.  [default: a shipped one of 64 short requests, two a second]",
)
@click.option(
    "--rate", type=Numbers(float), help="Requests a second, one setting each.  [default: as the trace has it]"
)
@click.option("--requests", type=click.IntRange(min=1), help="Take only the first so many.  [default: all]")
@click.option("--max-batch-size", type=click.IntRange(min=1), default=16, help="Most requests answered together.")
@plot_option
@common_options
def serve_trace(
    trace: Path | None,
    rate: tuple[float, ...] | None,
    requests: int | None,
    max_batch_size: int,
    **options: Any,
) -> None:
    """Latency of requests that arrive as a trace says, in real time.

    \b
    Examples:
      qwen-bench serve-trace --rate 0.5,1,2,4 --plot load.svg
      qwen-bench serve-trace --trace AzureLLMInferenceTrace_conv.csv --requests 100 --rate 0.2
    """
    from qwen_run.bench.measure import Setting
    from qwen_run.bench.trace import SAMPLE_TRACE, at_rate, mean_rate, read_trace

    arrivals = read_trace(trace or SAMPLE_TRACE, requests)
    settings = [Setting(at_rate(arrivals, each), rate=each) for each in rate or ()]
    settings = settings or [Setting(arrivals, rate=mean_rate(arrivals))]
    if options["plot"] and settings[0].rate is None:
        raise RequestError("all requests of the trace arrive at once: there is no rate to draw latency against")
    run("serve-trace", settings, 1, max_batch_size, **options)


@main.command()
@click.option("--url", default="http://127.0.0.1:8000", help="Where the server is.")
@click.option("--model", default="any", help="The name that requests carry.")
@click.option("--api-key", envvar="QWEN_API_KEY", help="What the server asks for.")
@click.option("--concurrency", type=click.IntRange(min=1), default=1, help="Requests at once, each after another.")
@click.option("--requests", type=click.IntRange(min=1), help="How many.  [default: 8 for each at once; the trace's]")
@length_options(128, 64)
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE.csv", help="Send them as a trace says instead.")
@click.option("--rate", type=float, help="Requests a second of the trace.  [default: as the trace has it]")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the random prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object, with vLLM's names.")
def serve(**given: Any) -> None:
    """Times of a server that speaks OpenAI's interface: qwen-serve, vLLM, llama-server.

    \b
    Examples:
      qwen-bench serve --concurrency 16
      qwen-bench serve --url http://127.0.0.1:8080 --trace AzureLLMInferenceTrace_conv.csv --requests 100 --rate 0.5
    """
    from qwen_engine.json_output import head, rounded, to_json
    from qwen_run.bench.load import TIMES, run_load
    from qwen_run.commands.command import print_table

    load = _load_of(**given)
    figures = run_load(load)
    found = figures.to_dict()
    if given["as_json"]:
        asked = {"url": given["url"], "model_id": load.model, "num_prompts": len(load.arrivals)}
        asked |= {"max_concurrency": load.concurrency, "request_rate": given["rate"]}
        click.echo(to_json(rounded({**head("qwen-bench", None), "benchmark": "serve", **asked, **found}), indent=2))
        return
    failed = f", {found['failed']} failed" if found["failed"] else ""
    click.echo(
        f"{found['completed']} requests in {found['duration']:.1f} s{failed}; "
        f"{found['output_throughput']:.1f} output tokens/s, {found['request_throughput']:.2f} requests/s\n"
    )
    print_table(figures.table())
    for shown, meaning in TIMES.values():
        click.echo(f"{shown}: {meaning}")


def _load_of(**given: Any) -> Load:
    """What is asked of the server.

    Raises:
        RequestError: the URL or the trace is none.
    """
    from qwen_run.bench.http_client import Address
    from qwen_run.bench.load import Load
    from qwen_run.bench.trace import at_once, at_rate, read_trace

    if given["rate"] is not None and given["trace"] is None:
        raise click.UsageError("--rate needs a --trace.")
    address = Address.of(given["url"])
    if given["trace"] is None:
        count = given["requests"] or 8 * given["concurrency"]
        arrivals, concurrency = at_once(count, given["input_length"], given["output_length"]), given["concurrency"]
    else:
        arrivals, concurrency = read_trace(given["trace"], given["requests"]), None
        arrivals = arrivals if given["rate"] is None else at_rate(arrivals, given["rate"])
    return Load(address, arrivals, concurrency, given["model"], given["api_key"], given["seed"])


def run(
    benchmark: str,
    settings: Sequence[Setting],
    repeat: int,
    max_batch_size: int,
    as_json: bool,
    plot: Path | None = None,
    **options: Any,
) -> None:
    """Measure, draw and print."""
    from qwen_run.bench.measure import BenchOptions, measure
    from qwen_run.bench.report import PLOTS, definition_lines, result_table
    from qwen_run.commands.command import print_table

    if plot and not plot.absolute().parent.is_dir():  # before minutes of measuring
        raise RequestError(f"{plot} cannot be written: {plot.parent} is no directory; make it first")
    command = command_line("qwen-bench")
    bench = measure(benchmark, settings, repeat, max_batch_size, BenchOptions(**options), command)
    if plot:
        try:
            plot.write_text(PLOTS[benchmark](bench), encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{plot} cannot be written: {error.strerror}") from error
    if as_json:
        click.echo(bench.to_json())
        return
    print_table(result_table(bench))
    for line in definition_lines(bench):
        click.echo(line)


if __name__ == "__main__":
    main()
