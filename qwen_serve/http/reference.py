"""The page at ``/docs``: every field of every request, from ``/openapi.json``, without a script or another address."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from starlette.responses import Response

_STYLE = (
    ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
    "padding:0 1rem}h2{font:600 1.1rem ui-monospace,monospace;margin-top:2rem}"
    "td,th{padding:.1rem 1rem .1rem 0;text-align:left;vertical-align:top}"
    "td:first-child{font-family:ui-monospace,monospace}p{margin:.3rem 0}"
)
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def reference_page(described: Mapping[str, Any]) -> Response:
    """The page.

    Args:
        described: what ``/openapi.json`` says.
    """
    title = escape(described["info"]["title"])
    routes = "".join(
        _route(path, method, operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    )
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        f'<p>{escape(described["info"].get("summary", ""))}. For programs: <a href="openapi.json">openapi.json</a>.'
        f"{routes}</html>"
    )
    return Response(text, media_type="text/html; charset=utf-8", headers=_HEADERS)


def _route(path: str, method: str, operation: Mapping[str, Any]) -> str:
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}" for row in _rows(schema))
    table = f"<table><tr><th>field<th>type<th>{rows}</table>" if rows else ""
    said = escape(operation.get("description", "").replace("``", ""))
    return f"<h2>{method.upper()} {escape(path)}</h2><p>{said}</p>{table}"


def _rows(schema: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, type and whether it is needed, of every field."""
    for name, field in schema.get("properties", {}).items():
        yield name, type_words(field), "required" if name in schema.get("required", ()) else ""


def type_words(schema: Mapping[str, Any]) -> str:
    """The type that a JSON schema of pydantic's describes.

    >>> type_words({"anyOf": [{"type": "integer", "minimum": 1, "maximum": 16}, {"type": "null"}]})
    'integer from 1 to 16'
    >>> type_words({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
    'string or array of string'
    """
    if "anyOf" in schema:
        return " or ".join(type_words(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "const" in schema or "enum" in schema:
        return " or ".join(repr(each) for each in schema.get("enum", [schema.get("const")]))
    words = str(schema.get("type", "any value"))
    if words == "array" and schema.get("items"):
        words = f"array of {type_words(schema['items'])}"
    bounds = ((" from ", "minimum"), (" to ", "maximum"), (", at least ", "minItems"), (", at most ", "maxItems"))
    return words + "".join(f"{word}{schema[bound]:g}" for word, bound in bounds if bound in schema)
