"""Every way to generate, with every family: tokens equal transformers' in float32, scores within 1e-4."""

import threading

import pytest
import torch
from transformers import LogitsProcessor, MaxLengthCriteria, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from cases.torch_pair import PAD, padded
from qwen_run import QwenForCausalLM

pytestmark = pytest.mark.slow
TORCH, ENGINE = "transformers", "engine"


class Odd(LogitsProcessor):
    """Only odd tokens."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores


class Short(StoppingCriteria):
    """Ends a row at eight new tokens."""

    def __init__(self):
        self.longest = None

    def __call__(self, input_ids, scores, **_):
        self.longest = self.longest or input_ids.shape[1] + 7
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.longest)


class Kept(BaseStreamer):
    """Keeps what it is given, and None for the end."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append(None)


# how it is asked for -> whose loop answers, the options
WAYS = {
    "greedy": (ENGINE, {}),
    "greedy, no loop of ours": (TORCH, {"no_repeat_ngram_size": 500}),
    "beams": (ENGINE, {"num_beams": 3}),
    "beams, no loop of ours": (TORCH, {"num_beams": 3, "no_repeat_ngram_size": 500}),
    "several beams": (ENGINE, {"num_beams": 4, "num_return_sequences": 3}),
    "several beams, no loop of ours": (TORCH, {"num_beams": 4, "num_return_sequences": 3, "no_repeat_ngram_size": 500}),
    "sampled": (TORCH, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}),
    "sampled beams": (TORCH, {"do_sample": True, "num_beams": 3}),
    "n-grams": (TORCH, {"no_repeat_ngram_size": 2}),
    "bad words": (TORCH, {"bad_words_ids": [[3], [17, 99]]}),
    "prefix function": (TORCH, {"prefix_allowed_tokens_fn": lambda row, ids: [3, 5, 8, 13, 21, int(ids[-1])]}),
    "processor": (TORCH, {"logits_processor": lambda: [Odd()]}),
    "criteria": (TORCH, {"stopping_criteria": lambda: [Short(), MaxLengthCriteria(10_000)]}),
}


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_transformers(pair, way, use_cache):
    loop, options = WAYS[way]
    ours, theirs = pair.both(*padded(pair.rows), use_cache=use_cache, **options)
    assert pair.ours.last_loop == (loop if use_cache else TORCH)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 4, "num_return_sequences": 3}], ids=str)
def test_scores_and_logits(pair, options, use_cache):
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "use_cache": use_cache}
    ours, theirs = pair.both(*padded(pair.rows), **asked, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    names = ["scores", "logits", *(["sequences_scores"] if "num_beams" in options else [])]
    for name in names:
        for found, expected in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            kept = torch.isfinite(expected)
            assert torch.equal(kept, torch.isfinite(found))
            # Sums of another order: a logit is one of products as large as the largest logit, 30 in the demo.
            largest = max(10.0, float(expected[kept].abs().max()))
            assert float((found[kept] - expected[kept]).abs().max()) < 1e-5 * largest


def test_padding_on_the_right_and_on_both_sides(pair):
    expected = [pair.alone(row, max_new_tokens=6) for row in pair.rows]
    for ids, mask in (
        padded(pair.rows, left=False),
        padded([[PAD, *row, PAD] for row in pair.rows], left=False),
    ):
        mask = mask * (ids != PAD)
        found = pair.ours.generate(ids, mask, max_new_tokens=6)
        assert pair.ours.last_loop == ENGINE
        assert found[:, ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
def test_drafts_from_the_prompt(pair, options):
    ids = torch.tensor([[5, 17, 99, 3, 8, 5, 17, 99, 3, 8, 5, 17]])
    ours, theirs = pair.both(ids, None, max_new_tokens=24, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(ours, theirs)


def test_an_assistant_of_transformers_and_one_that_is_an_engine(pair, build_engine):
    ids = torch.tensor(pair.rows[:1])
    expected = pair.alone(pair.rows[0], max_new_tokens=20)
    other = QwenForCausalLM.from_pretrained(build_engine(pair.checkpoint, quant="int8", max_seq_len=300))
    other.generation_config.pad_token_id = PAD
    for assistant in (pair.theirs, other):
        found = pair.ours.generate(ids, max_new_tokens=20, assistant_model=assistant)
        assert pair.ours.last_loop == TORCH
        assert found[0, ids.shape[1] :].tolist() == expected


def test_a_conversation_goes_on(pair):
    ids, cache = torch.tensor(pair.rows[:1]), pair.ours.new_cache()
    first = pair.ours.generate(ids, past_key_values=cache, max_new_tokens=6)
    longer = torch.cat([first, torch.tensor([[4, 44]])], 1)
    second = pair.ours.generate(longer, past_key_values=cache, max_new_tokens=6)
    assert cache.get_seq_length() == longer.shape[1] + 5  # the last token was not read
    assert torch.equal(second, pair.theirs.generate(longer, max_new_tokens=6, do_sample=False))


def test_a_streamer_gets_every_token(pair):
    streamers = Kept(), Kept()
    for model, streamer in zip((pair.ours, pair.theirs), streamers, strict=True):
        model.generate(torch.tensor(pair.rows[:1]), max_new_tokens=5, do_sample=False, streamer=streamer)
    assert streamers[0].tokens == streamers[1].tokens
    assert len(streamers[0].tokens) == len(pair.rows[0]) + 6


def test_four_threads_generate_at_the_same_time(pair):
    """Each its own way, with a row of its own; both loops run beside each other."""
    ways = [{}, {"no_repeat_ngram_size": 500}, {"num_beams": 3}, {"use_cache": False}]
    rows = [*pair.rows, pair.rows[0][::-1]]
    found, expected = {}, {}
    for index, (row, way) in enumerate(zip(rows, ways, strict=True)):
        expected[index] = pair.alone(row, max_new_tokens=10, **way)
    together = threading.Barrier(4)

    def run(index, row, way):
        together.wait(120)
        for _ in range(3):
            answer = pair.ours.generate(torch.tensor([row]), max_new_tokens=10, **way)
            found.setdefault(index, []).append(answer[0, len(row) :].tolist())

    threads = [
        threading.Thread(target=run, args=(index, row, way))
        for index, (row, way) in enumerate(zip(rows, ways, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert found == {index: [answer] * 3 for index, answer in expected.items()}


def test_logits_equal_with_padding_anywhere(pair):
    ids = torch.tensor([[5, 17, 99, 3, 8, 41], [1, 64, 2, 77, 3, 4]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 1, 0]])
    ours = pair.ours(ids, attention_mask=mask).logits
    for row in range(2):
        at = mask[row].bool()
        expected = pair.theirs(ids[row : row + 1, at]).logits[0].detach()
        assert float((ours[row, at] - expected).abs().max()) < 1e-4
        assert not ours[row, ~at].any()


def test_loss(pair):
    """With padding on the left, transformers counts what padding says of the first token; an engine does not."""
    losses = []
    for model, left in ((pair.ours, False), (pair.theirs, False), (pair.ours, True)):
        ids, mask = padded(pair.rows, left)
        labels = torch.where(mask.bool() & (ids != 99), ids, -100)
        with torch.no_grad():
            losses.append(float(model(ids, attention_mask=mask, labels=labels).loss))
    assert abs(losses[0] - losses[1]) < 1e-5
    assert abs(losses[2] - losses[0]) < 1e-5
