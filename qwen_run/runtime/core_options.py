"""How requests share an engine, and where a core stands."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen_engine.errors import EngineError
from qwen_engine.sizes import ModelSizes

STEP_TOKENS = 256  # of a step, where nothing else is asked for
MOST_STEP_TOKENS = 1024  # whoever answers waits for all of them
EXPERT_ROWS = 32  # tokens of a step that an expert has on average

_LEAST = {"max_batch_size": 1, "max_batch_tokens": 1, "prompt_tokens_beside": 1, "max_drafts": 0, "max_logprobs": 0}


@dataclass(frozen=True)
class CoreOptions:
    """How requests share an engine.

    Attributes:
        max_batch_size: most sequences in one step.
        max_batch_tokens: most tokens in one step, at least ``max_batch_size``; longer prompts are fed in chunks. More
            of them make a prompt no faster from 128 on (two cores), but whoever answers waits for them:
            ``benchmarks/stall.py``. None: what suits the model and ``max_batch_size``, see :meth:`for_model`.
        prompt_tokens_beside: most tokens of prompts in a step in which others answer, who wait for them, and twice as
            many if more begin than answer; None for what ``max_batch_tokens`` leaves.
        prefix_caching: prompts that begin like an earlier one are not fed again.
        max_drafts: most tokens to guess for a sequence in one step; 0 turns speculation off.
        keep_logits: set ``logits`` of every token.
        max_logprobs: most likely tokens that a request may ask to be told of each token.

    Raises:
        EngineError: a value is out of range.
    """

    max_batch_size: int = 16
    max_batch_tokens: int | None = None
    prompt_tokens_beside: int | None = None
    prefix_caching: bool = True
    max_drafts: int = 0
    keep_logits: bool = False
    max_logprobs: int = 20

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in ("prompt_tokens_beside", "max_batch_tokens"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise EngineError(f"{name} is {value!r}, expected a whole number, {least} or more")
        for name in ("prefix_caching", "keep_logits"):
            if not isinstance(getattr(self, name), bool):
                raise EngineError(f"{name} is {getattr(self, name)!r}, expected True or False")
        # those that answer would leave nothing to those that begin
        if self.max_batch_tokens is not None and self.max_batch_tokens < self.max_batch_size:
            raise EngineError(
                f"max_batch_tokens is {self.max_batch_tokens}, expected at least the max_batch_size of "
                f"{self.max_batch_size}: a token for every sequence; change one of them"
            )

    @property
    def step_tokens(self) -> int:
        """``max_batch_tokens`` where it is chosen."""
        assert self.max_batch_tokens is not None, "for_model chooses it"
        return self.max_batch_tokens

    def for_model(self, sizes: ModelSizes) -> CoreOptions:
        """The same with a number of tokens in a step.

        A step of a mixture of experts reads every expert that one of its tokens has, so that it takes more tokens to
        make the reading worth while: as many as give an expert ``EXPERT_ROWS``.
        """
        if self.max_batch_tokens is not None:
            return self
        tokens = STEP_TOKENS
        if (experts := sizes.experts) is not None:
            wanted = EXPERT_ROWS * experts.num_experts // experts.num_experts_per_tok
            tokens = min(max(tokens, wanted), MOST_STEP_TOKENS)
        return replace(self, max_batch_tokens=max(self.max_batch_size, tokens))


@dataclass(frozen=True)
class CoreStatistics:
    """Where a core stands, and what it has done so far.

    Attributes:
        num_running: sequences that take part in steps.
        num_waiting: sequences that wait for a place or for blocks.
        num_free_blocks: cache blocks nobody owns, of ``num_blocks``.
        num_steps: engine runs.
        num_prefix_tokens: tokens found in the cache instead of being fed.
        num_preempted: how often a sequence lost its blocks to an older one.
        num_drafts: guessed tokens that were verified, of which ``num_accepted`` were right.
        run_s: seconds in the engine; in its last stage where it has several.
        num_lost_stages: how often a stage was lost, and all that ran was fed again.
    """

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_steps: int
    num_prefix_tokens: int
    num_preempted: int
    num_drafts: int
    num_accepted: int
    run_s: float
    num_lost_stages: int = 0
