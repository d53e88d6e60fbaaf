"""One prompt on its way to an answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwen_run.sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(eq=False)
class Request:
    """A prompt, how to answer it, and how far the answer has come.

    ``generate.py`` appends to ``output`` and sets ``finish_reason``; the last two fields belong to the
    scheduler. A token is *pending* until it has been fed to the engine and its keys and values are cached.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    stop_token_ids: frozenset[int] = frozenset()
    output: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached: int = 0
    block_ids: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.output)

    @property
    def num_pending(self) -> int:
        """Tokens still to be fed: of the prompt, the one sampled last, or all after a preemption."""
        return self.num_tokens - self.num_cached

    def tokens(self, start: int, stop: int) -> list[int]:
        """Prompt and answer as one sequence, from ``start`` to ``stop``."""
        boundary = len(self.prompt)
        return [*self.prompt[start:stop], *self.output[max(start - boundary, 0) : max(stop - boundary, 0)]]
