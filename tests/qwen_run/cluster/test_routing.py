"""Which replica is asked: the one that has the beginning of a prompt, and never all the same one."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_run.cluster.routing import BLOCK, Router, block_keys


def prompt(system: int, question: int) -> list[int]:
    return [1000 * system + i for i in range(5 * BLOCK)] + [question] * 10


def test_prompts_that_begin_alike_go_to_one_replica():
    router = Router(4)
    chosen = {}
    for question in range(6):
        for system in range(4):
            keys = block_keys(prompt(system, question))
            chosen.setdefault(system, set()).add(router.choose({0: 0, 1: 0}, keys))
    assert all(len(each) == 1 for each in chosen.values())  # each beginning is computed once
    assert Counter(min(each) for each in chosen.values()) == {0: 2, 1: 2}  # and not all of them in one place


@pytest.mark.parametrize("session", [None, "one session"])
def test_one_beginning_does_not_send_everything_to_one_replica(session):
    router, loads = Router(4), dict.fromkeys(range(4), 0)
    for question in range(64):
        loads[router.choose(loads, block_keys(prompt(0, question)), session)] += 1
    assert max(loads.values()) - min(loads.values()) <= 4


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([None, "a", "b"]), st.integers(0, 5)), max_size=60))
def test_no_replica_has_more_than_the_slack_more_when_it_is_chosen(requests):
    router, loads = Router(3), dict.fromkeys(range(3), 0)
    for system, session, ended in requests:
        loads[ended % 3] = max(0, loads[ended % 3] - ended)
        chosen = router.choose(loads, block_keys(prompt(system, 0)), session)
        assert loads[chosen] < min(loads.values()) + 3
        loads[chosen] += 1


def test_a_session_stays_and_moves_only_where_its_replica_is_gone():
    router = Router(1000)
    every = {name: router.choose({0: 0, 1: 0, 2: 0}, [], name) for name in map(str, range(300))}
    assert min(Counter(every.values()).values()) > 60
    assert all(router.choose({0: 9, 1: 5, 2: 7}, [], name) == number for name, number in every.items())
    without = {name: router.choose({0: 0, 2: 0}, [], name) for name in every}
    assert all(without[name] == number for name, number in every.items() if number != 1)


def test_what_a_replica_had_is_forgotten_with_it():
    router = Router(4)
    keys = block_keys(prompt(0, 0))
    first = router.choose({0: 0, 1: 0}, keys)
    router.forget(first)
    assert router.choose({0: 0, 1: 1}, keys) == 0


def test_a_salt_and_an_earlier_token_change_every_key():
    plain, salted = block_keys(prompt(0, 0)), block_keys(prompt(0, 0), "a key")
    other = block_keys([7, *prompt(0, 0)[1:]])
    assert len(plain) == 5
    assert not {*plain} & {*salted, *other}
