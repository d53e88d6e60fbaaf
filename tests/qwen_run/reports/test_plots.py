"""Pictures as files of their own: readable where there is no browser, with title, machine and date."""

import re
import xml.etree.ElementTree as ET

import click
import pytest
from click.testing import CliRunner

from qwen_run.commands.command import SvgFile
from qwen_run.inspection.linears import LinearRow, draw_bits
from qwen_run.reports import plots, svg

SERIES = {"a rather long name of an engine & its settings": [(1.0, 2.0), (2.0, 3.0)], "b": [(1.0, 1.0), (2.0, 1.5)]}
NOTES = ["A processor at 3.5 GHz, 8 threads, 2026-01-01; " + "package 1.2.3, " * 9]
BARS = [("an engine of a name that is far longer than fifteen letters", 1.0, "100"), ("peer", 0.5, "50")]
DRAWN = {
    "lines": plots.line_plot("Speed", "x", "y", SERIES, NOTES),
    "points": plots.scatter_plot("Speed", "x", "y", SERIES, NOTES),
    "bars": plots.stacked([svg.bars("one", BARS, "%"), svg.bars("two", BARS, "%")], "Speed", NOTES),
}
NAMES = [*SERIES, *(name for name, _, _ in BARS)]


def texts(picture):
    return [element.text for element in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("picture", DRAWN.values(), ids=DRAWN)
def test_colours_need_no_browser(picture):
    """Converters know neither CSS variables nor media queries: lines would be unseen, bars black."""
    assert not re.search(r"var\(|@media|--\w", picture)
    style = re.search(r"<style>(.*?)</style>", picture)[1]
    for classes in set(re.findall(r'class="([^"]+)"', picture)):
        assert "." + classes.replace(" ", ".") in style
    assert '<rect width="100%" height="100%" fill="#fff"/>' in picture


@pytest.mark.parametrize("picture", DRAWN.values(), ids=DRAWN)
def test_a_picture_says_what_it_shows_and_where_and_when(picture):
    shown = texts(picture)
    assert shown[0] == "Speed"
    assert " ".join(NOTES[0].split()) in " ".join(shown)
    assert [name for name in NAMES if name in shown] == (NAMES[2:] if 'class="bar' in picture else NAMES[:2])


def test_names_have_room():
    """In a drawing of bars every name ends where the bars begin, and begins inside of the picture."""
    picture = DRAWN["bars"]
    width = float(re.search(r'viewBox="0 0 (\S+) ', picture)[1])
    start = float(re.search(r'class="bar s0" x="([^"]+)"', picture)[1])
    assert svg.CHARACTER_WIDTH * len(BARS[0][0]) < start < width - 200


def test_stacked_drawings_do_not_overlap():
    tops = [float(top) for top in re.findall(r"translate\(0 (\S+)\)", DRAWN["bars"])]
    assert tops[1] - tops[0] >= 2 * svg.BAR_HEIGHT + svg.BOTTOM


def test_bits_are_shown_with_their_fractions():
    row = LinearRow("lm_head", 10, 10, "int8", None, 8.25, 100, None, False)
    assert "8.25" in texts(draw_bits("Bits", [row]))


@pytest.mark.parametrize(("name", "code"), [("x.svg", 0), ("x.SVG", 0), ("x.png", 2), ("x", 2)])
def test_a_picture_is_named_as_what_it_is(name, code):
    command = click.Command("x", params=[click.Option(["--plot"], type=SvgFile())], callback=lambda plot: None)
    result = CliRunner().invoke(command, ["--plot", name])
    assert (result.exit_code, "name it x.svg" in result.output) == (code, code == 2)
