"""Stop strings: where an answer ends does not depend on how its characters are cut into tokens."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cases.scripted import IM_END, core_tokenizer
from qwen_run.text.stops import TextStopper
from qwen_run.text.token_text import BYTES_OF_CHARACTERS
from qwen_run.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(core_tokenizer())


def answer(ids, stop, **options):
    """The pieces released token by token, the rest at the end, the stop reason, and how many tokens were taken."""
    stopper = TextStopper(TOKENIZER, stop, **options)
    pieces = []
    for count, token_id in enumerate(ids, start=1):
        ended = stopper.push(token_id)
        assert ended == (stopper.stop_reason is not None)
        pieces.append(stopper.release())
        if ended:
            return pieces, stopper.close(), stopper.stop_reason, count
    return pieces, stopper.close(), None, len(ids)


def text_of(ids, stop, **options):
    pieces, rest, _, _ = answer(ids, stop, **options)
    return "".join(pieces) + rest


def cut(text, stop, included=False):
    """Where ``text`` ends by looking at every beginning of it: the plain definition."""
    for end in range(1, len(text) + 1):
        if found := [s for s in stop if text[:end].endswith(s)]:
            longest = max(found, key=len)
            return (text[:end] if included else text[: end - len(longest)]), longest
    return text, None


def byte_ids(text):
    """One token a byte."""
    return [BYTE_IDS[byte] for byte in text.encode()]


BYTE_IDS = {
    BYTES_OF_CHARACTERS[TOKENIZER.token(token_id)]: token_id
    for token_id in range(TOKENIZER.vocab_size)
    if len(TOKENIZER.token(token_id) or "") == 1
}
TEXTS = st.text(st.sampled_from("ab \n你é"), max_size=24)
STOPS = st.lists(st.text(st.sampled_from("ab \n你é"), min_size=1, max_size=5), max_size=3)


@settings(deadline=None)
@given(TEXTS, STOPS, st.booleans(), st.booleans())
@example("aabaab aabaaab", ["aabaaa"], False, True)  # a match that begins inside a failed one
@example("xab", ["b", "ab"], False, False)  # two that end together
def test_equals_the_definition(text, stop, whole_tokens, included):
    ids = TOKENIZER.encode(text) if whole_tokens else byte_ids(text)
    pieces, rest, reason, _ = answer(ids, stop, include_stop_str_in_output=included)
    assert ("".join(pieces) + rest, reason) == cut(text, stop, included)
    if reason:
        assert rest == ""


@settings(deadline=None)
@given(TEXTS, STOPS)
def test_what_is_released_stays_and_no_more_than_needed_is_held(text, stop):
    stopper, released = TextStopper(TOKENIZER, stop), ""
    final = cut(text, stop)[0]
    for count, token_id in enumerate(byte_ids(text), start=1):
        if stopper.push(token_id):
            break
        released += stopper.release()
        assert final.startswith(released)
        arrived = text.encode()[:count].decode(errors="ignore")
        beginnings = {s[:i] for s in stop for i in range(1, len(s))}
        assert len(arrived) - len(released) == max((len(b) for b in beginnings if arrived.endswith(b)), default=0)


def test_across_tokens_and_released_late():
    pieces, rest, reason, count = answer(byte_ids("one END two"), ["END"])
    assert (pieces[:8], rest, reason, count) == (["o", "n", "e", " ", "", "", ""], "", "END", 7)
    pieces, rest, reason, _ = answer(byte_ids("an EN"), ["END"])
    assert (pieces, rest, reason) == (["a", "n", " ", "", ""], "EN", None)


def test_the_rest_of_the_last_token_is_dropped():
    ids = TOKENIZER.encode("a the")  # the last token is " the"
    assert len(ids) == 2
    assert text_of(ids, ["t"]) == "a "
    assert text_of(ids, ["t"], include_stop_str_in_output=True) == "a t"


def test_included_text_is_not_held_back():
    pieces, _, _, _ = answer(byte_ids("xEND"), ["END"], include_stop_str_in_output=True)
    assert pieces == ["x", "E", "N", "D"]


def test_characters_split_over_tokens():
    ids = TOKENIZER.encode("a 你🤗b")
    assert text_of(ids, ["🤗"]) == "a 你"
    assert text_of(byte_ids("a 你")[:-1], ["你"]) == "a �"


@pytest.mark.parametrize(
    ("min_tokens", "expected"), [(0, "x"), (2, "x"), (3, "xABy"), (5, "xABy"), (6, "xAByABz"), (99, "xAByABz")]
)
def test_min_tokens(min_tokens, expected):
    """The stop string is complete with the third and with the sixth token."""
    assert text_of(byte_ids("xAByABz"), ["AB"], min_tokens=min_tokens) == expected


def test_min_tokens_counts_where_the_stop_string_ends():
    assert text_of(byte_ids("xABAC"), ["ABAC"], min_tokens=3) == "x"
    assert text_of(byte_ids("aaaab"), ["aa"], min_tokens=2) == "a"


def test_special_tokens_by_name():
    ids = [*TOKENIZER.encode("hi"), IM_END, *TOKENIZER.encode("x")]
    pieces, rest, reason, count = answer(ids, ["<|im_end|>"])
    assert ("".join(pieces) + rest, reason, count) == ("hi", "<|im_end|>", 3)
    assert text_of(ids, ["<|im_end|>"], include_stop_str_in_output=True) == "hi<|im_end|>"
    assert text_of(ids, ["<|im_end|>"], min_tokens=3) == "hix"
    assert text_of(ids, ["<|im_end|>"], skip_special_tokens=False) == "hi"
    assert text_of(ids, ["<|im_"], skip_special_tokens=False) == "hi"
    assert text_of(ids, []) == "hix"
