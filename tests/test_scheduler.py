"""The policy, step by step: no engine, a cache of one small pool."""

from __future__ import annotations

from qwen_engine.graph_io import TensorSpec
from qwen_run.kv_cache import KVCache
from qwen_run.request import Request
from qwen_run.sampling import SamplingParams
from qwen_run.scheduler import Chunk, Scheduler

BLOCK_SIZE = 4


def make_scheduler(num_blocks: int = 50, max_batch_size: int = 4, max_batch_tokens: int = 10) -> Scheduler:
    cache = KVCache([TensorSpec("pool", "paged_state", "int32", ("num_blocks", BLOCK_SIZE))], BLOCK_SIZE, num_blocks)
    return Scheduler(cache, max_batch_size, max_batch_tokens)


def make_request(length: int) -> Request:
    return Request(tuple(range(100, 100 + length)), SamplingParams())


def step(scheduler: Scheduler, token_id: int = 7) -> list[Chunk]:
    """Schedule, and let every request that gets logits sample ``token_id``."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        needed = -(-(chunk.request.num_cached + len(chunk.token_ids)) // BLOCK_SIZE)
        assert len(chunk.request.block_ids) == needed
    scheduler.advance(chunks)
    for chunk in chunks:
        if chunk.wants_logits:
            chunk.request.output.append(token_id)
    return chunks


def shape(chunks: list[Chunk], requests: list[Request]) -> list[tuple[int, int, bool]]:
    """(which request, how many tokens, logits) of each chunk."""
    return [(requests.index(chunk.request), len(chunk.token_ids), chunk.wants_logits) for chunk in chunks]


def test_prompts_are_fed_in_chunks_beside_decoding_ones() -> None:
    scheduler, requests = make_scheduler(max_batch_tokens=10), [make_request(3), make_request(15), make_request(2)]
    for request in requests:
        scheduler.add(request)
    assert shape(step(scheduler), requests) == [(0, 3, True), (1, 7, False)]
    assert shape(step(scheduler), requests) == [(0, 1, True), (1, 8, True), (2, 1, False)]
    assert shape(step(scheduler), requests) == [(0, 1, True), (1, 1, True), (2, 1, True)]
    assert shape(step(scheduler), requests) == [(0, 1, True), (1, 1, True), (2, 1, True)]


def test_a_chunk_carries_the_tokens_that_are_not_cached_yet() -> None:
    scheduler, request = make_scheduler(max_batch_tokens=4), make_request(6)
    scheduler.add(request)
    fed = [step(scheduler, token_id)[0].token_ids for token_id in (7, 8, 9, 10)]
    assert fed == [[100, 101, 102, 103], [104, 105], [8], [9]]


def test_batch_size_is_a_limit_and_order_is_first_come_first_served() -> None:
    scheduler, requests = make_scheduler(max_batch_size=2), [make_request(2) for _ in range(3)]
    for request in requests:
        scheduler.add(request)
    assert shape(step(scheduler), requests) == [(0, 2, True), (1, 2, True)]
    scheduler.finish(requests[0])
    assert shape(step(scheduler), requests) == [(1, 1, True), (2, 2, True)]


def test_a_request_waits_until_its_whole_prompt_has_room() -> None:
    scheduler, requests = make_scheduler(num_blocks=5, max_batch_tokens=100), [make_request(9), make_request(8)]
    for request in requests:
        scheduler.add(request)
    assert shape(step(scheduler), requests) == [(0, 9, True)]  # 3 blocks; 8 tokens and one more need 3, 2 are free
    scheduler.finish(requests[0])
    assert shape(step(scheduler), requests) == [(1, 8, True)]


def test_the_youngest_is_preempted_and_fed_again_whole() -> None:
    scheduler, requests = make_scheduler(num_blocks=4, max_batch_tokens=100), [make_request(4), make_request(7)]
    for request in requests:
        scheduler.add(request)
    assert shape(step(scheduler), requests) == [(0, 4, True), (1, 7, True)]  # 1 and 2 blocks of 4
    assert shape(step(scheduler), requests) == [(0, 1, True), (1, 1, True)]  # 2 and 2 blocks; those of 1 are full
    assert shape(step(scheduler), requests) == [(0, 1, True)]  # request 1 finds no third block and gives back two
    assert (requests[1].num_cached, requests[1].block_ids) == (0, [])
    assert requests[1].output == [7, 7]
    scheduler.finish(requests[0])
    (chunk,) = step(scheduler)
    assert chunk.token_ids == [*requests[1].prompt, 7, 7]
    assert chunk.wants_logits


def test_an_older_request_takes_the_blocks_of_the_youngest() -> None:
    scheduler, requests = make_scheduler(num_blocks=3, max_batch_tokens=100), [make_request(6), make_request(2)]
    for request in requests:
        scheduler.add(request)
    assert shape(step(scheduler), requests) == [(0, 6, True), (1, 2, True)]
    assert shape(step(scheduler), requests) == [(0, 1, True), (1, 1, True)]
    assert shape(step(scheduler), requests) == [(0, 1, True), (1, 1, True)]  # both blocks of 0 and the block of 1 full
    assert shape(step(scheduler), requests) == [(0, 1, True)]
    assert requests[1].block_ids == []
    assert len(requests[0].block_ids) == 3


def test_a_preempted_request_is_first_in_line() -> None:
    scheduler, requests = make_scheduler(num_blocks=3, max_batch_tokens=100), [make_request(n) for n in (6, 2, 1)]
    for request in requests:
        scheduler.add(request)
    while requests[1].num_cached or not requests[1].output:
        step(scheduler)
    scheduler.finish(requests[0])
    assert [chunk.request for chunk in step(scheduler)] == [requests[1], requests[2]]


def test_close_frees_everything() -> None:
    scheduler = make_scheduler(num_blocks=6)
    for _ in range(3):
        scheduler.add(make_request(7))
    step(scheduler)
    assert scheduler._cache.num_free < 6
    scheduler.close()
    assert scheduler._cache.num_free == 6
    assert scheduler.is_done
