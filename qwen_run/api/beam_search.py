"""Beam search with vLLM's names: what :meth:`LLM.beam_search` takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from qwen_engine.errors import RequestError
from qwen_run.runtime.request import FinishReason, Request
from qwen_run.sampling.params import SamplingParams


@dataclass
class BeamSearchParams:
    """How beams are searched.

    Attributes:
        beam_width: beams that are followed, and answers that are returned.
        max_tokens: most tokens of an answer.
        ignore_eos: do not end at the tokens the checkpoint says.
        temperature: 0; a beam search draws nothing.
        length_penalty: the exponent of an answer's length by which its log probability is divided.
        include_stop_str_in_output: without effect, as beams end at tokens only.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def sampling_params(self) -> SamplingParams:
        """The same as parameters of a request: no search ends before nothing can beat what it has found.

        Raises:
            RequestError: a value is out of range.
        """
        if not isinstance(self.beam_width, int) or isinstance(self.beam_width, bool) or not 1 <= self.beam_width <= 128:
            raise RequestError(f"beam_width is {self.beam_width!r}, expected a whole number from 1 to 128")
        if self.temperature != 0:
            raise RequestError(f"temperature is {self.temperature!r}, expected 0: a beam search draws nothing")
        params = SamplingParams(temperature=0, max_tokens=self.max_tokens, ignore_eos=self.ignore_eos)
        if self.beam_width == 1:
            return replace(params, logprobs=0)
        width, penalty = self.beam_width, self.length_penalty
        return replace(params, n=width, num_beams=width, length_penalty=penalty, early_stopping="never")


@dataclass(frozen=True)
class BeamSearchSequence:
    """One beam.

    Attributes:
        tokens: prompt and answer.
        cum_logprob: log probability of the answer.
        text: of all tokens, special ones spelled out; empty where the engine has no tokenizer.
        finish_reason: ``stop`` or ``length``.
    """

    tokens: list[int]
    cum_logprob: float
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


def beams_of(request: Request, decode: Callable[[list[int]], str]) -> BeamSearchOutput:
    """What ``request``, whose parameters are those of a beam search, has found."""
    penalty = request.params.length_penalty
    sequences = []
    for sequence in request.sequences:
        if sequence.score is None:  # a single beam is a greedy answer
            total = sum(found.logprob for found in sequence.logprobs)
        else:
            total = sequence.score * sequence.num_output**penalty
        tokens = list(sequence.token_ids)
        sequences.append(BeamSearchSequence(tokens, total, decode(tokens), sequence.finish_reason))
    return BeamSearchOutput(sequences)
