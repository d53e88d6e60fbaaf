"""What ``qwen-build`` says of a plan and of an engine: to a person, or as JSON."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click

from qwen_engine.json_output import head, rounded, to_json
from qwen_engine.manifest import WEIGHTS_FILE, Manifest, Quantization
from qwen_engine.tasks import GENERATE, TASKS
from qwen_run.commands.command import printable
from qwen_run.engine_files.experts import ExpertTotals, expert_totals, read_bytes
from qwen_run.runtime.machine import peak_memory_bytes

MIB = 2**20


def summarize(output: Path, target: Path, checkpoint_bytes: int, seconds: float) -> dict[str, Any]:
    """What was built, as plain data; ``output`` as the user spells ``target``."""
    manifest = Manifest.read(target)
    return {
        "engine": str(output),
        "engine_bytes": sum(path.stat().st_size for path in target.iterdir()),
        "weights_bytes": (target / WEIGHTS_FILE).stat().st_size,
        "checkpoint_bytes": checkpoint_bytes,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "has_tokenizer": (target / "tokenizer.json").is_file(),
        "cache_bytes_per_token": manifest.cache.bytes_per_token,
        "max_seq_len": manifest.limits.max_seq_len,
        "rope_type": manifest.model.rope_type,
        "rope_words": manifest.model.rope_words,
        "task": manifest.task,
    }


def describe(plan: Any) -> dict[str, Any]:
    """A plan as plain data: every linear, and the totals."""
    linears = plan.linears
    experts = expert_totals(linears, plan.config)
    return {
        "checkpoint": plan.located.source,
        "dtype": plan.dtype,
        "model_type": plan.config.model_type,
        "task": plan.config.task,
        "linears": [
            {
                "name": linear.name,
                "out_features": linear.out_features,
                "in_features": linear.in_features,
                **vars(linear.quantization),
                "stored_bytes": linear.stored_bytes,
            }
            for linear in linears
        ],
        "experts": experts and asdict(experts),
        "read_bytes_per_token": sum(read_bytes(linear, plan.config) for linear in linears),
        "tied": plan.head_is_shared,
        "weights_bytes": plan.layout.size_bytes,
        "cache_bytes_per_token": plan.cache_bytes_per_token,
        "max_seq_len": plan.max_seq_len,
        "build_memory_bytes": plan.build_memory_bytes,
    }


def print_table(description: dict[str, Any]) -> None:
    """Show a dry run to a person."""
    linears = description["linears"]
    schemes = [Quantization(**{f.name: linear[f.name] for f in fields(Quantization)}).words for linear in linears]
    width, words = max(len(linear["name"]) for linear in linears), max(map(len, schemes))
    click.echo(f"{'linear':{width}}  {'shape':>15}  {'scheme':{words}}  {'MiB':>9}")
    for linear, scheme in zip(linears, schemes, strict=True):
        shape = f"{linear['out_features']}x{linear['in_features']}"
        shared = "  shared with the embedding" if description["tied"] and linear["name"] == "lm_head" else ""
        size = f"{linear['stored_bytes'] / MIB:9.2f}"
        click.echo(f"{linear['name']:{width}}  {shape:>15}  {scheme:{words}}  {size}{shared}")
    token_bytes, tokens = description["cache_bytes_per_token"], description["max_seq_len"]
    experts = ExpertTotals(**description["experts"]) if description["experts"] else None
    click.echo(
        f"\nweights       {description['weights_bytes'] / MIB:,.1f} MiB"
        + (f", {experts.stored_bytes / MIB:,.1f} of experts: {experts.words}" if experts else "")
        + f"\na token reads {description['read_bytes_per_token'] / MIB:,.1f} MiB of them\n"
        f"cache         {token_bytes / 2**10:,.1f} KiB a token, {token_bytes * tokens / MIB:,.0f} MiB for {tokens}\n"
        f"build memory  about {description['build_memory_bytes'] / MIB:,.0f} MiB"
    )


def print_summary(summary: dict[str, Any]) -> None:
    """Show what was built to a person."""
    engine, checkpoint = summary["engine_bytes"], summary["checkpoint_bytes"]
    token_bytes, tokens = summary["cache_bytes_per_token"], summary["max_seq_len"]
    if not summary["has_tokenizer"]:
        click.echo("Note: the checkpoint has no tokenizer.json, so this engine takes token ids only.", err=True)
    click.echo(
        f"{printable(summary['engine'])}: {engine / MIB:,.1f} MiB, {engine / checkpoint:.0%} of the checkpoint; "
        f"{summary['seconds']} s, peak memory {summary['peak_memory_bytes'] / MIB:,.0f} MiB\n"
        f"a sequence may have {tokens} tokens, which take {token_bytes * tokens / MIB:,.0f} MiB of cache; "
        "run it with --max-seq-len for fewer"
    )
    if words := summary["rope_words"]:
        click.echo(words)
    if (task := summary["task"]) != GENERATE:
        click.echo(f"it {TASKS[task].does}; ask it with {TASKS[task].ask}")
    if stored_as := summary.get("stored_as"):
        click.echo(stored_as)
    if auto := summary.get("auto"):
        click.echo(
            f"{auto['budget']}: mean KL {auto['held_out_kl']:.3g} on {auto['held_out_tokens']:,} tokens of "
            f"{printable(auto['held_out'])}; {auto['calibration_kl']:.3g} on calibration text, "
            f"{auto['predicted_kl']:.3g} predicted\nwhat was chosen and why: {printable(auto['page'])} in the engine"
        )


def print_json(value: dict[str, Any], engine: Path | None) -> None:
    """Print what every command's JSON begins with, and ``value``."""
    rest = {name: each for name, each in value.items() if name != "engine"}
    click.echo(to_json({**head("qwen-build", engine), **rounded(rest)}, indent=1))
