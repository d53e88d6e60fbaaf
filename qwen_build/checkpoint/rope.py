"""How positions are rotated: what the rope object of a ``config.json`` asks for, in all its spellings.

The reference is ``modeling_rope_utils.py`` of transformers 5; ``graph/rope.py`` makes the tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen_engine.errors import CheckpointError, UnsupportedModel

# where a config says how positions are rotated: before transformers 5, and since
ROPE_OBJECTS = ("rope_scaling", "rope_parameters")

# rope type -> the keys of its object that are read
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}
# mrope_section deals the parts of a head out to three positions, which are all the same for text
_COMMON_KEYS = frozenset(
    [
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "mrope_section",
        "mrope_interleaved",
    ]
)


@dataclass(frozen=True)
class Rope:
    """One rotation.

    Attributes:
        kind: a key of ``ROPE_TYPES``.
        theta: base of the angles.
        factor: by which lengths are stretched; 1 where nothing is.
        original: tokens of a sequence that the model was trained for before it was stretched.
        attention_factor: of cosine and sine, and so of what is rotated.
        beta_fast, beta_slow: yarn: turns within ``original`` from which on a channel is left alone, and up to which it
            is stretched by ``factor``.
        truncate: yarn: whether the channels with these turns are rounded to whole ones.
        low_freq_factor, high_freq_factor: llama3: likewise, up to which and from which on.
        short_factor: longrope: one factor a channel, of sequences of up to ``original`` tokens.
    """

    kind: str
    theta: float
    factor: float = 1.0
    original: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()

    def longest(self, positions: int) -> int:
        """The tokens of a sequence it serves; ``positions``: max_position_embeddings."""
        if self.kind in ("yarn", "linear"):
            return max(positions, int(self.factor * self.original))
        return self.original if self.kind == "longrope" else positions

    @property
    def depends_on_length(self) -> bool:
        """Whether beyond :meth:`longest` the angles of a token depend on the length that its sequence reaches."""
        return self.kind in ("dynamic", "longrope")


def read_rope(hf: Mapping[str, Any], default_theta: float, positions: int) -> Rope:
    """The rotation of a config.

    Args:
        hf: the config.
        default_theta: where it has none.
        positions: its max_position_embeddings.

    Raises:
        CheckpointError: it contradicts itself, or a value is not what its key takes.
        UnsupportedModel: it asks for a rotation that is not in ``ROPE_TYPES``.
    """
    objects = rope_objects(hf)
    said = _RopeFields(" and ".join(objects) or ROPE_OBJECTS[-1], _together(objects))
    kind = said.kind()
    for name, value in said.values.items():
        if isinstance(value, dict):  # one rotation for each kind of layer
            raise UnsupportedModel(f"config.json: {said.where} has {name} {value!r}, only one for all is supported")
    if said.values.get("partial_rotary_factor", 1) != 1:
        raise UnsupportedModel(f"config.json: {said.where} has partial_rotary_factor, only whole heads can be rotated")
    theta = _theta(hf, objects, default_theta)
    original = said.tokens("original_max_position_embeddings", hf.get("original_max_position_embeddings") or positions)
    if kind in ("default", "dynamic"):
        return Rope(kind, theta)
    if kind == "yarn":
        return _yarn(said, theta, original, positions)
    if kind == "longrope":
        return _longrope(said, theta, original, positions)
    rope = Rope(kind, theta, said.number("factor"), original)
    if kind == "linear":
        return rope
    low, high = said.number("low_freq_factor"), said.number("high_freq_factor")
    if low >= high:
        raise CheckpointError(f"config.json: {said.where}.low_freq_factor is {low}, expected less than {high}")
    return Rope(kind, theta, rope.factor, original, low_freq_factor=low, high_freq_factor=high)


def rope_objects(hf: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The objects of ``ROPE_OBJECTS`` that say something, without their null fields."""
    found = {}
    for key in ROPE_OBJECTS:
        if not isinstance(rope := hf.get(key), dict | None):
            raise CheckpointError(f"config.json: {key} is {rope!r}, expected an object")
        if said := {name: value for name, value in (rope or {}).items() if value is not None}:
            found[key] = said
    return found


def unknown_rope_keys(hf: Mapping[str, Any]) -> Iterator[str]:
    """What the rope objects of a config say and their rope type does not read, as ``rope_scaling.key``."""
    objects = rope_objects(hf)
    kind = _RopeFields("", _together(objects)).kind()
    known = _COMMON_KEYS.union(ROPE_TYPES[kind])
    yield from (f"{name}.{key}" for name, rope in objects.items() for key in rope if key not in known)


def _together(objects: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What all objects say; they must agree. A type is written ``type`` or ``rope_type``."""
    said: dict[str, Any] = {}
    for rope in objects.values():
        for name, value in rope.items():
            key = "rope_type" if name == "type" else name
            if key != "rope_theta" and key in said and said[key] != value:
                where = " and ".join(objects)
                raise CheckpointError(f"config.json: {where} has {key} {said[key]!r} and {value!r}; keep the right one")
            said[key] = value
    return said


def _theta(hf: Mapping[str, Any], objects: Mapping[str, Mapping[str, Any]], default: float) -> float:
    """The base of the rotary angles, which transformers has kept in three places over time; they must agree."""
    holders = [_RopeFields("", holder) for holder in (hf, *objects.values())]
    found = {holder.number("rope_theta") for holder in holders if holder.values.get("rope_theta") is not None}
    if len(found) > 1:
        raise CheckpointError(f"config.json has rope_theta {' and '.join(map(str, sorted(found)))}; keep the right one")
    return found.pop() if found else default


def _yarn(said: _RopeFields, theta: float, original: int, positions: int) -> Rope:
    """YaRN (Peng et al., arXiv 2309.00071): a factor that is written wins over the ratio of the lengths."""
    factor = said.number("factor", positions / original)
    mscale, of_all = said.number("mscale", 0), said.number("mscale_all_dim", 0)
    scaled = _mscale(factor, mscale) / _mscale(factor, of_all) if mscale and of_all else _mscale(factor, 1)
    truncate = said.values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise CheckpointError(f"config.json: {said.where}.truncate is {truncate!r}, expected true or false")
    if theta <= 1:
        raise CheckpointError(f"config.json: rope_theta is {theta}, expected more than 1 with rope type 'yarn'")
    return Rope(
        "yarn", theta, factor, original,
        attention_factor=said.number("attention_factor", scaled),
        beta_fast=said.number("beta_fast", 32), beta_slow=said.number("beta_slow", 1), truncate=truncate,
    )  # fmt: skip


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(said: _RopeFields, theta: float, original: int, positions: int) -> Rope:
    """LongRoPE (Ding et al., arXiv 2402.13753) of sequences of up to ``original`` tokens, whose factors are fixed."""
    factor = said.number("factor", positions / original)
    scaled = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Rope(
        "longrope", theta, factor, original,
        attention_factor=said.number("attention_factor", scaled), short_factor=said.numbers("short_factor"),
    )  # fmt: skip


@dataclass(frozen=True)
class _RopeFields:
    """``values`` of the rope objects that ``where`` names."""

    where: str
    values: Mapping[str, Any]

    def kind(self) -> str:
        kind = self.values.get("rope_type", "default")
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            known = ", ".join(ROPE_TYPES)
            raise UnsupportedModel(f"config.json: {self.where} asks for rope type {kind!r}, supported are {known}")
        return kind

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number that a float32 can hold."""
        if self.values.get(key) is None and default is not None:
            return float(default)
        value: Any = self.values.get(key)
        if not _is_number(value):
            raise CheckpointError(f"config.json: {self._place(key)} is {value!r}, expected a positive number")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise CheckpointError(f"config.json: {self._place(key)} is {value!r}, expected a list of positive numbers")
        return tuple(map(float, value))

    def tokens(self, key: str, default: int) -> int:
        """An integer from 2."""
        value = self.values.get(key, default)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not 2 <= value < 2**31:
            raise CheckpointError(f"config.json: {self._place(key)} is {value!r}, expected a number of tokens")
        return value

    def _place(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a positive number that a float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 3e38  # NaN is not
