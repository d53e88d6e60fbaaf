"""Beam search: the answers and scores of transformers on tiny random models, each beam computed from its start."""

import functools
import itertools

import numpy as np
import pytest

from qwen_engine.errors import EngineError
from qwen_run.sampling.beam import BeamSearch, beam_logprobs
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.processors import SamplingContext

VOCAB_SIZE = 41
PROMPT = (3, 17, 5, 3, 29)


@functools.cache
def tiny_model(seed):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).eval()


def last_logits(model, sequences):
    import torch

    with torch.no_grad():
        return model(torch.tensor(sequences)).logits[:, -1].numpy()


def search(model, params, stop_token_ids):
    """The hypotheses of our search: (token ids, score), best first."""
    beams = BeamSearch(params, stop_token_ids, params.max_tokens)
    contexts, sequences = [SamplingContext(params, PROMPT, stop_token_ids)], [PROMPT]
    while not beams.is_done:
        rows = zip(last_logits(model, sequences), contexts, strict=True)
        logprobs = np.stack([beam_logprobs(row, params, context) for row, context in rows])
        chosen = beams.advance(logprobs)
        contexts = [contexts[parent].fork() for parent, _ in chosen]
        for context, (_, token_id) in zip(contexts, chosen, strict=True):
            context.append(token_id)
        sequences = [(*sequences[parent], token_id) for parent, token_id in chosen]
    return beams.hypotheses()


def transformers_search(model, params, stop_token_ids, **options):
    """The same from transformers."""
    import torch

    found = model.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), do_sample=False, num_beams=params.num_beams,
        num_return_sequences=params.n, max_new_tokens=params.max_tokens, length_penalty=params.length_penalty,
        early_stopping=params.early_stopping, eos_token_id=sorted(stop_token_ids) or None, pad_token_id=VOCAB_SIZE + 1,
        output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    answers = [[int(i) for i in row[len(PROMPT) :] if i <= VOCAB_SIZE and i >= 0] for row in found.sequences]
    return answers, found.sequences_scores.tolist()


def assert_equal(model, params, stop_token_ids, **options):
    ours = search(model, params, stop_token_ids)
    answers, scores = transformers_search(model, params, stop_token_ids, **options)
    assert [list(hypothesis.token_ids) for hypothesis in ours] == answers
    # sums of some ten float32 log probabilities, from logits of two orders of adding up
    np.testing.assert_allclose([hypothesis.score for hypothesis in ours], scores, rtol=2e-5)
    return ours


@functools.cache
def likely_tokens(seed, *places):
    """Tokens at these places of the best answers when nothing stops them: what will stop beams."""
    params = SamplingParams(temperature=0, num_beams=3, n=3, max_tokens=12)
    return {hypothesis.token_ids[place] for hypothesis in search(tiny_model(seed), params, ()) for place in places}


@pytest.mark.slow
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.5, -1.5])
def test_equals_transformers(early_stopping, length_penalty):
    num_stopped = 0
    models = ((0, 5), (1, 2))  # seed, num_beams
    for (seed, num_beams), places, max_tokens in itertools.product(models, ((), (5,), (2, 4, 8)), (1, 4, 15)):
        params = SamplingParams(
            temperature=0, num_beams=num_beams, n=num_beams - 1, max_tokens=max_tokens,
            length_penalty=length_penalty, early_stopping=early_stopping,
        )  # fmt: skip
        stop_token_ids = likely_tokens(seed, *places)
        ours = assert_equal(tiny_model(seed), params, stop_token_ids)
        num_stopped += sum(hypothesis.token_ids[-1] in stop_token_ids for hypothesis in ours)
    assert num_stopped >= 10, "the models hardly ever stop: little is tested"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"min_tokens": 5}, {"min_new_tokens": 5}),
        ({"logit_bias": {7: 3.0, 3: -2.0}}, {"sequence_bias": {(7,): 3.0, (3,): -2.0}}),
    ],
    ids=["repetition", "min_tokens", "bias"],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_processors_see_log_probabilities_as_in_transformers(ours, theirs, seed):
    model, stop_token_ids, plain = tiny_model(seed), likely_tokens(seed, 2), {"num_beams": 3, "n": 3, "max_tokens": 12}
    found = assert_equal(model, SamplingParams(temperature=0, **plain, **ours), stop_token_ids, **theirs)
    assert found != search(model, SamplingParams(temperature=0, **plain), stop_token_ids)


def test_logits_that_are_not_numbers():
    params = SamplingParams(temperature=0, num_beams=2)
    with pytest.raises(EngineError, match=r"position 2 hold nan"):
        beam_logprobs(np.array([0, np.nan], np.float32), params, SamplingContext(params, (1, 1)))


def log(*rows):
    return np.log(np.array(rows, np.float32))


def test_by_hand():
    """Two beams over three tokens, the last of which ends an answer."""
    search = BeamSearch(SamplingParams(temperature=0, num_beams=2, n=2), (2,), max_tokens=8)
    assert search.advance(log([0.5, 0.3, 0.2])) == [(0, 0), (0, 1)]
    # totals: 0.5 * (0.1, 0.3, 0.6) and 0.3 * (0.8, 0.1, 0.1): the end at 0.30 is finished, 0.24 and 0.15 go on
    assert search.advance(log([0.1, 0.3, 0.6], [0.8, 0.1, 0.1])) == [(1, 0), (0, 1)]
    assert not search.is_done
    # 0.24 * (0.1, 0.1, 0.8) and 0.15 * (0.4, 0.4, 0.2): the end at 0.192
    assert search.advance(log([0.1, 0.1, 0.8], [0.4, 0.4, 0.2])) == [(1, 0), (1, 1)]
    found = search.hypotheses()
    assert [hypothesis.token_ids for hypothesis in found] == [(1, 0, 2), (0, 2)]
    np.testing.assert_allclose([hypothesis.score for hypothesis in found], [np.log(0.192) / 3, np.log(0.3) / 2], 1e-6)
    assert search.is_done  # the best beam, 0.06, has log(0.06) / 3, less than both


def test_never_with_a_penalty_on_length_looks_at_the_shortest_answer_to_come():
    """0.4005 after two tokens scores log(0.4005) * 2 at best, above the worst answer's log(0.045) * 2; * 8 is below."""
    params = SamplingParams(temperature=0, num_beams=2, length_penalty=-1, early_stopping="never")
    search = BeamSearch(params, (2,), max_tokens=8)
    search.advance(log([0.45, 0.05, 0.5]))
    search.advance(log([0.89, 0.01, 0.1], [0.2, 0.1, 0.7]))
    assert not search.is_done


def test_an_end_below_the_width_is_no_answer():
    """As in transformers only the best ``num_beams`` continuations may finish."""
    search = BeamSearch(SamplingParams(temperature=0, num_beams=2, early_stopping=True), (3,), max_tokens=8)
    search.advance(log([0.4, 0.3, 0.2, 0.1]))
    assert search.hypotheses() == []


def test_of_equals_the_first_beam_and_the_lower_id_come_first():
    search = BeamSearch(SamplingParams(temperature=0, num_beams=2), (), max_tokens=8)
    assert search.advance(log([0.25, 0.25, 0.25, 0.25])) == [(0, 0), (0, 1)]
    assert search.advance(log([0.25] * 4, [0.25] * 4)) == [(0, 0), (0, 1)]
