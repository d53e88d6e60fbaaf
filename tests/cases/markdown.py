"""Pages of the documentation taken apart, and what can be wrong with one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click

MOST_CHARACTERS = 120  # of a line; rows of tables cannot be broken
PACKAGES = ("qwen_engine", "qwen_plugin", "qwen_run", "qwen_build", "qwen_serve")
SOURCES = ("py", "cc", "h", "sh")  # what ends a path, also without a folder before it


@dataclass(frozen=True)
class Fence:
    """A fenced block: its language, empty for none, and its text."""

    language: str
    text: str


@dataclass(frozen=True)
class Page:
    """One Markdown file of the project at ``root``."""

    path: Path
    root: Path
    text: str

    @classmethod
    def read(cls, path: Path, root: Path) -> Page:
        return cls(path, root, path.read_text(encoding="utf-8"))

    @cached_property
    def fences(self) -> list[Fence]:
        found = re.findall(r"^```(\w*)\n(.*?)^```$", self.text, re.DOTALL | re.MULTILINE)
        return [Fence(language, text) for language, text in found]

    @cached_property
    def prose(self) -> str:
        """The page without its fenced blocks."""
        return re.sub(r"^```\w*\n.*?^```$", "", self.text, flags=re.DOTALL | re.MULTILINE)

    @cached_property
    def headings(self) -> list[str]:
        return re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)

    @cached_property
    def anchors(self) -> list[str]:
        """What a link to each heading ends with, as GitHub makes it."""
        plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in self.headings]
        return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain]

    @cached_property
    def targets(self) -> list[str]:
        """Where links, pictures and reference definitions lead."""
        return re.findall(r"\]\(([^)\s]+)\)", self.prose) + re.findall(r"^\[[^]]+\]: (\S+)$", self.prose, re.MULTILINE)

    @cached_property
    def codes(self) -> list[str]:
        """What stands in backquotes."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    @cached_property
    def command_lines(self) -> list[list[str]]:
        """The words of every line, in fences and in backquotes, that calls a command of the project."""
        shell = "\n".join(fence.text for fence in self.fences if not fence.language).splitlines()
        lines = [*shell, *self.codes]
        wanted = [line.removeprefix("$ ").partition(" | ")[2] or line.removeprefix("$ ") for line in lines]
        return [shlex.split(line, comments=True) for line in wanted if re.match(r"qwen-[a-z]+( |$)", line)]

    def section(self, heading: str) -> str:
        """The text under ``heading``, up to the next of its level or above."""
        fence = re.compile(r"^```\w*\n.*?^```$", re.DOTALL | re.MULTILINE)
        without = fence.sub(lambda found: " " * len(found[0]), self.text)  # a comment in code is no heading
        level = re.search(rf"^(#+) {re.escape(heading)}$", without, re.MULTILINE)
        assert level is not None, heading
        end = re.compile(rf"^#{{1,{len(level[1])}}} ", re.MULTILINE).search(without, level.end())
        return self.text[level.end() : end.start() if end else None]


def table_column(text: str, column: int = 0) -> Iterator[str]:
    """The cells of a column of the first table in ``text``, without its two heading rows."""
    rows = re.search(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE)
    assert rows is not None
    for row in rows[0].splitlines()[2:]:
        yield row.strip("|").split("|")[column].strip()


def table_rows(text: str, first_header: str = "") -> dict[str, list[str]]:
    """The first table in ``text`` whose heading begins with ``first_header``: first cell -> the others of its row."""
    found = re.search(rf"^\| ?{re.escape(first_header)}.*\|\n(?:^\|.*\|\n)+", text + "\n", re.MULTILINE)
    assert found is not None, first_header
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in found[0].splitlines()]
    return {row[0]: row[1:] for index, row in enumerate(rows) if index != 1}


def rounds_to(shown: str, measured: str) -> bool:
    """Whether the first number in ``shown`` is the first in ``measured``, rounded to the digits it has.

    >>> rounds_to("0.093", "9.26e-02 (8.55e-02 to 1.00e-01)"), rounds_to("72 %", "71.99%"), rounds_to("73 %", "71.99%")
    (True, True, False)
    """
    numbers = [re.search(r"\d[\d,]*(\.\d+)?(e-?\d+)?", text) for text in (shown, measured)]
    assert numbers[0] is not None, shown
    assert numbers[1] is not None, measured
    value, exact = (float(number[0].replace(",", "")) for number in numbers if number)
    digits = len((numbers[0][1] or ".")[1:])
    return abs(value - exact) <= 0.5001 * 10**-digits


def long_lines(page: Page) -> list[str]:
    """Lines that are too long and no row of a table."""
    lines = enumerate(page.text.splitlines(), start=1)
    return [f"line {number}" for number, line in lines if len(line) > MOST_CHARACTERS and not line.startswith("|")]


def repeated_headings(page: Page) -> list[str]:
    return sorted({heading for heading in page.headings if page.headings.count(heading) > 1})


def broken_links(page: Page) -> list[str]:
    """Relative links to files that do not exist, or to headings that their page does not have."""
    broken = []
    for target in page.targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.path.parent / name
        if not path.exists() or (anchor and anchor not in (Page.read(path, page.root) if name else page).anchors):
            broken.append(target)
    return broken


def missing_paths(page: Page) -> list[str]:
    """Paths and modules of the project in backquotes that are not there, or do not hold the name before them."""
    missing = []
    for code in page.codes:
        for word in code.split():
            is_module = re.fullmatch(r"(benchmarks|qwen_[a-z]+)(\.(?!NAME)\w+)+", word)
            if (is_module and not _is_module(page.root, word)) or (_is_path(word) and not _find(page, word)):
                missing.append(word)
    for name, path in re.findall(r"`(\w+)`[^`(]*\(`([\w/.]+\.py)`\)", page.prose.replace("\n", " ")):
        found = _find(page, path)
        if found and not re.search(rf"\b{name}\b", found.read_text(encoding="utf-8")):
            missing.append(f"{name} in {path}")
    return missing


def _is_path(word: str) -> bool:
    tops = "|".join((*PACKAGES, "tests", "docs", "benchmarks", "examples"))
    return re.fullmatch(rf"[\w./-]+\.({'|'.join(SOURCES)})|({tops})/[\w/.-]+", word) is not None


def _find(page: Page, word: str) -> Path | None:
    places = (page.path.parent, page.root, *(page.root / package for package in PACKAGES))
    return next((place / word for place in places if (place / word).exists()), None)


def _is_module(root: Path, word: str) -> bool:
    """Whether ``word`` is a module, or a name in one."""
    path, name = root.joinpath(*word.split(".")), word.rpartition(".")[2]
    if path.with_suffix(".py").is_file() or path.is_dir():
        return True
    inside = next((p for p in (path.parent.with_suffix(".py"), path.parent / "__init__.py") if p.is_file()), None)
    return inside is not None and re.search(rf"\b{name}\b", inside.read_text(encoding="utf-8")) is not None


def option_table(command: click.Command) -> dict[str, click.Parameter]:
    """Every option of a command, those of its subcommands too, by each way to spell it."""
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    parameters = [*command.params, *(parameter for each in inner for parameter in each.params)]
    return {spelt: p for p in parameters for spelt in (*p.opts, *p.secondary_opts, "--help", "-h")}


def unknown_options(page: Page, commands: Mapping[str, click.Command]) -> list[str]:
    """What command lines of the page say that the command does not take: options, their choices, subcommands."""
    unknown = []
    for words in page.command_lines:
        command = commands.get(words[0])
        unknown += [words[0]] if command is None else _unknown(words, command)
    everything: dict[str, click.Parameter] = {}
    for command in commands.values():
        everything |= option_table(command)
    for code in page.codes:
        option, _, value = code.partition(" ")
        if option.startswith("--"):
            unknown += _unknown_option(option, value, everything)
    return unknown


def _unknown(words: list[str], command: click.Command) -> list[str]:
    options, found = option_table(command), []
    if isinstance(command, click.Group) and len(words) > 1 and not words[1].startswith("-"):
        if words[1] not in command.commands:
            return [" ".join(words[:2])]
        options = option_table(command.commands[words[1]])
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("-") and not re.fullmatch(r"-\d+", word):
            found += [f"{words[0]} {each}" for each in _unknown_option(word, following, options)]
    return found


def _unknown_option(option: str, value: str, options: Mapping[str, click.Parameter]) -> list[str]:
    name, equals, inside = option.partition("=")
    parameter = options.get(name)
    if parameter is None:
        return [name]
    chosen = inside if equals else value.split()[0] if value else ""
    if isinstance(parameter.type, click.Choice) and chosen and chosen not in map(str, parameter.type.choices):
        return [f"{name} {chosen}"] if re.fullmatch(r"[\w.]+", chosen) and not chosen.isupper() else []
    return []


CHECKS: dict[str, Callable[[Page], Any]] = {
    "lines are short": long_lines,
    "headings are unique": repeated_headings,
    "links lead somewhere": broken_links,
    "paths exist": missing_paths,
}
