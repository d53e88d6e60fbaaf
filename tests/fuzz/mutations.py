"""Small random changes of JSON trees and of bytes, most of which leave something that is nearly right."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 31, 32, 33, 64, 128, 255, 256, 65536, 2**24, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**64),
    *(10**30, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
)
OTHERS: tuple[Any, ...] = (
    *("", "a", "\ud800", "\x00", "\x1b[2J", "../../x", "/etc/passwd", "x" * 3000, "int4", "float32"),
    *(None, True, False, [], {}, [[]], {"": None}, [1, "a"]),
)


def random_place(tree: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container in ``tree``, which is not empty, and one of its keys: a long list inside it is one of its parts."""
    container, key = None, None
    while isinstance(tree, dict | list) and tree and (container is None or rng.random() < 0.75):
        container, key = tree, rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        tree = container[key]
    return container, key


def nearby(value: Any, rng: random.Random) -> Any:
    """Something that is almost ``value``."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, value * 2, value // 2, -value, float(value % 10**300), str(value)])
    if isinstance(value, float):
        return rng.choice([value * 2, -value, value / 3, 1 / value if value else 1.0])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value.upper(), value * 2, [value]])
    return copy.deepcopy(rng.choice([*NUMBERS, *OTHERS]))


def mutate_tree(tree: Any, rng: random.Random) -> str:
    """Change ``tree``, a JSON object or array, in one place; what was done."""
    container, key = random_place(tree, rng)
    old = container[key]
    kind = rng.choice(["near"] * 4 + ["number"] * 3 + ["other"] * 2 + ["delete", "copy", "add"])
    if kind == "delete":
        del container[key]
    elif kind == "copy":
        other, other_key = random_place(tree, rng)
        container[key] = copy.deepcopy(other[other_key])
    elif kind == "add":
        extra = copy.deepcopy(rng.choice([*NUMBERS, *OTHERS, old]))
        container.append(extra) if isinstance(container, list) else container.setdefault(f"{key}_", extra)
    else:
        made: Callable[[], Any] = {"near": lambda: nearby(old, rng), "number": lambda: rng.choice(NUMBERS)}.get(
            kind, lambda: rng.choice(OTHERS)
        )
        container[key] = copy.deepcopy(made())
    return f"{kind} at {key!r:.60} (was {old!r:.60})"


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """``data`` with a few bits flipped, a part cut out, doubled, zeroed or put in; and what was done."""
    kind = rng.choice(["flip", "flip", "flip", "cut", "grow", "zero", "double", "random", "empty"])
    at = rng.randrange(len(data) + 1)
    size = min(rng.choice([1, 2, 8, 64, 4096]), len(data) - at)
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 30])):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed), "some bits flipped"
    put = {"zero": bytes(size), "double": data[at : at + size] * 2, "random": rng.randbytes(size)}
    if kind in put:
        return data[:at] + put[kind] + data[at + size :], f"{kind} {size} bytes at {at}"
    return {"cut": data[:at], "grow": data + rng.randbytes(7), "empty": b""}[kind], kind
