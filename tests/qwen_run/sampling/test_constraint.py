"""Constraints of an answer, and the one that ends thinking in time."""

import doctest

import numpy as np
import pytest

import qwen_run.sampling.constraint
from cases.scripted import scripted_model, write_text_files
from qwen_engine.errors import RequestError
from qwen_run import LLM, SamplingParams
from qwen_run.sampling.constraint import END_OF_THINKING, ThinkingBudget
from qwen_run.sampling.processors import SamplingContext
from qwen_run.sampling.sample import sample

BEGIN, END, WORDS = 1, 2, [7, 2, 8]


def said(budget, tokens, is_thinking=False):
    """What a model that wants to say ``tokens`` says."""
    constraint, wanted, answer = ThinkingBudget(budget, BEGIN, END, WORDS, is_thinking), list(tokens), []
    while wanted:
        allowed = constraint.allowed()
        answer.append(wanted.pop(0) if allowed is None else int(allowed[0]))
        constraint.append(answer[-1])
    return answer


@pytest.mark.parametrize("is_thinking", [False, True])
@pytest.mark.parametrize("budget", [0, 1, 3])
def test_thinking_ends_within_its_budget(budget, is_thinking):
    begin = [] if is_thinking else [BEGIN]
    thoughts = [5] * 20
    expected = [*begin, *thoughts[:budget], *WORDS, *thoughts[budget:]]
    assert said(budget, [*begin, *thoughts], is_thinking) == expected


def test_thinking_that_ends_by_itself_is_let_alone():
    tokens = [BEGIN, 5, END, 6, 6, 6, 6, BEGIN, 6, 6]
    assert said(3, tokens) == tokens


def test_an_answer_that_does_not_think_is_let_alone():
    tokens = [6, BEGIN, 6, 6, 6]
    assert said(0, tokens) == tokens


def test_a_constraint_bounds_what_is_sampled():
    context = SamplingContext(SamplingParams(temperature=1.0), [BEGIN], constraints=[
        ThinkingBudget(0, BEGIN, END, WORDS, True)
    ])  # fmt: skip
    logits, chosen = np.zeros(10, np.float32), []
    logits[4] = 50
    other = context.fork()
    for position in range(1, 6):
        chosen.append(sample(logits, SamplingParams(temperature=1.0), context, position).token_id)
        context.append(chosen[-1])
    assert chosen == [*WORDS, 4, 4]
    assert sample(logits, SamplingParams(temperature=0), other, 1).token_id == WORDS[0]  # a fork goes its own way


THOUGHTS = "x" * 80
PREFIX, SUFFIX = "<think>", "</think>"


@pytest.fixture(params=[0, 8])
def llm(tmp_path, request):
    model, _ = scripted_model(write_text_files(tmp_path, "qwen3"), lambda prompt: PREFIX + THOUGHTS + SUFFIX + "Yes")
    return LLM(model, max_drafts=request.param)


def test_a_budget_in_a_request(llm):
    free, bounded = llm.chat(
        [[{"role": "user", "content": "?"}]] * 2,
        [SamplingParams(temperature=0), SamplingParams(temperature=0, thinking_token_budget=10)],
        use_tqdm=False,
    )
    assert free.outputs[0].text == PREFIX + THOUGHTS + SUFFIX + "Yes"
    assert bounded.outputs[0].text.startswith(PREFIX + THOUGHTS[:10] + END_OF_THINKING)


def test_a_model_that_does_not_think_has_no_budget(tmp_path):
    directory = write_text_files(tmp_path)
    text = (directory / "tokenizer.json").read_text("utf-8").replace("<think>", "<thonk>")
    (directory / "tokenizer.json").write_text(text, "utf-8")
    model, _ = scripted_model(directory, str.upper)
    with pytest.raises(RequestError, match="thinking_token_budget is 5, and the engine's tokenizer has no <think>"):
        LLM(model).generate("a", SamplingParams(thinking_token_budget=5))


def test_doctests():
    results = doctest.testmod(qwen_run.sampling.constraint)
    assert (results.attempted > 0, results.failed) == (True, 0)
