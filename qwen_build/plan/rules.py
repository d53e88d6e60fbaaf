"""Which linear is stored how: the options of a build, exceptions by pattern, and what a checkpoint stores packed.

A pattern is a glob over the names Hugging Face gives the linears (``model.layers.0.*``, ``*.down_proj``, ``lm_head``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.stored import PackedWeight
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.graph.architecture import linear_members
from qwen_build.graph.layers import SchemeChoice
from qwen_build.quantization.scheme_table import SCHEMES
from qwen_build.quantization.schemes import Scheme
from qwen_engine.errors import BuildError, UnsupportedModel
from qwen_engine.regular_files import read_regular


class Rule(NamedTuple):
    """The scheme of every linear whose name ``pattern`` matches; None is the build's own option.

    ``origin`` is where a user wrote it.
    """

    origin: str
    pattern: str
    quant: str
    group_size: int | None = None
    symmetric: bool | None = None
    activations: str | None = None


# the options of a rule, as a file of rules spells them -> the type of their values
OPTIONS: dict[str, type] = {"quant": str, "group_size": int, "symmetric": bool, "activations": str}


def excluding(patterns: Iterable[str]) -> tuple[Rule, ...]:
    """The rules of ``--exclude``: float."""
    return tuple(Rule("--exclude", pattern, "none") for pattern in patterns)


def read_rules(path: Path) -> tuple[Rule, ...]:
    """The rules in a JSON file: an object from pattern to options, of which ``quant`` is needed.

    Raises:
        BuildError: the file cannot be read, or something else is in it.
    """
    try:
        entries = json.loads(read_regular(path).decode("utf-8-sig"), object_pairs_hook=tuple)
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror}; choose another --quant-config") from error
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{path} is not JSON: {error}") from error
    return tuple(_rule(str(path), pattern, options) for pattern, options in _pairs(entries, str(path)))


def write_rules(rules: Iterable[Rule]) -> str:
    """What :func:`read_rules` reads as ``rules``, a line each; no two of them have one pattern."""
    lines = []
    for rule in rules:
        options = {name: value for name in OPTIONS if (value := getattr(rule, name)) is not None}
        lines.append(f" {json.dumps(rule.pattern, ensure_ascii=False)}: {json.dumps(options)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rule(origin: str, pattern: str, options: Any) -> Rule:
    where = f"{origin}: {pattern!r}"
    given = dict(_pairs(options, where))
    if unknown := sorted(given.keys() - OPTIONS.keys()):
        raise BuildError(f"{where} has unknown {', '.join(unknown)}, expected {', '.join(OPTIONS)}")
    if "quant" not in given:
        raise BuildError(f"{where} has no quant, expected one of {', '.join(SCHEMES)}")
    for name, value in given.items():
        if type(value) is not OPTIONS[name]:
            raise BuildError(f"{where}: {name} is {value!r}, expected {OPTIONS[name].__name__}")
    if given["quant"] == "none" and len(given) > 1:
        raise BuildError(f"{where}: quant none has no {', '.join(sorted(given.keys() - {'quant'}))}; leave it out")
    return Rule(origin, pattern, **given)


def _pairs(entries: Any, where: str) -> tuple[tuple[str, Any], ...]:
    """The members of an object, which :func:`read_rules` reads as a tuple of pairs."""
    if not isinstance(entries, tuple):
        raise BuildError(f"{where} is not a JSON object, expected one such as " + '{"*.down_proj": {"quant": "int8"}}')
    names = [name for name, _ in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BuildError(f"{where} has {', '.join(map(repr, twice))} twice; keep one")
    return entries


def packed_choices(
    config: ModelConfig, checkpoint: Checkpoint, scheme_of: Callable[[PackedWeight], Scheme]
) -> dict[str, SchemeChoice]:
    """How the linears are stored that the checkpoint stores packed, each on its own grid.

    A tied head is none of them: the embedding is stored as ``--embedding-quant`` says.

    Raises:
        BuildError: the order of a linear's inputs cannot be read.
    """
    found: dict[str, SchemeChoice] = {}
    for name, members in linear_members(config).items():
        weights = [checkpoint.packed[weight] for one in members if (weight := f"{one}.weight") in checkpoint.packed]
        if members != (name,) and weights:
            check_stackable(name, members, weights)
        if weights:
            found[name] = SchemeChoice(scheme_of(weights[0]), weights[0].order, packed=True)
    return found


def _matches(pattern: str, name: str, members: Sequence[str], where: str) -> bool:
    """Whether ``pattern`` is of the linear ``name``, or of all its members."""
    if fnmatchcase(name, pattern):
        return True
    if not (own := [one for one in members if fnmatchcase(one, pattern)]):
        return False
    if len(own) < len(members):
        raise BuildError(
            f"{where} matches {own[0]} and not all of the {len(members)} linears that are stored alike as {name}; "
            "give that name"
        )
    return True


def check_stackable(name: str, members: Sequence[str], weights: Sequence[PackedWeight]) -> None:
    """Refuse packed weights of experts that cannot lie in one weight ``name``, bit for bit.

    Raises:
        UnsupportedModel: some of ``members`` are not packed, on other grids, or their inputs are in an order of theirs.
    """
    if len(weights) < len(members):
        found = f"{len(weights)} of the {len(members)} linears packed"
    elif any(weight.order is not None for weight in weights):
        found = "inputs in another order (desc_act)"
    elif len({(weight.grid, weight.activation_scales) for weight in weights}) > 1:
        found = "linears on several grids"
    else:
        return
    raise UnsupportedModel(
        f"the experts of {name} have {found}, expected all on one grid with their inputs in order; "
        "build from the float checkpoint"
    )


def choose(
    members: Mapping[str, Sequence[str]],
    packed: Mapping[str, SchemeChoice],
    rules: Iterable[Rule],
    scheme_of: Callable[[Rule], Scheme],
) -> dict[str, SchemeChoice]:
    """``packed``, and how the linears are stored that a rule matches: the first one decides.

    Args:
        members: of every linear, the linears of the checkpoint that it consists of.

    Raises:
        BuildError: a rule decides nothing, a linear that is packed, or some of the experts of a layer alone.
    """
    choices, names = dict(packed), list(members)
    for rule in rules:
        where = f"{rule.origin}: {rule.pattern!r}"
        matching = [name for name, own in members.items() if _matches(rule.pattern, name, own, where)]
        if not matching:
            raise BuildError(f"{where} matches no linear; their names are such as {names[1]} and {names[-1]}")
        if stored := next((name for name in matching if name in packed), None):
            raise BuildError(f"{where} matches {stored}, which the checkpoint has quantised already; leave it out")
        undecided = [name for name in matching if name not in choices]
        if not undecided:
            raise BuildError(f"{where} decides nothing, earlier patterns match the same linears; remove one")
        choices |= dict.fromkeys(undecided, SchemeChoice(scheme_of(rule)))
    return choices
