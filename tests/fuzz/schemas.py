"""Random JSON schemas over HTTP: each is answered by an instance of it, or refused with an error that names why.

    PYTHONPATH=tests python -m fuzz.schemas --schemas 500 [--engine DIR]

The model is tiny and random, and samples at temperature 1.5, so nothing but the constraint makes an answer valid.
Answers are asked for alone, then sixteen at a time of a server that guesses no tokens ahead; both are to be the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from cases.schemas import schemas, words_of
from cases.serving import Running, running

AT_ONCE = 16
MAX_TOKENS = 1000
ENDS = '"]},'  # a random model would seldom end a text or a list
GOOD = ("valid", "refused", "cut")


@dataclass(frozen=True)
class Asked:
    """What came back for a schema.

    Attributes:
        said: one of ``GOOD`` and what was said, or a complaint.
        token_ids: of the answer; empty where there is none.
    """

    said: str
    token_ids: tuple[int, ...] = ()


def closing_bias(server: Running, more: float = 4.0) -> dict[str, float]:
    """A bias to what ends values, by token id."""
    ids = server.post("/tokenize", {"prompt": ENDS, "add_special_tokens": False}).json()["tokens"]
    return dict.fromkeys(map(str, ids), more)


def ask(server: Running, schema: dict[str, Any], seed: int, bias: dict[str, float]) -> Asked:
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        "temperature": 1.5,
        "seed": seed,
        "max_tokens": MAX_TOKENS,
        "logit_bias": bias,
        "reasoning_effort": "none",
        "return_token_ids": True,
    }
    response = server.post("/v1/chat/completions", body)
    found = response.json()
    if response.status_code == 400:
        message = found["error"]["message"]
        names = [word for word in words_of(schema) if len(word) > 1 and word in message]
        return Asked(f"refused: {message}" if names else f"refused without the keyword that is why: {message}")
    if response.status_code != 200:
        return Asked(f"status {response.status_code}: {response.text[:300]}")
    choice = found["choices"][0]
    if choice["finish_reason"] == "length":
        return Asked("cut", tuple(choice["token_ids"]))
    return Asked(complaint(choice["message"]["content"], schema) or "valid", tuple(choice["token_ids"]))


def complaint(text: str, schema: dict[str, Any]) -> str | None:
    """Why ``text`` is no instance of ``schema``; None if it is one."""
    kind = jsonschema.Draft202012Validator
    try:
        kind.check_schema(schema)
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))
    except jsonschema.SchemaError as error:
        return f"answered to what is no schema: {error.message:.200}"
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r:.300} is no instance: {getattr(error, 'message', str(error)):.200}"
    return None


def ask_all(server: Running, asked: Sequence[dict[str, Any]], at_once: int) -> list[Asked]:
    bias = closing_bias(server)
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda each: ask(server, each[1], each[0], bias), enumerate(asked)))


def findings(model: Any, seed: int, count: int) -> tuple[Counter[str], list[str]]:
    """How many schemas ended how, and a line for each that did not end well."""
    named = list(schemas(seed, count))
    asked = [schema for _, schema in named]
    ways = []
    for drafts, at_once in ((8, 1), (0, AT_ONCE)):
        options = {"max_batch_size": AT_ONCE, "max_seq_len": 2 * MAX_TOKENS, "max_drafts": drafts, "threads": 2}
        with running(model, options=options) as server:
            ways.append(ask_all(server, asked, at_once))
            server.wait_until_idle()
    ends: Counter[str] = Counter()
    lines = []
    for (name, schema), alone, together in zip(named, *ways, strict=True):
        said = (
            alone.said if alone == together else f"{alone.said} alone, and {together.said} among others, not the same"
        )
        word = said.partition(":")[0]
        ends[word if word in GOOD else "wrong"] += 1
        lines += [] if word in GOOD else [f"{name} {json.dumps(schema, ensure_ascii=False):.400}: {said}"]
    return ends, lines


def main() -> None:
    from fuzz.checkpoint import write_checkpoint
    from qwen_build.cli import main as build

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", type=Path, help="ask this one (default: a tiny random one)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="schemas") as directory:
        engine = given.engine or Path(directory) / "engine"
        if given.engine is None:
            checkpoint = write_checkpoint(Path(directory) / "tiny", "qwen3", max_position_embeddings=4096)
            build([str(checkpoint), "--output", str(engine), "--quant", "int8"], standalone_mode=False)
        ends, lines = findings(engine, given.seed, given.schemas)
    print(*lines, sep="\n")
    print(", ".join(f"{ends[kind]} {kind}" for kind in (*GOOD, "wrong")))
    sys.exit(1 if ends["wrong"] else 0)


if __name__ == "__main__":
    main()
