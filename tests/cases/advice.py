"""Advice that messages give: where it stands in the sources, and a table's row that follows it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner

from cases import ROOT

Act = Callable[[], object]

ADVICE = re.compile(
    r"[;,] (?:or )?(?:add|allow|ask|build|call|change|check|choose|close|convert|copy|correct|download|drop|feed|give"
    r"|install|keep|leave|lower|make|merge|move|name|pass|put|raise|remove|rename|resize|run|save|send|set|shorten|start"
    r"|take|train|try|unset|use|wait|write)\b"
)


class Row(NamedTuple):
    """``before`` is done and ``typed``; the error says ``advice``; ``followed`` is done, and ``then`` goes well.

    The exit code is 2 where the command line cannot be, whatever files there are.
    """

    typed: str
    advice: str
    then: str
    before: Act = lambda: None
    followed: Act = lambda: None
    exit_code: int = 1


def typed(command: Any, line: str) -> Any:
    return CliRunner().invoke(command, line.split())


def follow(command: Any, row: Row, judged: bool = False) -> None:
    """Follow the advice of ``row``; where ``command`` judges, any verdict is well."""
    row.before()
    refused = typed(command, row.typed)
    assert refused.exit_code == row.exit_code, refused.output
    assert row.advice in " ".join(refused.stderr.split())
    row.followed()
    done = typed(command, row.then)
    assert done.exit_code in ((0, 3, 4) if judged else (0,)), done.stderr
    assert row.advice not in " ".join(done.stderr.split())


# ---------------------------------------------------------------------------------------------------------------- acts


def config(path: str = "C/config.json", **changes: Any) -> Act:
    """Change keys of a JSON file; None takes one out."""

    def act() -> None:
        merged = json.loads(Path(path).read_text()) | changes
        Path(path).write_text(json.dumps({name: value for name, value in merged.items() if value is not None}))

    return act


def write(path: str, text: str | bytes) -> Act:
    return lambda: Path(path).write_bytes(text.encode() if isinstance(text, str) else text)


def remove(path: str) -> Act:
    return lambda: Path(path).unlink()


def move(source: str, target: str) -> Act:
    return lambda: Path(source).rename(target)


# ------------------------------------------------------------------------------------------------ advice in the sources


def advice_of(folder: Path) -> Iterator[str]:
    """Every message with advice in the modules of ``folder``, ``{}`` for what is filled in."""
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        parts |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            text = ""
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                text = node.value
            if ADVICE.search(text) and not text.startswith("\n") and "\n\n" not in text:
                yield text


def is_followed(message: str, followed: Iterable[str], elsewhere: Mapping[str, str]) -> bool:
    """A row has seen ``message``, for ``followed`` are the advices of rows; or ``elsewhere`` explains it."""
    pieces = [piece.strip() for piece in message.split("{}") if ADVICE.search(piece)]
    seen = any(piece in advice or advice in piece for advice in followed for piece in pieces)
    return seen or any(piece in message for piece in elsewhere)


def not_followed(folders: Iterable[str], followed: Iterable[str], elsewhere: Mapping[str, str]) -> list[str]:
    """The messages of ``folders`` whose advice nobody follows and nothing explains."""
    found = [message for folder in folders for message in advice_of(ROOT / folder)]
    return [message for message in found if not is_followed(message, followed, elsewhere)]


def stale(folders: Iterable[str], elsewhere: Mapping[str, str]) -> list[str]:
    """Pieces in ``elsewhere`` that no message of ``folders`` has, and tests that it names and that are not there."""
    messages = [message for folder in folders for message in advice_of(ROOT / folder)]
    unknown = [piece for piece in elsewhere if not any(piece in message for message in messages)]
    named = [path for why in elsewhere.values() for path in re.findall(r"tests/[\w/]+\.py", why)]
    return unknown + [path for path in named if not (ROOT / path).is_file()]
