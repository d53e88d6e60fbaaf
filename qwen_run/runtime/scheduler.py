"""Which sequences run in the next step, and which of their tokens. Policy only: no tensors, no model.

A step has a budget of tokens. First every sequence that has one token to feed gets its place, so that a long prompt
never stalls the answers of others. What is left of the budget is shared among the prompts, none of which gets more
than a fair part while another wants it: half is for short prompts, half for long ones. What is then left goes to
drafts. Beside sequences that answer, prompts may be bounded to fewer tokens, for these wait for them; to twice as
many where more wait for their first token than for their next.

Blocks are given out as sequences grow. When none are left the youngest running sequence is preempted: it gives its
blocks back, waits first in line, and later feeds prompt and answer again, which is the same as a longer prompt.
Sequences start in the order of their requests, but for guests: where long prompts have all places, a few short ones
are let in beside them, and the sequences of the places take turns in resting for a step. Guests overtake whoever waits
first only so often. The oldest that runs can always take blocks from others, so every request comes to its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice, takewhile

from qwen_run.runtime.chunk import Chunk, fair_shares, first_logits, num_slots, num_unjudged
from qwen_run.runtime.kv_cache import Blocks
from qwen_run.runtime.prefix_cache import extend_keys
from qwen_run.runtime.request import Request, Sequence

# A prompt whose log probabilities are asked for has logits of every token: 64 rows of Qwen's vocabulary are 39 MB.
MAX_JUDGED = 64

# One guest for so many places, so that each of these rests in one step of five at most.
_PLACES_A_GUEST = 4
# A guest's blocks are kept free where they are no more than this part of the pool.
_POOL_A_GUEST = 16
# Guests that overtake whoever waits first, for each place, before it has to be let in.
_GUESTS_BEFORE_THE_FIRST = 8
# Waiting sequences among which a guest is looked for in a step.
_LOOK_AHEAD = 4096

Propose = Callable[[dict[Sequence, int], int], dict[Sequence, list[int]]]


class Scheduler:
    """The queue of waiting sequences and the running ones, oldest first.

    Attributes:
        num_preempted: how often a sequence has lost its blocks to an older one.
        num_prefix_tokens: tokens that were found in the cache instead of being fed.
    """

    def __init__(
        self,
        cache: Blocks,
        max_batch_size: int,
        max_batch_tokens: int,
        prefix_caching: bool = True,
        prompt_tokens_beside: int | None = None,
        num_batches: int = 1,
    ) -> None:
        """A scheduler without sequences.

        Args:
            num_batches: steps that may be under way at once; those that answer are divided among them.
        """
        self._cache = cache
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._prefix_caching = prefix_caching
        self._prompt_tokens_beside = prompt_tokens_beside
        self._num_batches = num_batches
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._guests: set[Sequence] = set()  # of the running ones
        self._num_overtaken = 0  # guests let in before the one that waits first
        self._next_rest = 0  # whose turn to rest it is
        self.num_preempted = 0
        self.num_prefix_tokens = 0

    @property
    def is_done(self) -> bool:
        """No sequence is waiting or running."""
        return not self._waiting and not self._running

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        self._waiting.extend(request.sequences)

    def schedule(self, propose: Propose | None = None) -> list[Chunk]:
        """The next step: at least one chunk while a sequence is left and nothing in flight, none empty.

        Every chunk's sequence owns the blocks its tokens will be written to, alone. After the engine has run,
        :meth:`advance` must be called for every chunk, in the order of steps.

        Args:
            propose: given how many tokens each sequence feeds and how many more the step may have, guesses what
                follows those that feed their last.
        """
        plan: dict[Sequence, int] = {}
        resting = self._choose_resting()
        decoding = [sequence for sequence in self._running if sequence.num_pending == 1 and sequence not in resting]
        for sequence in decoding[: self._most_answering()]:
            self._plan(plan, sequence, 1)
        self._admit()
        self._admit_guests()
        left_out = resting.union(plan, decoding)  # who answers and has no place here is in the next step
        prompts = [sequence for sequence in self._running if sequence.num_pending and sequence not in left_out]
        prompts = prompts[: self._max_batch_size - len(plan)]
        shares = self._shares(self._prompt_budget(len(plan), len(prompts)), prompts)
        num_judged = 0
        for sequence, count in zip(prompts, shares, strict=True):
            if sequence.request.params.prompt_logprobs is not None:
                count = min(count, num_unjudged(sequence) + MAX_JUDGED - num_judged)
                num_judged += max(0, count - num_unjudged(sequence))
            if count:
                self._plan(plan, sequence, count)
        left = self._max_batch_tokens - sum(plan.values())
        drafts = propose(plan, left) if propose else {}
        chunks = [self._chunk(sequence, count, drafts.get(sequence, [])) for sequence, count in plan.items()]
        for chunk in chunks:
            chunk.sequence.num_in_flight += len(chunk.token_ids)
        assert chunks or self.is_done or any(each.num_in_flight for each in self._running), "no sequence can run"
        return chunks

    def _most_answering(self) -> int:
        """Sequences that may feed one token in a step: an even part of them, so that every step has some."""
        num_answering = sum(sequence.num_pending <= 1 for sequence in self._running)
        return min(self._max_batch_tokens, -(-num_answering // self._num_batches))

    def _prompt_budget(self, num_answering: int, num_beginning: int) -> int:
        """Tokens that prompts may have of a step."""
        budget = self._max_batch_tokens - num_answering
        if num_answering == 0 or self._prompt_tokens_beside is None:
            return budget
        times = 2 if num_beginning > num_answering else 1
        return min(budget, times * self._prompt_tokens_beside)

    def advance(self, chunk: Chunk, num_rejected: int = 0) -> None:
        """Note that the engine has run ``chunk``: its tokens but the last ``num_rejected`` are in the cache."""
        sequence, block_size = chunk.sequence, self._cache.block_size
        full = sequence.num_cached // block_size
        sequence.num_in_flight -= len(chunk.token_ids)
        sequence.num_cached += len(chunk.token_ids) - num_rejected
        now_full = sequence.num_cached // block_size
        if now_full > full and self._prefix_caching:
            self._extend_keys(sequence, now_full)
            for index in range(full, now_full):
                self._cache.publish(sequence.block_ids[index], sequence.block_keys[index])

    def fork(self, parent: Sequence, children: list[Sequence]) -> None:
        """Let ``children``, who have the tokens of running ``parent``, go on from what it has cached."""
        position = self._running.index(parent) + 1
        room = max(0, self._max_batch_size - len(self._running))
        for child in children[:room]:
            self._copy_state(parent, child)
        self._running[position:position] = children[:room]
        self._waiting.extendleft(reversed(children[room:]))

    def replace(self, parents: list[Sequence], pairs: list[tuple[Sequence, Sequence]]) -> None:
        """Put new beams in the place of running ``parents``; ``pairs`` are (the parent it goes on from, the beam)."""
        position = self._running.index(parents[0])
        for parent, child in pairs:
            self._copy_state(parent, child)
        for parent in parents:
            self._running.remove(parent)
            self._release(parent)
        self._running[position:position] = [child for _, child in pairs]

    def finish(self, sequence: Sequence) -> None:
        """Take ``sequence`` off the running or waiting ones and free its blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._guests.discard(sequence)
            self._release(sequence)
        elif sequence in self._waiting:  # else closed before
            self._waiting.remove(sequence)

    def begin_again(self) -> None:
        """Nothing is cached any more, nor in flight: all that run wait, and feed everything when their turn comes."""
        self._cache.forget()
        for sequence in reversed(self._running):
            sequence.block_ids = []
            sequence.num_cached = sequence.num_in_flight = 0
            self._wait_again(sequence)
        self._running.clear()
        self._guests.clear()

    def close(self) -> None:
        """Give up all sequences and free their blocks."""
        for sequence in self._running:
            self._release(sequence)
        self._running.clear()
        self._guests.clear()
        self._waiting.clear()

    def _admit(self) -> None:
        """Let those run who wait, in order, as far as there is a place and blocks for all they have."""
        slots = sum(num_slots(sequence) for sequence in self._running if sequence not in self._guests)
        while self._waiting:
            sequence = self._waiting[0]
            if self._running and slots + num_slots(sequence) > self._max_batch_size:
                return
            if not self._begin(sequence):
                return
            self._waiting.popleft()
            self._num_overtaken = 0
            slots += num_slots(sequence)

    def _admit_guests(self) -> None:
        """Let a few short prompts run beside long ones that have all places."""
        num_long = sum(not self._is_short(sequence) for sequence in self._running)
        most = min(num_long, self._max_batch_size // _PLACES_A_GUEST)
        most_overtaken = _GUESTS_BEFORE_THE_FIRST * self._max_batch_size
        if len(self._guests) >= most or self._num_overtaken >= most_overtaken:
            return
        fitting = [s for s in islice(self._waiting, _LOOK_AHEAD) if self._is_short(s) and num_slots(s) == 1]
        for sequence in fitting[: min(most - len(self._guests), most_overtaken - self._num_overtaken)]:
            if not self._begin(sequence):
                return
            self._waiting.remove(sequence)
            self._guests.add(sequence)
            self._num_overtaken += 1

    def _begin(self, sequence: Sequence) -> bool:
        """Let ``sequence`` run if there are blocks for all it has and one more token: else it is soon preempted."""
        self._find_prefix(sequence)
        unclaimed = self._cache.num_free - sum(map(self._missing, self._running))
        if self._running and self._missing(sequence) + self._kept_for_guests(sequence) > unclaimed:
            self._release(sequence)
            return False
        self.num_prefix_tokens += sequence.num_cached
        if sequence.request.num_cached_tokens is None:  # else it has been preempted
            sequence.request.num_cached_tokens = sequence.num_cached
        position = len(self._running)
        while position and self._running[position - 1].request.number > sequence.request.number:
            position -= 1
        self._running.insert(position, sequence)
        return True

    def _kept_for_guests(self, sequence: Sequence) -> int:
        """Blocks of a large pool that long ``sequence`` leaves to a short one which may come."""
        blocks = self._cache.blocks_for(self._max_batch_tokens + 1)
        return 0 if self._is_short(sequence) or blocks > self._cache.num_blocks // _POOL_A_GUEST else blocks

    def _choose_resting(self) -> set[Sequence]:
        """Those that guests leave no place in the next step; all but guests take turns."""
        num_resting = len(self._running) - self._max_batch_size
        if num_resting <= 0:
            return set()
        others = [sequence for sequence in self._running if sequence not in self._guests]
        chosen = {others[(self._next_rest + i) % len(others)] for i in range(num_resting)}
        self._next_rest = (self._next_rest + num_resting) % len(others)
        return chosen

    def _shares(self, budget: int, prompts: list[Sequence]) -> list[int]:
        """How many tokens each of ``prompts`` feeds: half of ``budget`` is for short ones, half for long ones.

        What one kind does not need is for the other.
        """
        shares = [0] * len(prompts)
        short = [index for index, sequence in enumerate(prompts) if self._is_short(sequence)]
        long = [index for index, sequence in enumerate(prompts) if not self._is_short(sequence)]
        for most, kind in ((budget // 2 if long else budget, short), (budget, long), (budget, short)):
            wanted = [prompts[index].num_pending - shares[index] for index in kind]
            for index, share in zip(kind, fair_shares(min(most, budget - sum(shares)), wanted), strict=True):
                shares[index] += share
        return shares

    def _is_short(self, sequence: Sequence) -> bool:
        """One step could feed the whole prompt of ``sequence``."""
        return len(sequence.request.prompt) <= self._max_batch_tokens

    def _missing(self, sequence: Sequence) -> int:
        """Blocks that ``sequence`` needs to feed all its tokens and one more, beyond those it has."""
        wanted = self._cache.blocks_for(len(sequence.token_ids) + 1) + num_slots(sequence) - 1
        return max(0, wanted - len(sequence.block_ids))

    def _find_prefix(self, sequence: Sequence) -> None:
        """Give ``sequence``, which has nothing cached, the blocks that hold its beginning already."""
        if not self._prefix_caching:
            return
        # What logits are wanted of is fed: the last token, or more of the prompt.
        count = first_logits(sequence) // self._cache.block_size
        self._extend_keys(sequence, count)
        sequence.block_ids = self._cache.take_prefix(sequence.block_keys[:count])
        sequence.num_cached = len(sequence.block_ids) * self._cache.block_size

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        salt = sequence.request.params.cache_salt
        extend_keys(sequence.block_keys, sequence.token_ids, self._cache.block_size, count, salt)

    def _plan(self, plan: dict[Sequence, int], sequence: Sequence, count: int) -> None:
        """Enter ``count`` tokens of ``sequence`` and give it blocks for them, at the cost of younger ones."""
        if sequence not in self._running:  # preempted in this very step
            return
        while not self._grow(sequence, count):
            youngest = self._victim(sequence)
            if youngest is None:
                return
            self._running.remove(youngest)
            self._release(youngest)
            self._guests.discard(youngest)
            self._wait_again(youngest)
            self.num_preempted += 1
            plan.pop(youngest, None)
            if youngest is sequence:
                return
        plan[sequence] = count

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """Who gives blocks to ``sequence``: the youngest that is not in flight, maybe itself.

        None where that or a younger one is in flight: it can give some when it is back.
        """
        younger_in_flight = False
        for other in reversed(self._running):
            if other is sequence:
                return None if younger_in_flight or other.num_in_flight else other
            if not other.num_in_flight:
                return other
            younger_in_flight = True
        return None

    def _wait_again(self, sequence: Sequence) -> None:
        """Put ``sequence`` before all that came later."""
        number = sequence.request.number
        older = sum(1 for _ in takewhile(lambda other: other.request.number < number, self._waiting))
        self._waiting.insert(older, sequence)

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Give ``sequence`` blocks of its own for ``count`` more tokens; False, and nothing changes, where none are."""
        owned = sequence.block_ids
        missing = max(0, self._cache.blocks_for(sequence.num_fed + count) - len(owned))
        first = sequence.num_fed // self._cache.block_size  # the block the first of them is written to
        copied = first < len(owned) and self._cache.is_shared(owned[first])
        if not missing and not copied:
            return True
        block_ids = self._cache.allocate(missing + copied)
        if block_ids is None:
            return False
        if copied:
            own = block_ids.pop()
            self._cache.copy(owned[first], own)
            self._cache.free(owned[first : first + 1])
            owned[first] = own
        owned += block_ids
        return True

    def _chunk(self, sequence: Sequence, count: int, drafts: list[int]) -> Chunk:
        drafts = drafts and drafts[: self._room(sequence, len(drafts))]
        start, num_logits = sequence.num_fed, max(0, count - num_unjudged(sequence))
        tokens = [*sequence.token_ids[start : start + count], *drafts]
        return Chunk(sequence, tokens, len(drafts), num_logits + len(drafts), start)

    def _room(self, sequence: Sequence, wanted: int) -> int:
        """How many of ``wanted`` drafts fit behind the pending token, in blocks that nobody will soon need."""
        owned = len(sequence.block_ids) * self._cache.block_size - sequence.num_fed - 1
        if wanted <= owned:
            return wanted
        if self._cache.num_free <= sum(self._missing(other) for other in self._running if other is not sequence):
            return owned
        return wanted if self._grow(sequence, 1 + wanted) else owned

    def _copy_state(self, parent: Sequence, child: Sequence) -> None:
        self._cache.share(parent.block_ids)
        child.block_ids = list(parent.block_ids)
        child.block_keys = list(parent.block_keys)
        child.num_cached = parent.num_cached

    def _release(self, sequence: Sequence) -> None:
        block_ids, sequence.block_ids = sequence.block_ids, []  # first: an interrupt here must not free them twice
        sequence.num_cached = sequence.num_in_flight = 0
        self._cache.free(block_ids)
