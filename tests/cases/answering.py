"""The answers of a core alone, without texts: for tests that look at single tokens."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import fields
from typing import Any

from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.request import Request, Token

DEFAULTS = {field.name: field.default for field in fields(CoreOptions)}


def generate(engine: Engine, requests: Sequence[Request], **options: Any) -> Generator[Token, None, None]:
    """Tokens as soon as they are known; ``options`` of the core, whose batch never has more sequences than tokens."""
    chosen = DEFAULTS | options
    if (tokens := chosen["max_batch_tokens"]) is not None:
        chosen["max_batch_size"] = min(chosen["max_batch_size"], tokens)
    core = Core(engine, CoreOptions(**chosen))
    for index, request in enumerate(requests):
        core.add(request, f"prompt {index + 1}" if len(requests) > 1 else "the prompt")
    return _tokens(core)


def _tokens(core: Core) -> Generator[Token, None, None]:
    try:
        while not core.is_done:
            yield from core.step()
    finally:
        core.close()
