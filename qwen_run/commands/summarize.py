"""``qwen-summarize``: how close an engine is to Hugging Face, as a report and as an exit code a CI job can gate on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_engine.errors import RequestError
from qwen_engine.json_output import command_line
from qwen_plugin import MOST_THREADS
from qwen_run.commands.command import Command, kv_cache_memory_option, max_seq_len_option, print_table, sentence

if TYPE_CHECKING:
    from qwen_run.accuracy.report import Report

REPORTS = Path("reports")

# which options make no sense together, and what is said then
CONTRADICTIONS = (
    ("layers", "reference", "--layers needs the checkpoint in transformers; leave out --reference."),
    ("save_reference", "reference", "--save-reference keeps what --reference only reads; leave one out."),
)


def _check_thresholds(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what is no threshold before anything runs."""
    if texts:
        from qwen_run.accuracy.gate import parse_threshold

        for text in texts:
            try:
                parse_threshold(text)
            except RequestError as error:
                raise click.BadParameter(sentence(error)) from error
    return texts


@click.command(
    cls=Command,
    epilog="""\b
    Exit codes:
      0  passed, or nothing was to be judged
      1  an error
      2  wrong usage
      3  a check or a threshold failed
      4  none failed, and some could not be decided""",
)
@click.option("--engine", type=click.Path(path_type=Path), help="Engine directory.  [default: newest under engines/]")
@click.option("--checkpoint", help="What it was built from.  [default: what its manifest says]")
@click.option("--dataset", default="default", help="scitldr, wikitext2, default (both in turn), or a file.")
@click.option("--document-field", default="document", help="Field of a JSON Lines file that holds the text.")
@click.option("--summary-field", default="summary", help="Field that holds the summary a person wrote.")
@click.option("--max-samples", type=click.IntRange(min=1), default=20, help="Documents to compare.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, help="Longest summary.")
@click.option("--report", type=click.Path(path_type=Path), help="Directory to write.  [default: reports/<engine>]")
@click.option("--check", is_flag=True, help="Judge whether the engine is healthy.")
@click.option("--thresholds", type=click.Path(path_type=Path), metavar="FILE.toml", help="Judge with these instead.")
@click.option(
    "--threshold",
    multiple=True,
    metavar="METRIC<=NUMBER",
    callback=_check_thresholds,
    help="Judge with this too; several may be given.",
)
@click.option(
    "--baseline", type=click.Path(path_type=Path), metavar="REPORT.json", help="Say what changed since this report."
)
@click.option("--save-reference", type=click.Path(path_type=Path), metavar="FILE", help="Keep what the reference says.")
@click.option(
    "--reference", type=click.Path(path_type=Path), metavar="FILE", help="Use what was kept: no torch, no checkpoint."
)
@click.option("--layers", is_flag=True, help="Print the error of every sub-block, and where it starts.")
@click.option("--cost/--no-cost", default=True, help="Measure time and memory of both sides.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted run of the same options left.")
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="Threads of both sides.  [default: physical cores]"
)
@max_seq_len_option
@kv_cache_memory_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def main(
    context: click.Context, /, engine: Path | None, report: Path | None, as_json: bool, layers: bool, **options: Any
) -> None:
    """Compare an engine with Hugging Face: logits, perplexity, generated text, speed.

    \b
    Examples:
      qwen-summarize                                     the newest engine against the checkpoint it was built from
      qwen-summarize --check                             the same as a gate: exit code 3 if it is not healthy
      qwen-summarize --max-samples 50 --save-reference ref.npz
      qwen-summarize --reference ref.npz --check         without torch, transformers and the checkpoint
      qwen-summarize --layers                            where does an error start?
    """
    given = {"layers": layers, **options}
    for one, other, message in CONTRADICTIONS:
        if given[one] and given[other]:
            raise click.UsageError(message)
    from qwen_run.accuracy.assess import AssessOptions, assess
    from qwen_run.accuracy.gate import EXIT_FAILED, exit_code
    from qwen_run.reports.files import write_report
    from qwen_run.runtime.engine import newest_engine

    engine = engine or newest_engine()
    directory = report or REPORTS / engine.resolve().name
    result = assess(engine, directory, AssessOptions(**options, command=command_line("qwen-summarize")))
    write_report(result, directory)
    click.echo(result.to_json()) if as_json else print_report(result, layers)
    share = result.seconds["reference"] / result.seconds["all"]
    click.echo(f"{result.seconds['all']:.0f} s, {share:.0%} of it the reference. Report: {directory}", err=True)
    context.exit(exit_code(result.verdicts) if all(check.passed for check in result.checks) else EXIT_FAILED)


def print_report(report: Report, layers: bool) -> None:
    """Show a report to a person, the verdict last."""
    from qwen_run.reports import tables

    shown = [tables.fidelity_table(report), tables.rouge_table(report), tables.greedy_table(report)]
    shown += [tables.cost_table(report), tables.check_table(report)]
    if report.verdicts:
        shown.append(tables.verdict_table(report.verdicts))
    if report.baseline:
        shown.append(tables.baseline_table(report))
    if layers:
        shown.append(tables.layer_table(report.layers))
    for table in shown:
        if table.rows:
            print_table(table)
    if layers:
        click.echo(tables.jump_sentence(report.layers) + "\n")
    click.echo(tables.headline(report))
