"""A stream that begins again: its reader gets every token and every character once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_engine.errors import EngineError
from qwen_run.api.outputs import CompletionOutput, Logprob, RequestOutput
from qwen_run.cluster.delivered import Delivered

TOKENS = list(range(30))
TEXT = "".join(chr(ord("a") + token % 26) * (token % 3) for token in TOKENS)  # of some tokens none, of others two


def output(first: int, last: int, first_text: int, last_text: int, index: int = 0) -> RequestOutput:
    done = last == len(TOKENS)
    ids = [token + 100 * index for token in TOKENS[first:last]]
    logprobs = [{token: Logprob(-float(token), 1)} for token in ids]
    answer = CompletionOutput(index, TEXT[first_text:last_text], ids, 0.0, logprobs, "length" if done else None)
    return RequestOutput("r", None, [], None, [answer], done)


def parts(draw, complete: bool) -> list[RequestOutput]:
    """An answer in parts, whose text may lag behind its tokens as a stopper holds it back."""
    cuts = sorted(draw(st.sets(st.integers(1, len(TOKENS) - 1), max_size=6)))
    cuts = [0, *cuts, len(TOKENS)]
    texts = [0]
    for cut in cuts[1:-1]:
        known = sum(token % 3 for token in TOKENS[:cut])
        texts.append(draw(st.integers(texts[-1], max(texts[-1], known))))
    texts.append(len(TEXT))
    found = [output(*each) for each in zip(cuts, cuts[1:], texts, texts[1:], strict=False)]
    return found if complete else found[: draw(st.integers(0, len(found) - 1))]


@given(st.data())
def test_any_number_of_beginnings_make_one_answer(data):
    delivered, got = Delivered(), []
    for _ in range(data.draw(st.integers(0, 3))):
        got += [delivered.take(each) for each in parts(data.draw, complete=False)]
        delivered.restart()
    got += [delivered.take(each) for each in parts(data.draw, complete=True)]
    answers = [each.outputs[0] for each in got if each is not None]
    assert [token for each in answers for token in each.token_ids] == TOKENS
    assert "".join(each.text for each in answers) == TEXT
    assert [token for each in answers for found in each.logprobs for token in found] == TOKENS
    assert [each.finish_reason for each in answers].count("length") == 1
    whole = delivered.whole(got[-1]).outputs[0]
    assert (whole.token_ids, whole.text, len(whole.logprobs)) == (TOKENS, TEXT, len(TOKENS))
    assert delivered.num_tokens == len(TOKENS)


def test_other_tokens_are_an_error_and_not_an_answer():
    delivered = Delivered()
    delivered.take(output(0, 5, 0, 2))
    delivered.restart()
    with pytest.raises(EngineError, match="other tokens from token 1 on: replicas of different engines"):
        delivered.take(output(1, 6, 0, 2))


def test_each_of_several_answers_has_its_own_place():
    delivered = Delivered()
    first, second = output(0, 5, 0, 2), output(0, 3, 0, 1, index=1)
    delivered.take(first)
    delivered.take(second)
    delivered.restart()
    assert delivered.take(output(0, 4, 0, 1)) is None
    again = delivered.take(output(0, 6, 0, 2, index=1))
    assert again is not None
    assert again.outputs[0].token_ids == [103, 104, 105]
