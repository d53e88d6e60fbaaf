"""Which tokens may come next: equal to the logits processors of transformers, on random sequences."""

import numpy as np
import pytest
import torch
import transformers

from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.processors import SamplingContext, process
from qwen_run.sampling.token_rules import TokenRules

VOCAB_SIZE = 7  # few tokens, so that they come again
EOS = 6
RULES = {
    "suppress_tokens": {"suppress_tokens": [2, 5]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [1, 3]},
    "bad words": {"bad_words_ids": [[4], [1, 2], [1, 2, 3], [0, 0, 0, 5], [EOS]]},
    "n-grams": {"no_repeat_ngram_size": 3},
    "unigrams": {"no_repeat_ngram_size": 1},
    "forced first": {"forced_bos_token_id": 5},
    "forced first, others suppressed": {"forced_bos_token_id": 5, "begin_suppress_tokens": [5, 1]},
    "forced last": {"forced_eos_token_id": EOS},
    "one of two forced last": {"forced_eos_token_id": [2, EOS]},
    "least length": {"min_length": 9},
    "least new tokens": {"min_new_tokens": 4},
    "least new tokens before a least length": {"min_new_tokens": 2, "min_length": 30},
    "all": {"bad_words_ids": [[1, 2]], "no_repeat_ngram_size": 4, "suppress_tokens": [3], "forced_eos_token_id": 0},
}


def transformers_processors(options, prompt, max_tokens):
    """What ``generate`` makes of ``options`` for a prompt."""
    length = len(prompt)
    given = transformers.GenerationConfig(**options)
    if given.min_new_tokens is not None:
        given.min_length = given.min_new_tokens + length
    given.max_length, given._eos_token_tensor = length + max_tokens, torch.tensor([EOS])
    found = transformers.GenerationMixin._get_logits_processor(
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL)), given, length, torch.tensor([prompt])
    )
    return lambda ids, scores: found(torch.tensor([ids]), torch.tensor(scores[None]))[0].numpy()


SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("length", [1, 2, 8])
def test_scores_are_those_of_transformers(name, length):
    options, max_tokens = RULES[name], 12
    rng = np.random.default_rng(length)
    changed = 0
    for _ in range(4):
        prompt = rng.integers(0, VOCAB_SIZE, length).tolist()
        config = {"max_new_tokens": max_tokens} | options
        params = SamplingParams.from_generation_config(config)
        context = SamplingContext(params, prompt, [EOS], max_tokens=max_tokens)
        processors, ids = transformers_processors(options, prompt, max_tokens), list(prompt)
        for _ in range(max_tokens):
            logits = rng.standard_normal(VOCAB_SIZE).astype(np.float32)
            expected = processors(ids, logits)
            found = process(logits, params, context)
            assert found.tolist() == expected.tolist(), (prompt, ids)
            changed += found.tolist() != logits.tolist()
            ids.append(int(rng.integers(0, VOCAB_SIZE)))
            context.append(ids[-1])
            context = context.fork() if len(ids) % 3 == 0 else context
    applies = {"forced first": length == 1, "forced first, others suppressed": True}
    assert bool(changed) == applies.get(name, True)


def test_a_fork_knows_its_own_tokens_alone():
    params = SamplingParams(no_repeat_ngram_size=2, bad_words_ids=[[3, 4]])
    first = TokenRules(params, [1, 2, 1], [], 10)
    second = first.fork()
    second.append(3)  # 1 3 has come
    second.append(1)
    scores = [np.zeros(VOCAB_SIZE, np.float32) for _ in range(2)]
    first.apply(scores[0])
    second.apply(scores[1])
    assert [np.flatnonzero(np.isinf(each)).tolist() for each in scores] == [[2], [2, 3]]
