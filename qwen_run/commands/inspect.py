"""``qwen-inspect``: what an engine is made of."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qwen_engine.errors import RequestError
from qwen_engine.manifest import GRAPH_FILE, Manifest
from qwen_run.commands.command import Command, printable

ENGINES = Path("engines")


@click.command("qwen-inspect", cls=Command)
@click.argument("engine", type=click.Path(path_type=Path), required=False)
@click.option("--graph", "as_graph", is_flag=True, help="Show the graph as a tree instead.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.svg",
    help="Draw it too: the bits of every linear by layer, or the graph.",
)
@click.option("--verify", is_flag=True, help="Check the sha256 of every file first.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def main(engine: Path | None, as_graph: bool, plot: Path | None, verify: bool, as_json: bool) -> None:
    """Show how every linear layer of ENGINE is stored, or its graph. Without ENGINE, the newest under engines/.

    \b
    Examples:
      qwen-inspect                                    every linear: scheme, bits a weight, size
      qwen-inspect engines/q3 --plot bits.svg         and a picture
      qwen-inspect engines/q3 --graph                 model, layers, blocks, operators
      qwen-inspect engines/q3 --verify --json
    """
    if engine is None:
        from qwen_run.runtime.engine import newest_engine

        engine = newest_engine(ENGINES)
    manifest = Manifest.read(engine)
    if verify:
        from qwen_run.engine_files.checksums import verify_parts

        verify_parts(engine, manifest)
        size_bytes = sum(part.size_bytes for part in manifest.parts.values())
        click.echo(f"All {len(manifest.parts)} parts verified, {size_bytes / 1e6:,.1f} MB.", err=True)
    shown, picture = _graph(engine, manifest, as_json) if as_graph else _linears(manifest, as_json)
    if plot is not None:
        try:
            plot.write_text(picture, encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{plot} cannot be written: {error.strerror}; choose another --plot") from error
    click.echo(shown)


def _graph(engine: Path, manifest: Manifest, as_json: bool) -> tuple[str, str]:
    """The graph as text and as a picture."""
    from qwen_run.engine_files.onnx_file import read_graph
    from qwen_run.inspection.graph import draw_lines, draw_tree, folded, tree

    root = tree(read_graph(engine / GRAPH_FILE), manifest.name)
    text = json.dumps(root.to_data(), indent=1) if as_json else "\n".join(map(printable, draw_lines(folded(root))))
    return text, draw_tree(folded(root))


def _linears(manifest: Manifest, as_json: bool) -> tuple[str, str]:
    """The linears as text and as a picture."""
    from qwen_run.inspection.linears import Totals, draw_bits, linear_rows, totals

    rows = linear_rows(manifest)
    whole: Totals = totals(manifest, rows)
    title = f"{manifest.name}: {whole.bits_per_weight:.2f} bits a weight, {whole.stored_bytes / 1e6:,.1f} MB"
    data: dict[str, Any] = {
        "name": manifest.name,
        "linears": [asdict(row) for row in rows],
        "totals": asdict(whole),
    }
    return json.dumps(data, indent=1) if as_json else _table(rows, whole), draw_bits(title, rows)


def _table(rows: Any, whole: Any) -> str:
    calibrated = any(row.output_error is not None for row in rows)
    head = ["linear", "shape", "scheme", "bits", "MB", *(["error"] if calibrated else []), ""]
    cells = [head]
    for row in rows:
        error = [] if not calibrated else ["" if row.output_error is None else f"{row.output_error:.2%}"]
        cells.append(
            [
                printable(row.name),
                f"{row.out_features}x{row.in_features}",
                printable(row.scheme),
                f"{row.bits_per_weight:.2f}",
                f"{row.stored_bytes / 1e6:.2f}",
                *error,
                "shared with the embedding" if row.shared else "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines) + (
        f"\n\nlinears  {whole.weights / 1e6:,.1f} M weights, {whole.stored_bytes / 1e6:,.1f} MB, "
        f"{whole.bits_per_weight:.2f} bits a weight\n"
        f"others   {whole.other_bytes / 1e6:,.1f} MB: norms, biases, rotary tables, padding"
    )


if __name__ == "__main__":
    main()
