"""Many requests at once: every step feeds the engine one batch and gives each sequence its next tokens.

Token ids only, no text. Requests join and leave between any two steps; what one answers does not depend on the others.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import numpy as np

from qwen_engine.errors import EngineError, RequestError
from qwen_run.runtime.bounds_ahead import BoundsAhead, constraints_of
from qwen_run.runtime.chunk import Chunk, build_batch
from qwen_run.runtime.core_options import CoreOptions, CoreStatistics
from qwen_run.runtime.engine import Batch
from qwen_run.runtime.flights import AnyEngine, Flights, StageLost
from qwen_run.runtime.request import NO_TOKEN, FinishReason, Request, Sequence, Token, check_beams, check_request
from qwen_run.runtime.scheduler import Scheduler
from qwen_run.runtime.speculation import Speculator
from qwen_run.sampling.beam import BeamSearch, beam_logprobs
from qwen_run.sampling.logprobs import TokenLogprobs, token_logprobs
from qwen_run.sampling.processors import check_finite
from qwen_run.sampling.sample import sample

__all__ = ["Core", "CoreOptions", "CoreStatistics", "build_batch"]


# A request that kills a stage whenever it is fed is not fed for ever.
_MOST_LOST_IN_A_ROW = 5


class Core:
    """An engine and the requests it answers. One thread at a time; an engine serves one core at a time.

    An engine in stages has as many batches on their way as it has stages. Where a stage is lost, everything that runs
    is fed again, as after a preemption.
    """

    def __init__(self, engine: AnyEngine, options: CoreOptions | None = None) -> None:
        self.engine = engine
        self._flights = Flights(engine)
        self.options = options = (options or CoreOptions()).for_model(engine.manifest.model)
        self._scheduler = Scheduler(
            engine.cache,
            options.max_batch_size,
            options.step_tokens,
            options.prefix_caching,
            options.prompt_tokens_beside,
            self._flights.most,
        )
        self._speculator = (
            Speculator(options.max_drafts, engine.manifest.limits.max_seq_len) if options.max_drafts else None
        )
        self._num_added = self._num_drafts = self._num_accepted = 0
        self._num_lost = self._num_lost_in_a_row = 0  # stages; in a row: since the last new token
        self._bounds_ahead = BoundsAhead()
        self._failed: list[Sequence] = []  # in this step

    @property
    def is_done(self) -> bool:
        """Every request has its answers."""
        return self._scheduler.is_done

    @property
    def statistics(self) -> CoreStatistics:
        return CoreStatistics(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_free_blocks=self.engine.cache.num_free,
            num_blocks=self.engine.cache.num_blocks,
            num_steps=self._flights.num_runs,
            num_prefix_tokens=self._scheduler.num_prefix_tokens,
            num_preempted=self._scheduler.num_preempted,
            num_drafts=self._num_drafts,
            num_accepted=self._num_accepted,
            run_s=self._flights.run_s,
            num_lost_stages=self._num_lost,
        )

    def add(self, request: Request, name: str = "the prompt") -> int:
        """Take ``request`` in; it may run in the next step.

        Args:
            name: what an error calls the prompt.

        Returns:
            Its number, which its tokens carry: 0 for the first, then 1, 2, ...

        Raises:
            RequestError: see :meth:`check`.
        """
        self.check(request, name)
        if request.params.num_beams > 1:
            limits = request.max_tokens, self.engine.manifest.limits.max_seq_len - len(request.prompt)
            request.beam_search = BeamSearch(request.params, request.stop_token_ids, min(limits))
        request.number = self._num_added
        self._num_added += 1
        self._scheduler.add(request)
        return request.number

    def check(self, request: Request, name: str = "the prompt") -> None:
        """Check that ``request`` can be answered; any thread may call it.

        Raises:
            RequestError: the engine cannot answer it: see :func:`check_request`; its beams do not fit, or it asks for
                more log probabilities than ``max_logprobs``.
        """
        check_request(request, self.engine.manifest, name)
        for field in ("logprobs", "prompt_logprobs"):
            count, most = getattr(request.params, field), self.options.max_logprobs
            if count is not None and count > most:
                raise RequestError(f"{field} is {count}, expected at most the engine's max_logprobs, which is {most}")
        if request.params.num_beams > 1:
            longest = min(len(request.prompt) + request.max_tokens, self.engine.manifest.limits.max_seq_len)
            check_beams(request, longest, self.engine.cache, self.options.max_batch_size)

    def abort(self, request: Request) -> None:
        """Give up what is unfinished of ``request`` and free its blocks; nothing when it is finished."""
        for sequence in request.sequences:
            if not sequence.finish_reason:
                sequence.finish_reason = "abort"
                self._finish(sequence)

    def step(self, failed: list[Sequence] | None = None) -> list[Token]:
        """Run the engine once; the new tokens, those of a sequence in order. None when nothing is left to do.

        The tokens of beams come all at once, at the end of their search.

        Args:
            failed: takes the sequences that end in an error, such as logits that are not numbers; all others go on.
                Without it the first such error is raised.

        Raises:
            EngineError: the engine cannot run at all; :meth:`close` the core then.
        """
        self._failed = [] if failed is None else failed
        try:
            self._submit()
            ran = self._collect() if self._flights else []
        except StageLost as lost:
            self._begin_again(lost)
            return []
        tokens: list[Token] = []
        for chunk, logits in ran:
            if not chunk.sequence.finish_reason:  # else given up, or a beam whose search has failed in this step
                tokens += self._take(chunk, logits)
        if tokens:
            self._num_lost_in_a_row = 0
        if failed is None and self._failed:
            error = self._failed[0].error
            assert error is not None
            raise error
        return tokens

    def close(self) -> None:
        """Give up all requests and free every cache block."""
        self._flights.disown()
        self._scheduler.close()
        self._bounds_ahead.close()

    def _submit(self) -> None:
        """Send steps on their way until the engine has all it can work at."""
        propose = self._speculator.propose if self._speculator else None
        while len(self._flights) < self._flights.most and (chunks := self._scheduler.schedule(propose)):
            self._flights.submit(chunks)

    def _collect(self) -> list[tuple[Chunk, np.ndarray]]:
        """The chunks of the oldest step that could be fed, with their logits (num_logits, vocab_size).

        The others have failed.
        """
        with self._bounds_ahead.working(constraints_of(self._flights.oldest)):
            (chunks, batch), logits, run_s = self._flights.collect()
        if logits is None:
            return self._run_apart(chunks)
        if self._speculator:
            self._speculator.cost.observe(len(batch.input_ids), run_s)
        ends = accumulate(chunk.num_logits for chunk in chunks)
        return [(chunk, logits[end - chunk.num_logits : end]) for chunk, end in zip(chunks, ends, strict=True)]

    def _begin_again(self, lost: StageLost) -> None:
        """Feed all that runs once more, to stages that know nothing.

        Raises:
            EngineError: a stage does not come back, or is lost before anything is answered, time and again.
        """
        self._num_lost += 1
        self._num_lost_in_a_row += 1
        if self._num_lost_in_a_row > _MOST_LOST_IN_A_ROW:
            raise EngineError(
                f"{lost}, {self._num_lost_in_a_row} times before another token was there; look at its memory, and at "
                "the request that was answered"
            )
        self._flights.recover()
        self._scheduler.begin_again()

    def _run_apart(self, chunks: list[Chunk]) -> list[tuple[Chunk, np.ndarray]]:
        """As :meth:`_collect`, one after the other, because the engine refuses them together."""
        ran = []
        for chunk in chunks:
            if chunk.sequence.finish_reason:  # given up, or a beam whose search has failed
                continue
            try:
                ran.append((chunk, self.engine.run(build_batch([chunk]))))
            except EngineError as error:
                self._fail(chunk.sequence, error)
        if not ran:
            self._check_that_engine_runs()
        return ran

    def _check_that_engine_runs(self) -> None:
        """Feed one token, to tell an engine that cannot run from sequences that cannot be fed.

        Raises:
            EngineError: the engine refuses it, too.
        """
        cache = self.engine.cache
        block_ids = cache.allocate(1)
        if block_ids is None:
            return
        try:
            table = np.array([block_ids], np.int32)
            no_past, lengths = np.zeros(1, np.int32), np.array([0, 1], np.int32)
            self.engine.run(Batch(np.zeros(1, np.int64), lengths, no_past, table, np.zeros(1, np.int64)))
        finally:
            cache.free(block_ids)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End ``sequence`` with ``error``; beams all together."""
        request = sequence.request
        sequence.error, sequence.finish_reason = error, "error"
        if request.beam_search:
            for beam in request.sequences:
                beam.finish_reason = "error"
                self._finish(beam)
            sequence.token_ids, request.sequences = list(request.prompt), [sequence]
        self._finish(sequence)
        self._failed.append(sequence)

    def _take(self, chunk: Chunk, logits: np.ndarray) -> list[Token]:
        """Go on with the sequence of ``chunk``, for whose last tokens there are ``logits`` (num_logits, vocab_size)."""
        sequence, request = chunk.sequence, chunk.sequence.request
        num_fed = len(chunk.token_ids) - chunk.num_drafts
        if request.params.prompt_logprobs is not None:
            position = sequence.num_cached + num_fed - len(logits) + chunk.num_drafts
            if not self._judge_prompt(sequence, position, logits):
                return []
        if sequence.num_cached + num_fed < len(sequence.token_ids):  # the middle of a prompt
            self._scheduler.advance(chunk)
            return []
        if request.pools:
            self._scheduler.advance(chunk)
            return self._pool(sequence, logits[-1])
        if request.beam_search:
            self._scheduler.advance(chunk)
            return self._advance_beams(sequence, request.beam_search, logits[-1])
        if sequence.num_output:
            tokens = self._verify(sequence, chunk.token_ids[num_fed:], logits)
            if sequence.error:
                return tokens
            self._scheduler.advance(chunk, num_rejected=1 + chunk.num_drafts - len(tokens))
            self._num_drafts += chunk.num_drafts
            self._num_accepted += len(tokens) - 1
            request.num_drafts += chunk.num_drafts
            request.num_accepted += len(tokens) - 1
            if sequence.finish_reason:
                self._finish(sequence)
            return tokens
        self._scheduler.advance(chunk)
        return self._begin_samples(sequence, logits[-1])

    def _pool(self, sequence: Sequence, output: np.ndarray) -> list[Token]:
        """End ``sequence`` with the ``output`` (width,) of its last token; none where it fails."""
        try:
            check_finite(output.max(), len(sequence.token_ids))
        except EngineError as error:
            self._fail(sequence, error)
            return []
        sequence.request.pooled = output.copy()
        sequence.finish_reason = "stop"
        self._finish(sequence)
        return [Token(sequence.request.number, NO_TOKEN, "stop")]

    def _judge_prompt(self, sequence: Sequence, position: int, logits: np.ndarray) -> bool:
        """Note how likely the prompt's tokens are, after ``logits`` (n, vocab_size) of ``position`` and on.

        Returns:
            False where ``sequence`` fails.
        """
        request = sequence.request
        count = request.params.prompt_logprobs
        assert count is not None
        for offset, (token_id, row) in enumerate(zip(request.prompt[position + 1 :], logits, strict=False)):
            try:
                check_finite(row.max(), position + offset + 1)
            except EngineError as error:
                self._fail(sequence, error)
                return False
            request.prompt_logprobs.append(token_logprobs(row, token_id, count))
        return True

    def _verify(self, sequence: Sequence, drafts: list[int], logits: np.ndarray) -> list[Token]:
        """The tokens after the pending one: as many as the drafts guessed, and one more; fewer where it fails.

        Args:
            logits: (1 + drafts, vocab_size), the last ones of these.
        """
        tokens: list[Token] = []
        for draft, row in zip([*drafts, None], logits[-1 - len(drafts) :], strict=True):
            token = self._extend(sequence, row)
            if token:
                tokens.append(token)
            if sequence.finish_reason or (token and token.token_id != draft):
                break
        return tokens

    def _begin_samples(self, sequence: Sequence, logits: np.ndarray) -> list[Token]:
        """The first tokens of all samples of a prompt, from the ``logits`` (vocab_size,) of its end."""
        request = sequence.request
        samples = [sequence, *(sequence.fork(index) for index in range(1, request.params.n))]
        self._scheduler.fork(sequence, samples[1:])
        request.sequences = samples
        tokens = []
        for each in samples:
            if token := self._extend(each, logits):
                tokens.append(token)
            if each.finish_reason:
                self._finish(each)
        return tokens

    def _advance_beams(self, sequence: Sequence, search: BeamSearch, logits: np.ndarray) -> list[Token]:
        """Note the ``logits`` (vocab_size,) after a beam; go on once those of all beams of the request are there."""
        request, beams = sequence.request, sequence.request.sequences
        try:
            sequence.beam_logprobs = beam_logprobs(logits, request.params, sequence.context)
        except Exception as error:  # whatever it is, it is this request's alone
            self._fail(sequence, error)
            return []
        if any(beam.num_cached < len(beam.token_ids) for beam in beams):
            return []
        chosen = search.advance(np.stack([beam.beam_logprobs for beam in beams if beam.beam_logprobs is not None]))
        if not search.is_done:
            pairs = [(beams[parent], beams[parent].fork(i, token_id)) for i, (parent, token_id) in enumerate(chosen)]
            self._scheduler.replace(beams, pairs)
            request.sequences = [child for _, child in pairs]
            return []
        for beam in beams:
            self._scheduler.finish(beam)
        request.sequences, tokens = [], []
        for index, found in enumerate(search.hypotheses()):
            answer = beams[0].fork(index)
            answer.token_ids = [*request.prompt, *found.token_ids]
            answer.finish_reason = "stop" if found.token_ids[-1] in request.stop_token_ids else "length"
            answer.score = found.score
            request.sequences.append(answer)
            tokens += [Token(request.number, token_id, None, None, index) for token_id in found.token_ids]
            tokens[-1] = replace(tokens[-1], finish_reason=answer.finish_reason)
        return tokens

    def _extend(self, sequence: Sequence, logits: np.ndarray) -> Token | None:
        """Sample the next token of ``sequence`` from ``logits`` (vocab_size,); None where the sequence fails."""
        try:
            return self._next_token(sequence, logits)
        except Exception as error:  # whatever it is, it is this sequence's alone
            self._fail(sequence, error)
            return None

    def _next_token(self, sequence: Sequence, logits: np.ndarray) -> Token:
        request = sequence.request
        sampled = sample(
            logits, request.params, sequence.context, len(sequence.token_ids), request.seed, sequence.index
        )
        token_id = sampled.token_id
        sequence.token_ids.append(token_id)
        sequence.context.append(token_id)
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = TokenLogprobs(*sampled[1:])  # type: ignore[arg-type]
            sequence.logprobs.append(logprobs)
        sequence.finish_reason = self._finish_reason(sequence, token_id)
        kept = logits.copy() if self.options.keep_logits else None
        return Token(request.number, token_id, sequence.finish_reason, kept, sequence.index, logprobs)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        request = sequence.request
        if token_id in request.stop_token_ids or (sequence.stopper and sequence.stopper.push(token_id)):
            return "stop"
        if (
            sequence.num_output >= request.max_tokens
            or len(sequence.token_ids) >= self.engine.manifest.limits.max_seq_len
        ):
            return "length"
        return None

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        if self._speculator:
            self._speculator.forget(sequence)
