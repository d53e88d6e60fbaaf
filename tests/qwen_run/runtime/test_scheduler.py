"""The policy, step by step: no engine, a cache of one small pool."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_engine.graph_io import TensorSpec
from qwen_run.runtime.chunk import Chunk
from qwen_run.runtime.kv_cache import KVCache
from qwen_run.runtime.request import Request, Sequence
from qwen_run.runtime.scheduler import Scheduler
from qwen_run.sampling.sample import SamplingParams

BLOCK_SIZE = 4


def make_scheduler(
    num_blocks: int = 50,
    max_batch_size: int = 4,
    max_batch_tokens: int = 10,
    prefix_caching: bool = True,
    prompt_tokens_beside: int | None = None,
) -> Scheduler:
    return Scheduler(make_cache(num_blocks), max_batch_size, max_batch_tokens, prefix_caching, prompt_tokens_beside)


def make_cache(num_blocks: int) -> KVCache:
    return KVCache([TensorSpec("pool", "paged_state", "int32", ("num_blocks", BLOCK_SIZE))], BLOCK_SIZE, num_blocks)


def make_sequence(length: int, first: int = 100, **params: Any) -> Sequence:
    """The sequence of a new request; prompts with another first token have nothing in common."""
    return Request(tuple(range(first, first + length)), SamplingParams(**params)).sequences[0]


def add(scheduler: Scheduler, *lengths: int, **params: Any) -> list[Sequence]:
    sequences = [make_sequence(length, 100 * (index + 1), **params) for index, length in enumerate(lengths)]
    for sequence in sequences:
        scheduler.add(sequence.request)
    return sequences


def step(scheduler: Scheduler, token_id: int = 7) -> list[Chunk]:
    """Schedule, and let every sequence that gets logits sample ``token_id``."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        needed = -(-(chunk.sequence.num_cached + len(chunk.token_ids)) // BLOCK_SIZE)
        assert len(chunk.sequence.block_ids) == needed
        scheduler.advance(chunk)
        if chunk.num_logits:
            chunk.sequence.token_ids.append(token_id)
    return chunks


def shape(chunks: list[Chunk], sequences: list[Sequence]) -> list[tuple[int, int, int]]:
    """(which sequence, how many tokens, how many logits) of each chunk."""
    return [(sequences.index(chunk.sequence), len(chunk.token_ids), chunk.num_logits) for chunk in chunks]


def test_prompts_share_what_decoding_leaves() -> None:
    scheduler = make_scheduler(max_batch_tokens=10)
    sequences = add(scheduler, 3, 15, 2)
    assert shape(step(scheduler), sequences) == [(0, 3, 1), (1, 5, 0), (2, 2, 1)]
    assert shape(step(scheduler), sequences) == [(0, 1, 1), (2, 1, 1), (1, 8, 0)]
    assert shape(step(scheduler), sequences) == [(0, 1, 1), (2, 1, 1), (1, 2, 1)]
    assert shape(step(scheduler), sequences) == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]


def test_a_late_request_starts_in_the_next_step() -> None:
    scheduler = make_scheduler(max_batch_tokens=10)
    (long,) = add(scheduler, 90)
    step(scheduler)
    short = make_sequence(4, 300)
    scheduler.add(short.request)
    assert shape(step(scheduler), [long, short]) == [(0, 6, 0), (1, 4, 1)]
    assert shape(step(scheduler), [long, short]) == [(1, 1, 1), (0, 9, 0)]


def test_prompts_are_bounded_beside_answers_alone() -> None:
    scheduler = make_scheduler(max_batch_tokens=20, prompt_tokens_beside=4)
    (short,) = add(scheduler, 4)
    step(scheduler)
    long, late = make_sequence(40, 1000), make_sequence(30, 2000)
    scheduler.add(long.request)
    assert shape(step(scheduler), [short, long]) == [(0, 1, 1), (1, 4, 0)]
    scheduler.add(late.request)  # more begin than answer
    assert sum(count for _, count, _ in shape(step(scheduler), [short, long, late])) == 1 + 8
    alone = make_scheduler(max_batch_tokens=20, prompt_tokens_beside=4)
    sequences = add(alone, 50)
    assert shape(step(alone), sequences) == [(0, 20, 0)]


def numbered(scheduler: Scheduler, first: int, *lengths: int) -> list[Sequence]:
    """As :func:`add`, with numbers from ``first`` on, as a core gives them."""
    sequences = [make_sequence(length, 1000 * (first + index)) for index, length in enumerate(lengths)]
    for index, sequence in enumerate(sequences):
        sequence.request.number = first + index
        scheduler.add(sequence.request)
    return sequences


def steps_until(scheduler: Scheduler, sequence: Sequence, most: int) -> int:
    """Steps until ``sequence`` has its first token."""
    for count in range(1, most + 1):
        chunks = step(scheduler)
        assert len(chunks) <= 4
        assert sum(len(chunk.token_ids) for chunk in chunks) <= 10
        if sequence.num_output:
            return count
    raise AssertionError(f"no token after {most} steps")


@pytest.mark.parametrize("length", [40, 200])  # the long ones answer already, or their prompts are still fed
def test_a_short_prompt_starts_although_long_ones_have_all_places(length: int) -> None:
    scheduler = make_scheduler(num_blocks=1000)
    long = numbered(scheduler, 0, *[length] * 50)
    for _ in range(25):
        step(scheduler)
    (short,) = numbered(scheduler, 50, 5)
    assert steps_until(scheduler, short, 3) <= 3
    assert [sequence for sequence in long if sequence.num_cached] == long[:4]
    fed = [sequence.num_cached for sequence in long[:4]]
    for _ in range(8):
        step(scheduler)
    gained = [sequence.num_cached - before for sequence, before in zip(long, fed, strict=False)]
    assert all(count >= 6 for count in gained)  # each rests in two steps of eight at most
    assert short.num_output >= 8  # a guest never rests


def test_short_prompts_alone_are_no_guests() -> None:
    scheduler = make_scheduler(num_blocks=1000)
    sequences = numbered(scheduler, 0, *[5] * 20)
    for _ in range(10):
        step(scheduler)
    assert [sequence for sequence in sequences if sequence.num_cached] == sequences[:4]


def test_guests_do_not_keep_a_long_prompt_waiting_for_ever() -> None:
    """One long prompt waits for the blocks of another; short ones come in every step and leave with their answer."""
    scheduler = make_scheduler(num_blocks=70)
    running, waiting = numbered(scheduler, 0, 160, 120)
    while not running.num_output:
        step(scheduler)
    guests: set[Sequence] = set()
    for number in range(2, 120):
        numbered(scheduler, number, 3)
        for chunk in step(scheduler):
            if chunk.sequence is not running:
                guests.add(chunk.sequence)
                scheduler.finish(chunk.sequence)
    assert len(guests) == 8 * 4  # eight for each place
    assert not waiting.block_ids
    scheduler.finish(running)
    assert steps_until(scheduler, waiting, 50) <= 50


def test_a_guest_that_is_preempted_waits_behind_those_it_overtook() -> None:
    scheduler = make_scheduler(num_blocks=60)
    long = numbered(scheduler, 0, *[44] * 6)  # eleven blocks each: the fifth has no place
    while not all(sequence.num_output for sequence in long[:4]):
        step(scheduler)
    (guest,) = numbered(scheduler, 6, 5)
    steps_until(scheduler, guest, 3)
    while not scheduler.num_preempted:
        step(scheduler)
    assert (guest.block_ids, [bool(sequence.block_ids) for sequence in long]) == ([], [True] * 4 + [False] * 2)
    for sequence in long[:4]:
        scheduler.finish(sequence)
    chunks = step(scheduler)
    assert [chunk.sequence for chunk in chunks] == [long[4], long[5], guest]


def test_a_long_prompt_does_not_starve_under_short_ones() -> None:
    scheduler = make_scheduler(max_batch_size=4, max_batch_tokens=8)
    (long,) = add(scheduler, 90)
    steps = 0
    while not long.num_output:
        scheduler.add(make_sequence(8, 200 + 10 * steps).request)
        for chunk in step(scheduler):
            if chunk.sequence is not long and chunk.sequence.num_output:
                scheduler.finish(chunk.sequence)
        steps += 1
        assert steps <= 45  # a quarter of 8 tokens a step, at least


def test_more_decoding_sequences_than_budget_are_served_oldest_first() -> None:
    scheduler = make_scheduler(max_batch_tokens=2)
    sequences = add(scheduler, 1, 1, 1)
    assert shape(step(scheduler), sequences) == [(0, 1, 1), (1, 1, 1)]
    assert shape(step(scheduler), sequences) == [(0, 1, 1), (1, 1, 1)]
    scheduler.finish(sequences[0])
    assert shape(step(scheduler), sequences) == [(1, 1, 1), (2, 1, 1)]


def test_a_chunk_carries_the_tokens_that_are_not_cached_yet() -> None:
    scheduler = make_scheduler(max_batch_tokens=4)
    add(scheduler, 6)
    fed = [step(scheduler, token_id)[0].token_ids for token_id in (7, 8, 9, 10)]
    assert fed == [[100, 101, 102, 103], [104, 105], [8], [9]]


def test_batch_size_is_a_limit_and_order_is_first_come_first_served() -> None:
    scheduler = make_scheduler(max_batch_size=2)
    sequences = add(scheduler, 2, 2, 2)
    assert shape(step(scheduler), sequences) == [(0, 2, 1), (1, 2, 1)]
    scheduler.finish(sequences[0])
    assert shape(step(scheduler), sequences) == [(1, 1, 1), (2, 2, 1)]


def test_samples_have_their_places_kept() -> None:
    scheduler = make_scheduler(max_batch_size=4)
    first, second, third = add(scheduler, 3, 2, 2, n=3)
    assert shape(step(scheduler), [first, second, third]) == [(0, 3, 1)]
    samples = [first.fork(1), first.fork(2)]
    first.request.sequences += samples
    scheduler.fork(first, samples)
    scheduler.finish(first)
    assert [chunk.sequence for chunk in step(scheduler)] == samples
    scheduler.finish(samples[0])
    assert [chunk.sequence for chunk in step(scheduler)] == [samples[1], second]


def test_more_samples_than_places_wait_in_front_of_younger_requests() -> None:
    scheduler = make_scheduler(max_batch_size=2)
    first, second = add(scheduler, 3, 2, n=3)
    step(scheduler)
    samples = [first.fork(1), first.fork(2)]
    first.request.sequences += samples
    scheduler.fork(first, samples)
    assert [chunk.sequence for chunk in step(scheduler)] == [first, samples[0]]
    scheduler.finish(first)
    assert [chunk.sequence for chunk in step(scheduler)] == [samples[0], samples[1]]
    scheduler.finish(samples[0])
    scheduler.finish(samples[1])
    assert [chunk.sequence for chunk in step(scheduler)] == [second]


def test_a_request_waits_until_its_whole_prompt_has_room() -> None:
    scheduler = make_scheduler(num_blocks=5, max_batch_tokens=100)
    sequences = add(scheduler, 9, 8)
    assert shape(step(scheduler), sequences) == [(0, 9, 1)]  # 3 blocks; 8 tokens and one more need 3, 2 are free
    scheduler.finish(sequences[0])
    assert shape(step(scheduler), sequences) == [(1, 8, 1)]


def test_blocks_of_a_prompt_still_being_fed_are_not_promised_twice() -> None:
    scheduler = make_scheduler(num_blocks=5, max_batch_tokens=4)
    sequences = add(scheduler, 12, 8)  # 4 and 3 blocks with the next token
    for _ in range(3):
        assert [chunk.sequence for chunk in step(scheduler)] == sequences[:1]
    assert scheduler.num_preempted == 0


def test_the_youngest_is_preempted_and_fed_again_whole() -> None:
    scheduler = make_scheduler(num_blocks=4, max_batch_tokens=100, prefix_caching=False)
    sequences = add(scheduler, 4, 7)
    assert shape(step(scheduler), sequences) == [(0, 4, 1), (1, 7, 1)]  # 1 and 2 blocks of 4
    assert shape(step(scheduler), sequences) == [(0, 1, 1), (1, 1, 1)]  # 2 and 2 blocks; those of 1 are full
    assert shape(step(scheduler), sequences) == [(0, 1, 1)]  # 1 finds no third block and gives back two
    assert (sequences[1].num_cached, sequences[1].block_ids) == (0, [])
    assert sequences[1].output == [7, 7]
    assert scheduler.num_preempted == 1
    scheduler.finish(sequences[0])
    (chunk,) = step(scheduler)
    assert chunk.token_ids == [*sequences[1].request.prompt, 7, 7]
    assert chunk.num_logits == 1


def test_what_a_preempted_sequence_had_is_found_again() -> None:
    scheduler = make_scheduler(num_blocks=4, max_batch_tokens=100)
    sequences = add(scheduler, 4, 7)
    for _ in range(3):
        step(scheduler)
    scheduler.finish(sequences[0])
    (chunk,) = step(scheduler)
    assert chunk.token_ids == [7]  # its two full blocks are still there
    assert scheduler.num_prefix_tokens == 8


def test_an_older_sequence_takes_the_blocks_of_the_youngest() -> None:
    scheduler = make_scheduler(num_blocks=3, max_batch_tokens=100)
    sequences = add(scheduler, 6, 2)
    assert shape(step(scheduler), sequences) == [(0, 6, 1), (1, 2, 1)]
    assert shape(step(scheduler), sequences) == [(0, 1, 1), (1, 1, 1)]
    assert shape(step(scheduler), sequences) == [(0, 1, 1), (1, 1, 1)]  # both blocks of 0 and the block of 1 full
    assert shape(step(scheduler), sequences) == [(0, 1, 1)]
    assert sequences[1].block_ids == []
    assert len(sequences[0].block_ids) == 3


def test_a_prompt_takes_the_blocks_of_a_younger_answer_planned_for_the_same_step() -> None:
    scheduler = make_scheduler(num_blocks=5, max_batch_tokens=2)
    long, short = sequences = add(scheduler, 10, 1)
    for _ in range(8):
        step(scheduler)
    assert (len(long.block_ids), len(short.block_ids)) == (2, 2)  # all full, and one is free
    assert shape(step(scheduler), sequences) == [(0, 1, 0)]
    assert (scheduler.num_preempted, short.block_ids) == (1, [])


def test_a_preempted_sequence_is_first_in_line() -> None:
    scheduler = make_scheduler(num_blocks=3, max_batch_tokens=100)
    sequences = add(scheduler, 6, 2, 1)
    while sequences[1].num_cached or not sequences[1].num_output:
        step(scheduler)
    scheduler.finish(sequences[0])
    assert [chunk.sequence for chunk in step(scheduler)] == [sequences[1], sequences[2]]


def test_a_prompt_that_begins_like_an_earlier_one_is_fed_from_where_they_part() -> None:
    scheduler = make_scheduler(max_batch_tokens=100)
    first = make_sequence(11)
    scheduler.add(first.request)
    step(scheduler)
    again = Request((*first.request.prompt[:9], 5, 5), SamplingParams()).sequences[0]
    scheduler.add(again.request)
    chunks = step(scheduler)
    assert chunks[1].token_ids == [108, 5, 5]
    assert again.block_ids[:2] == first.block_ids[:2]
    assert again.block_ids[2] != first.block_ids[2]


def test_the_last_token_of_a_known_prompt_is_fed_for_its_logits() -> None:
    scheduler = make_scheduler(max_batch_tokens=100)
    for _ in range(2):
        sequence = make_sequence(8)
        scheduler.add(sequence.request)
        (chunk,) = step(scheduler)
        scheduler.finish(sequence)
    assert chunk.token_ids == [104, 105, 106, 107]


def test_log_probabilities_of_a_prompt_need_all_of_it() -> None:
    scheduler = make_scheduler(max_batch_tokens=6)
    first = make_sequence(8)
    scheduler.add(first.request)
    step(scheduler)
    step(scheduler)
    scheduler.finish(first)
    again = make_sequence(8, prompt_logprobs=0)
    scheduler.add(again.request)
    assert shape(scheduler.schedule(), [again]) == [(0, 6, 6)]


@pytest.mark.parametrize(("num_blocks", "expected"), [(4, [[7, 8, 8, 8], [7, 9]]), (3, [[7], [7]])])
def test_drafts_take_only_what_nobody_needs(num_blocks: int, expected: list[list[int]]) -> None:
    scheduler = make_scheduler(num_blocks, max_batch_tokens=6)
    first, second = add(scheduler, 3, 3)
    step(scheduler)
    asked = []

    def propose(plan: dict[Sequence, int], limit: int) -> dict[Sequence, list[int]]:
        asked.append((list(plan.values()), limit))
        return {first: [8] * 3, second: [9]}

    chunks = scheduler.schedule(propose)
    assert asked == [([1, 1], 4)]
    assert [chunk.token_ids for chunk in chunks] == expected
    assert (
        [1 + chunk.num_drafts for chunk in chunks] == [chunk.num_logits for chunk in chunks] == list(map(len, expected))
    )
    scheduler.advance(chunks[0], num_rejected=chunks[0].num_drafts)
    assert first.num_cached == 4


def test_close_frees_everything() -> None:
    cache = make_cache(num_blocks=6)
    scheduler = Scheduler(cache, max_batch_size=4, max_batch_tokens=10, prefix_caching=True)
    add(scheduler, 7, 7, 7)
    step(scheduler)
    assert cache.num_free < 6
    scheduler.close()
    assert cache.num_free == 6
    assert scheduler.is_done
