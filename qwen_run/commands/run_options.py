"""What the command line of ``qwen-run`` says, and which of its options make no sense together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_engine.manifest import MANIFEST_FILE


@dataclass(frozen=True)
class RunOptions:
    """What the command line says. ``interactive``: no prompt is given and none comes through a pipe."""

    prompt: str | None
    engine: Path | None
    input_text: str | None
    input_file: str | None
    output_file: Path | None
    retry_errors: bool
    as_finished: bool
    system: str | None
    raw: bool
    thinking: bool | None
    json_schema: str | None
    threads: int | None
    cache_bytes: int | None
    max_seq_len: int | None
    pipeline_parallel_size: int | None
    draft_tokens: int | None
    as_json: bool
    output_logits: Path | None
    embed: bool
    score: str | None
    classify: bool
    dimensions: int | None
    instruction: str | None
    sampling: Mapping[str, Any]
    interactive: bool

    @property
    def text(self) -> str | None:
        """The prompt that the command line holds."""
        return self.input_text if self.prompt is None else self.prompt

    @property
    def pooled(self) -> tuple[str, ...]:
        """What is asked for in place of an answer."""
        asked = {"embed": self.embed, "score": self.score is not None, "classify": self.classify}
        return tuple(name for name, is_asked in asked.items() if is_asked)

    @property
    def of_answers(self) -> list[str]:
        """The options given that only answers have, as they are typed."""
        own = ("system", "thinking", "json_schema", "draft_tokens", "output_logits")
        given = [name for name in own if getattr(self, name) is not None] + ["raw"] * self.raw
        given += [name for name, value in self.sampling.items() if value is not None and value != ()]
        return [option_of(name) for name in given]

    def given(self, *names: str) -> bool:
        """Whether any of these sampling options is given."""
        return any(self.sampling[name] is not None for name in names)


def option_of(name: str) -> str:
    """How the option called ``name`` is typed.

    >>> option_of("top_p"), option_of("n")
    ('--top-p', '-n')
    """
    return "-n" if name == "n" else f"--{name.replace('_', '-')}"


# which options make no sense together, and what is said then
CONTRADICTIONS: tuple[tuple[Callable[[RunOptions], bool], str], ...] = (
    (lambda asked: len(asked.pooled) > 1, "--embed, --score and --classify exclude each other."),
    (
        lambda asked: bool(asked.pooled) and asked.interactive,
        "--embed, --score and --classify need a text, --input-file or a pipe.",
    ),
    (lambda asked: asked.dimensions is not None and not asked.embed, "--dimensions is for --embed."),
    (
        lambda asked: asked.instruction is not None and not {"embed", "score"}.intersection(asked.pooled),
        "--instruction is for --embed and --score.",
    ),
    (
        lambda asked: asked.prompt is not None and asked.input_text is not None,
        "PROMPT and --input-text are the same; give one.",
    ),
    (
        lambda asked: asked.text is not None and asked.input_file is not None,
        "A prompt and --input-file exclude each other.",
    ),
    (
        lambda asked: asked.input_file is not None and (asked.as_json or asked.output_logits is not None),
        "--json and --output-logits are for one prompt; --input-file always writes JSON Lines.",
    ),
    (lambda asked: asked.as_finished and asked.input_file is None, "--as-finished is for --input-file."),
    (
        lambda asked: asked.retry_errors and (asked.input_file is None or asked.output_file is None),
        "--retry-errors is for --input-file with --output-file.",
    ),
    (
        lambda asked: asked.given("logprobs") and asked.input_file is None and not asked.as_json,
        "--logprobs needs --json or --input-file.",
    ),
    (
        lambda asked: asked.interactive and (asked.given("n", "num_beams") or asked.draft_tokens is not None),
        "-n, --num-beams and --draft-tokens need a prompt, --input-file or a pipe.",
    ),
    (
        lambda asked: asked.output_logits is not None and asked.given("n", "num_beams"),
        "--output-logits is for one answer; leave out -n and --num-beams.",
    ),
    (
        lambda asked: asked.raw and (asked.system is not None or asked.thinking is not None),
        "--system and --thinking need the chat template; leave out --raw.",
    ),
    (
        lambda asked: asked.interactive and bool(asked.as_json or asked.output_logits or asked.output_file),
        "--json, --output-file and --output-logits need a prompt, --input-file or a pipe.",
    ),
    (
        lambda asked: asked.json_schema is not None and asked.sampling["ignore_eos"] is not None,
        "--json-schema and --ignore-eos exclude each other: such an answer ends by itself.",
    ),
    (
        lambda asked: asked.prompt is not None and os.path.isfile(os.path.join(asked.prompt, MANIFEST_FILE)),
        "PROMPT is the directory of an engine; name it with --engine.",
    ),
)
