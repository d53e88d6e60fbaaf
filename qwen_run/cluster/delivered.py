"""A stream that another replica repeats from its start: what its reader has already is left out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from qwen_engine.errors import EngineError
from qwen_run.api.outputs import CompletionOutput, Logprobs, RequestOutput


@dataclass
class _Answer:
    """One answer: what its reader has, and how far the replica that repeats it has come."""

    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    num_text: int = 0
    num_seen: int = 0
    num_seen_text: int = 0


class Delivered:
    """What the reader of one request has; every output passes through :meth:`take`.

    Attributes:
        num_tokens: of all answers.
        last: the newest output, of which later ones are the continuation; None before the first.
    """

    def __init__(self) -> None:
        self._answers: dict[int, _Answer] = {}
        self.num_tokens = 0
        self.last: RequestOutput | None = None

    def restart(self) -> None:
        """Another replica answers, from the start."""
        for answer in self._answers.values():
            answer.num_seen = answer.num_seen_text = 0

    def take(self, output: RequestOutput) -> RequestOutput | None:
        """``output``, which holds what is new since the one before, without what the reader has; None if that is all.

        Raises:
            EngineError: the replica repeats the answer with other tokens.
        """
        answers = [self._rest(answer) for answer in output.outputs]
        self.last = replace(output, outputs=answers)
        is_new = output.finished or any(each.token_ids or each.text or each.finish_reason for each in answers)
        return self.last if is_new else None

    def whole(self, output: RequestOutput) -> RequestOutput:
        """``output`` with all that the reader has of each answer in place of what is new."""
        found = []
        for each in output.outputs:
            answer = self._answers[each.index]
            logprobs = None if each.logprobs is None else list(answer.logprobs)
            text = "".join(answer.text)
            found.append(replace(each, text=text, token_ids=list(answer.token_ids), logprobs=logprobs))
        return replace(output, outputs=found)

    def _rest(self, output: CompletionOutput) -> CompletionOutput:
        answer = self._answers.setdefault(output.index, _Answer())
        num_had = max(0, min(len(output.token_ids), len(answer.token_ids) - answer.num_seen))
        had = answer.token_ids[answer.num_seen : answer.num_seen + num_had]
        if had != output.token_ids[:num_had]:
            raise EngineError(
                f"a replica repeats an answer with other tokens from token {answer.num_seen + 1} on: replicas of "
                "different engines or instruction sets; start all of them anew"
            )
        num_had_text = max(0, min(len(output.text), answer.num_text - answer.num_seen_text))
        answer.num_seen += len(output.token_ids)
        answer.num_seen_text += len(output.text)
        token_ids, text = output.token_ids[num_had:], output.text[num_had_text:]
        answer.token_ids += token_ids
        answer.num_text += len(text)
        if text:
            answer.text.append(text)
        self.num_tokens += len(token_ids)
        logprobs = None if output.logprobs is None else output.logprobs[num_had:]
        answer.logprobs += logprobs or []
        return replace(output, token_ids=token_ids, text=text, logprobs=logprobs)
