"""Random JSON schemas, of every keyword that draft 2020-12 has: a table of kinds, each a few lines that write one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

Schema = Any  # an object, or a boolean within one
KEYS = ("name", "a b", "Größe", "城市", "🙂", 'say "hi"', "back\\slash", "tab\there", "", "$ref", "type", "0", "</x>")
TEXTS = ("red", "grün", "你好", "🤗", 'a "quote"', "\\", "line\nbreak", "", " ", "null", "</tool_call>", "<think>")
PATTERNS = ("^[0-9]{5}$", "^a+b?$", "^(yes|no|ja)$", "[a-c]{2}", "^\\d{3}-\\d{4}$", "^[^\"\\\\]{1,5}$", "^[äöü]+$",
            "^(([01]{2}){1,3}|x)$", "\\.txt$", "^$")  # fmt: skip
UNSEEN = ("(?=a)b", "^(?!x).$", "(a)\\1")  # look-around and references, which no automaton knows
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "uri", "hostname", "duration")
RARE_FORMATS = ("regex", "json-pointer", "idn-email", "iri", "colour")


def schemas(seed: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """``count`` schemas and the name of the kind of each, all kinds in turn; the same for the same seed."""
    kinds = list(KINDS.items())
    for index in range(count):
        name, kind = kinds[index % len(kinds)]
        yield name, kind(random.Random(f"{seed}-{index}"), 0)


def an_object(properties: dict[str, Schema], required: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(required), **more}


def _value(rng: random.Random) -> Any:
    scalars = [rng.choice(TEXTS), rng.randint(-9, 9), round(rng.uniform(-5, 5), 2), True, False, None]
    return rng.choice([*scalars, {rng.choice(KEYS): rng.choice(scalars)}, [rng.choice(scalars), 1], {}, []])


def _leaf(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(LEAVES)(rng, depth)


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    return _leaf(rng, depth) if depth > 1 else rng.choice([*LEAVES, *NESTS])(rng, depth + 1)


def _integer(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    lower = rng.choice([{"minimum": low}, {"exclusiveMinimum": low - 1}])
    upper = rng.choice([{"maximum": low + rng.randint(0, 10**6)}, {"exclusiveMaximum": low + rng.randint(1, 99)}])
    return {"type": "integer", **rng.choice([lower, upper, lower | upper])}


def _multiple(rng: random.Random, _: int) -> dict[str, Any]:
    step = rng.choice([2, 3, 7, 10, 100])
    return {"type": rng.choice(["integer", "number"]), "multipleOf": step, "minimum": 0, "maximum": step * 9}


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.choice([-1.5, -0.25, 0, 0.001, 3, 99.75])
    lower = {rng.choice(["minimum", "exclusiveMinimum"]): low}
    return {"type": "number", **lower, rng.choice(["maximum", "exclusiveMaximum"]): low + rng.choice([0.5, 1, 250])}


def _text(rng: random.Random, _: int) -> dict[str, Any]:
    shortest = rng.randint(0, 3)
    return {"type": "string", "minLength": shortest, "maxLength": shortest + rng.randint(0, 5)}


def _pattern(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": "string", "pattern": rng.choice(PATTERNS)}


def _pattern_and_length(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": "string", "pattern": rng.choice(["^[a-f]+$", "^\\w*$", "x"]), "minLength": 2, "maxLength": 6}


def _format(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": "string", "format": rng.choice(FORMATS)}


def _enum(rng: random.Random, _: int) -> dict[str, Any]:
    values = [_value(rng) for _ in range(rng.randint(1, 6))]
    return {"enum": [each for index, each in enumerate(values) if each not in values[:index]]}


def _const(rng: random.Random, _: int) -> dict[str, Any]:
    return {"const": _value(rng)}


def _types(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": rng.sample(["null", "boolean", "integer"], rng.randint(1, 3))}


def _typed_enum(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": ["string", "null"], "enum": [*rng.sample(TEXTS, 2), None], "description": "of a \"kind\"",
            "title": "T", "default": None, "examples": [1], "$comment": "none", "deprecated": True}  # fmt: skip


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    keys = rng.sample(KEYS, rng.randint(0, 4))
    more = {} if depth == 0 and rng.random() < 0.1 else {"additionalProperties": rng.choice([False, _leaf(rng, 9)])}
    return an_object({key: _any(rng, depth) for key in keys}, [key for key in keys if rng.random() < 0.6], **more)


def _unnamed(rng: random.Random, depth: int) -> dict[str, Any]:
    """A required key that is no property, and no word about its value but that of all others."""
    return an_object({"a": _leaf(rng, depth)}, ["a", "b"], additionalProperties=_leaf(rng, depth))


def _map(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": _leaf(rng, depth)}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    fewest = rng.randint(0, 3)
    return {"type": "array", "items": _any(rng, depth), "minItems": fewest, "maxItems": fewest + rng.randint(0, 3)}


def _tuple(rng: random.Random, depth: int) -> dict[str, Any]:
    first = [_leaf(rng, depth) for _ in range(rng.randint(1, 3))]
    rest = rng.choice([{"items": False}, {"items": _leaf(rng, depth), "maxItems": 5}])
    return {"type": "array", "prefixItems": first, "minItems": rng.randint(0, len(first)), **rest}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(1, 4))]}


def _one_of(rng: random.Random, depth: int) -> dict[str, Any]:
    """Alternatives of which no value fits two."""
    return {"oneOf": rng.sample([{"type": "boolean"}, {"type": "null"}, _text(rng, depth), _integer(rng, depth)], 2)}


def _tagged(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [an_object({"kind": {"const": kind}, "value": _leaf(rng, depth)}, ["kind", "value"],
                       additionalProperties=False) for kind in ("circle", "square")]  # fmt: skip
    return {rng.choice(["anyOf", "oneOf"]): kinds}


def _all_of(rng: random.Random, depth: int) -> dict[str, Any]:
    parts = [an_object({key: _leaf(rng, depth)}, [key]) for key in rng.sample(KEYS, 2)]
    return {"allOf": [*parts, {"type": "object", "additionalProperties": _leaf(rng, 9)}][: rng.randint(1, 3)]}


def _all_of_bounds(rng: random.Random, _: int) -> dict[str, Any]:
    return {"allOf": [{"type": "integer", "minimum": rng.randint(-5, 5)}, {"maximum": rng.randint(5, 50)}]}


def _ref(rng: random.Random, depth: int) -> dict[str, Any]:
    where = rng.choice(["$defs", "definitions"])
    used = {"$ref": f"#/{where}/part"}
    return an_object({"a": used, "b": {"type": "array", "items": used, "maxItems": 2}}, ["a"],
                     additionalProperties=False, **{where: {"part": _any(rng, depth)}})  # fmt: skip


def _ref_beside(rng: random.Random, _: int) -> dict[str, Any]:
    """A reference with another keyword beside it, and a name that has to be escaped in it."""
    return {"$ref": "#/$defs/a~1b%25", "minimum": 3, "$defs": {"a/b%": {"type": "integer", "maximum": 30}}}


def _list(rng: random.Random, depth: int) -> dict[str, Any]:
    node = an_object({"value": _leaf(rng, depth), "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
                     ["value", "next"], additionalProperties=False)  # fmt: skip
    return {"$ref": "#/$defs/n", "$defs": {"n": node}}


def _tree(rng: random.Random, depth: int) -> dict[str, Any]:
    below = {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}
    return an_object({"v": _leaf(rng, depth), "children": below}, ["v"], additionalProperties=False)


def _even_and_odd(_: random.Random, __: int) -> dict[str, Any]:
    """Two definitions that refer to each other."""
    step = {name: {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": f"#/$defs/{other}"}, "maxItems": 1}]}
            for name, other in (("even", "odd"), ("odd", "even"))}  # fmt: skip
    return {"$ref": "#/$defs/even", "$defs": step}


def _untyped(rng: random.Random, depth: int) -> dict[str, Any]:
    """Keywords of one type without that type: values of all others fit as well."""
    return rng.choice([{"minLength": 2}, {"minimum": 5}, {"properties": {"a": _leaf(rng, depth)}}, {"maxItems": 1}])


def _pattern_properties(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "object", "patternProperties": {"^x_": _leaf(rng, depth)}, "additionalProperties": False}


def _refused(rng: random.Random, depth: int) -> dict[str, Any]:
    """What a constraint may not be able to keep to."""
    leaf = _leaf(rng, depth)
    return rng.choice(
        [
            {"not": leaf},
            {"if": leaf, "then": {"type": "string"}, "else": {"type": "null"}},
            {"type": "array", "items": leaf, "uniqueItems": True},
            {"type": "array", "contains": leaf, "minContains": 1},
            {"type": "object", "propertyNames": {"pattern": "^a"}},
            {"type": "object", "minProperties": 1, "maxProperties": 2},
            {"type": "object", "dependentRequired": {"a": ["b"]}},
            {"type": "object", "dependentSchemas": {"a": leaf}},
            {"type": "object", "properties": {"a": leaf}, "unevaluatedProperties": False},
            {"type": "array", "prefixItems": [leaf], "unevaluatedItems": False},
            {"oneOf": [{"type": "integer", "multipleOf": 2}, {"type": "integer", "multipleOf": 3}]},
            {"type": "string", "pattern": rng.choice(UNSEEN)},
            {"type": "string", "format": rng.choice(RARE_FORMATS)},
            {"type": "string", "contentEncoding": "base64"},
        ]
    )


def _wrong(rng: random.Random, depth: int) -> dict[str, Any]:
    """What is no schema, or has no instance."""
    return rng.choice(
        [
            {"type": "text"},
            {"type": 5},
            {"enum": []},
            {"enum": "red"},
            {"properties": [1]},
            {"type": "object", "required": "a"},
            {"type": "string", "pattern": "("},
            {"type": "string", "minLength": 5, "maxLength": 2},
            {"type": "integer", "minimum": 5, "maximum": 2},
            {"type": "integer", "minimum": "5"},
            {"$ref": "#/$defs/none"},
            {"$ref": "https://example.org/schema"},
            {"$ref": "#"},
            {"type": "array", "minItems": 3, "maxItems": 1},
            {"allOf": [{"type": "string"}, {"type": "integer"}]},
            an_object({"a": False}, ["a"]),
        ]
    )


LEAVES: tuple[Callable[[random.Random, int], dict[str, Any]], ...] = (
    _integer, _multiple, _number, _text, _pattern, _pattern_and_length, _format, _enum, _const, _types, _typed_enum,
)  # fmt: skip
NESTS: tuple[Callable[[random.Random, int], dict[str, Any]], ...] = (_object, _array, _tuple, _any_of, _tagged)
KINDS = {
    kind.__name__.strip("_"): kind
    for kind in (
        *LEAVES, *NESTS, _unnamed, _map, _one_of, _all_of, _all_of_bounds, _ref, _ref_beside, _list, _tree,
        _even_and_odd, _untyped, _pattern_properties, _refused, _wrong,
    )
}  # fmt: skip


def words_of(schema: Schema) -> set[str]:
    """Every keyword and every text in ``schema``: an error that names a keyword has one of them."""
    if isinstance(schema, dict):
        return set(schema).union(*map(words_of, schema.values()))
    if isinstance(schema, list):
        return set().union(*map(words_of, schema))
    return {schema} if isinstance(schema, str) else set()
