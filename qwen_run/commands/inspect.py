"""``qwen-inspect``: what an engine is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_engine.errors import RequestError
from qwen_engine.json_output import head, rounded, to_json
from qwen_engine.manifest import GRAPH_FILE, Manifest
from qwen_engine.user_cache import FOLDER, Kept, list_kept, remove, user_cache
from qwen_run.commands.command import MIB, Command, SvgFile, printable

if TYPE_CHECKING:
    from qwen_run.inspection.linears import LinearRow, Totals


@click.command("qwen-inspect", cls=Command)
@click.argument("engine", type=click.Path(path_type=Path), required=False)
@click.option(
    "--engine", "named", type=click.Path(path_type=Path), metavar="DIR", help="ENGINE, as other commands spell it."
)
@click.option("--graph", "as_graph", is_flag=True, help="Show the graph as a tree instead.")
@click.option("--stages", type=click.IntRange(1), metavar="N", help="Show what each of N stages would have instead.")
@click.option(
    "--plot",
    type=SvgFile(),
    metavar="FILE.svg",
    help="Draw it too: the bits of every linear by layer, or the graph.",
)
@click.option("--verify", is_flag=True, help="Check the sha256 of every file first.")
@click.option("--list", "as_list", is_flag=True, help="Show instead what is kept in the user's cache directory.")
@click.option("--clean", is_flag=True, help="Remove what --list shows: all of it, or what is named ENGINE there.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def main(
    engine: Path | None,
    named: Path | None,
    as_graph: bool,
    stages: int | None,
    plot: Path | None,
    verify: bool,
    as_list: bool,
    clean: bool,
    as_json: bool,
) -> None:
    """Show how every linear layer of ENGINE is stored, or its graph. Without ENGINE, the newest under engines/.

    Engines that were built on demand and the demo checkpoint are kept in the user's cache directory, $XDG_CACHE_HOME or
    ~/.cache. They are made again when they are needed.

    \b
    Examples:
      qwen-inspect                                    every linear: scheme, bits a weight, size
      qwen-inspect engines/q3 --plot bits.svg         and a picture
      qwen-inspect engines/q3 --graph                 model, layers, blocks, operators
      qwen-inspect engines/q3 --verify --json
      qwen-inspect engines/q3 --stages 4              what --pipeline-parallel-size 4 puts where
      qwen-inspect --list                             what is kept in the cache directory, and its size
      qwen-inspect --clean                            remove that
    """
    if engine is not None and named is not None:
        raise click.UsageError("ENGINE and --engine are the same; give one")
    engine = engine or named
    if stages is not None and (as_graph or plot):
        raise click.UsageError("--stages stands alone, or with --verify and --json")
    if as_list or clean:
        if (as_list and clean) or as_graph or stages or plot or verify:
            raise click.UsageError("--list and --clean stand alone, or with --json")
        kept = _kept(engine)
        if clean:
            kept = _removed(kept)
        click.echo(_kept_json(kept) if as_json else _kept_table(kept, "removed" if clean else "kept"))
        return
    if engine is None:
        from qwen_run.runtime.engine import newest_engine

        engine = newest_engine()
    manifest = Manifest.read(engine)
    if verify:
        from qwen_run.engine_files.checksums import verify_parts

        verify_parts(engine, manifest)
        size_bytes = sum(part.size_bytes for part in manifest.parts.values())
        click.echo(f"All {len(manifest.parts)} parts verified, {size_bytes / MIB:,.1f} MiB.", err=True)
    if stages is not None:
        click.echo(_stages(engine, manifest, stages, as_json))
        return
    shown, picture = _graph(engine, manifest, as_json) if as_graph else _linears(engine, manifest, as_json)
    if plot is not None:
        try:
            plot.write_text(picture, encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{plot} cannot be written: {error.strerror}; choose another --plot") from error
    click.echo(shown)


def _kept(name: Path | None) -> list[Kept]:
    """What is kept in the user's cache directory: all, or what has this name."""
    cache = user_cache()
    found = list_kept(cache)
    if name is None:
        return found
    named = [kept for kept in found if str(name) in (kept.path.name, str(kept.path))]
    if not named:
        raise RequestError(
            f"{cache / FOLDER} keeps nothing of the name {name}; qwen-inspect --list shows what it keeps"
        )
    return named


def _removed(kept: list[Kept]) -> list[Kept]:
    """Remove what no process is building; what that was."""
    gone = []
    for each in kept:
        if remove(each):
            gone.append(each)
        else:
            click.echo(f"Note: {printable(str(each.path))} is being built and stays.", err=True)
    return gone


def _kept_json(kept: list[Kept]) -> str:
    data = [
        {"kind": each.kind, "path": str(each.path), "size_bytes": each.size_bytes, "made": _day(each)} for each in kept
    ]
    return to_json({**head("qwen-inspect", None), "cache": str(user_cache() / FOLDER), "kept": data}, indent=1)


def _kept_table(kept: list[Kept], done: str) -> str:
    cells = [[each.kind, _day(each), f"{each.size_bytes / MIB:,.1f} MiB", printable(each.path.name)] for each in kept]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        f"{kind:{widths[0]}}  {day}  {size:>{widths[2]}}  {name}" for kind, day, size, name in cells
    ]  # the name last, whatever its width
    total = sum(each.size_bytes for each in kept)
    return "\n".join([*lines, f"{total / MIB:,.1f} MiB {done} in {printable(str(user_cache() / FOLDER))}"])


def _day(kept: Kept) -> str:
    return datetime.fromtimestamp(kept.made_s, UTC).strftime("%Y-%m-%d")


def _stages(engine: Path, manifest: Manifest, num_stages: int, as_json: bool) -> str:
    """What each stage would have."""
    from qwen_run.inspection.stages import stage_lines, stage_rows

    rows = stage_rows(engine, manifest, num_stages)
    if as_json:
        return to_json({**head("qwen-inspect", engine), "stages": [asdict(row) for row in rows]}, indent=1)
    return "\n".join(stage_lines(rows))


def _graph(engine: Path, manifest: Manifest, as_json: bool) -> tuple[str, str]:
    """The graph as text and as a picture."""
    from qwen_run.engine_files.onnx_file import read_graph
    from qwen_run.inspection.graph import draw_lines, draw_tree, folded, tree

    root = tree(read_graph(engine / GRAPH_FILE), manifest.name)
    data = {**head("qwen-inspect", engine), **root.to_data()}
    text = to_json(data, indent=1) if as_json else "\n".join(map(printable, draw_lines(folded(root))))
    return text, draw_tree(folded(root))


def _linears(engine: Path, manifest: Manifest, as_json: bool) -> tuple[str, str]:
    """The linears as text and as a picture."""
    from qwen_run.inspection.linears import draw_bits, linear_rows, totals

    rows = linear_rows(manifest)
    whole = totals(manifest, rows)
    title = f"{manifest.name}: {whole.bits_per_weight:.2f} bits a weight, {whole.stored_bytes / MIB:,.1f} MiB"
    data = {
        **head("qwen-inspect", engine),
        "linears": rounded([asdict(row) for row in rows]),
        "totals": rounded(asdict(whole)),
        "rope_type": manifest.model.rope_type,
        "rope_words": manifest.model.rope_words,
    }
    return to_json(data, indent=1) if as_json else _table(rows, whole, manifest.model.rope_words), draw_bits(
        title, rows
    )


def _table(rows: Sequence[LinearRow], whole: Totals, rope: str | None) -> str:
    """The linears in columns, what they take together, and what to know of the rotation of positions."""
    calibrated = any(row.output_error is not None for row in rows)
    head = ["linear", "shape", "scheme", "bits", "MiB", *(["error"] if calibrated else []), ""]
    cells = [head]
    for row in rows:
        error = [] if not calibrated else ["" if row.output_error is None else f"{row.output_error:.2%}"]
        cells.append(
            [
                printable(row.name),
                f"{row.out_features}x{row.in_features}",
                printable(row.scheme),
                f"{row.bits_per_weight:.2f}",
                f"{row.stored_bytes / MIB:.2f}",
                *error,
                "shared with the embedding" if row.shared else "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines) + (
        f"\n\nlinears  {whole.weights / 1e6:,.1f} M weights, {whole.stored_bytes / MIB:,.1f} MiB, "
        f"{whole.bits_per_weight:.2f} bits a weight\n"
        f"others   {whole.other_bytes / MIB:,.1f} MiB: norms, biases, rotary tables, padding"
        + (f"\n{printable(rope)}" if rope else "")
    )


if __name__ == "__main__":
    main()
