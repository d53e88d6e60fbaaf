"""An engine as a model of transformers: every way to generate equals transformers' model in float32."""

import gc
import threading
import warnings

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from cases.scripted import core_tokenizer
from cases.tiny import FAMILIES, TINY
from qwen_engine.errors import EngineError, RequestError
from qwen_run import EngineConfig, QwenForCausalLM
from qwen_run.torch_model.paged_cache import PagedCache

PAD = 130
ROWS = [[5, 17, 99, 3, 8, 41, 7], [64, 2, 77], [9, 9, 120, 33, 1]]


def padded(rows, left=True):
    """(ids, mask) of rows of different lengths."""
    width = max(map(len, rows))
    gaps = [[0] * (width - len(row)) for row in rows]
    mask = [[*gap, *[1] * len(row)] if left else [*[1] * len(row), *gap] for gap, row in zip(gaps, rows, strict=True)]
    ids = [[*[PAD] * len(g), *row] if left else [*row, *[PAD] * len(g)] for g, row in zip(gaps, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


class Pair:
    """A tiny checkpoint in transformers and its float engine."""

    def __init__(self, checkpoint, engine):
        self.theirs, self.path = checkpoint.model, engine
        self.theirs.generation_config.pad_token_id = PAD
        self.ours = QwenForCausalLM.from_pretrained(engine, engine_batch_size=4, engine_prefill_chunk_size=64)
        self.ours.generation_config.pad_token_id = PAD
        self.free = self.ours.num_free_blocks

    def both(self, ids, mask, **options):
        """What both generate, with equal random numbers; fresh objects where ``options`` has functions of none."""
        found = []
        for model in (self.ours, self.theirs):
            torch.manual_seed(7)
            made = {name: value() if name in FRESH else value for name, value in options.items()}
            found.append(model.generate(ids, attention_mask=mask, **{"max_new_tokens": 12} | made))
        return found


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint(request.param)
    return Pair(checkpoint, build_engine(checkpoint.path, quant="none"))


@pytest.fixture(scope="module")
def one(tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint("qwen3-tied")
    return Pair(checkpoint, build_engine(checkpoint.path, quant="none"))


@pytest.fixture(autouse=True)
def every_block_is_free(request):
    yield
    gc.collect()
    for name in {"pair", "one"} & set(request.fixturenames):
        fixture = request.getfixturevalue(name)
        assert fixture.ours.num_free_blocks == fixture.free


class Odd(LogitsProcessor):
    """Only odd tokens."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores


class Long(StoppingCriteria):
    """Ends a row at eight new tokens."""

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 15)


FRESH = ("logits_processor", "stopping_criteria")
TORCH, ENGINE = "transformers", "engine"
WAYS = {
    "greedy": (ENGINE, {}),
    "greedy, no loop of ours": (TORCH, {"no_repeat_ngram_size": 100}),
    "beams": (ENGINE, {"num_beams": 3}),
    "beams, no loop of ours": (TORCH, {"num_beams": 3, "no_repeat_ngram_size": 100}),
    "several beams": (TORCH, {"num_beams": 4, "num_return_sequences": 3, "no_repeat_ngram_size": 100}),
    "sampled": (TORCH, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}),
    "sampled beams": (TORCH, {"do_sample": True, "num_beams": 3}),
    "n-grams": (TORCH, {"no_repeat_ngram_size": 2}),
    "bad words": (TORCH, {"bad_words_ids": [[3], [17, 99]]}),
    "prefix function": (TORCH, {"prefix_allowed_tokens_fn": lambda row, ids: [3, 5, 8, 13, 21, int(ids[-1])]}),
    "processor": (TORCH, {"logits_processor": lambda: [Odd()]}),
    "criteria": (TORCH, {"stopping_criteria": lambda: [Long(), MaxLengthCriteria(14)]}),
    "without cache": (TORCH, {"use_cache": False}),
    "sampled without cache": (TORCH, {"use_cache": False, "do_sample": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_equals_transformers(pair, way):
    loop, options = WAYS[way]
    ours, theirs = pair.both(*padded(ROWS), **options)
    assert pair.ours.last_loop == loop
    assert torch.equal(ours, theirs)


def test_padding_on_the_right_is_for_our_loop(one):
    ids, mask = padded(ROWS, left=False)
    found, expected = one.ours.generate(ids, mask, max_new_tokens=4), one.ours.generate(*padded(ROWS), max_new_tokens=4)
    assert torch.equal(found[:, 7:], expected[:, 7:])
    with pytest.raises(ValueError, match="attention_mask ends with padding, expected padding on the left"):
        one.ours.generate(ids, mask, max_new_tokens=4, no_repeat_ngram_size=2)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
def test_drafts_from_the_prompt(one, options):
    ids = torch.tensor([[5, 17, 99, 3, 8, 5, 17, 99, 3, 8, 5, 17]])
    ours, theirs = one.both(ids, None, max_new_tokens=24, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(ours, theirs)


def test_an_assistant_of_transformers_and_one_that_is_an_engine(one, tiny_checkpoint, build_engine):
    ids = torch.tensor([ROWS[0]])
    expected = one.theirs.generate(ids, max_new_tokens=20, do_sample=False)
    other = QwenForCausalLM.from_pretrained(build_engine(tiny_checkpoint("qwen3-tied").path, quant="int8"))
    other.generation_config.pad_token_id = PAD
    for assistant in (one.theirs, other):
        assert torch.equal(one.ours.generate(ids, max_new_tokens=20, assistant_model=assistant), expected)
        assert one.ours.last_loop == TORCH


def test_scores_and_logits(pair):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ours, theirs = pair.both(*padded(ROWS), **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        for found, expected in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert float((found - expected).abs().max()) < 1e-4


def test_a_conversation_goes_on(one):
    ids, cache = torch.tensor([ROWS[0]]), one.ours.new_cache()
    first = one.ours.generate(ids, past_key_values=cache, max_new_tokens=6)
    longer = torch.cat([first, torch.tensor([[4, 44]])], 1)
    second = one.ours.generate(longer, past_key_values=cache, max_new_tokens=6)
    assert cache.get_seq_length() == longer.shape[1] + 5  # the last token was not read
    assert torch.equal(second, one.theirs.generate(longer, max_new_tokens=6, do_sample=False))


def test_logits_equal_with_padding_anywhere(pair):
    ids = torch.tensor([[5, 17, 99, 3, 8, 41], [1, 64, 2, 77, 3, 4]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 1, 0]])
    ours = pair.ours(ids, attention_mask=mask).logits
    for row in range(2):
        at = mask[row].bool()
        expected = pair.theirs(ids[row : row + 1, at]).logits[0].detach()
        assert float((ours[row, at] - expected).abs().max()) < 1e-4
        assert not ours[row, ~at].any()


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4]), torch.tensor([2])], ids=str)
def test_logits_of_some_columns(one, kept):
    ids, mask = padded(ROWS)
    whole = one.ours(ids, attention_mask=mask).logits
    at = slice(-kept, None) if isinstance(kept, int) else kept
    assert torch.equal(one.ours(ids, attention_mask=mask, logits_to_keep=kept).logits, whole[:, at])


def test_a_long_prompt_goes_in_chunks(one):
    rows = [[(7 * i + row) % 120 for i in range(length)] for row, length in enumerate((200, 33, 129))]
    ids, mask = padded(rows)
    ours = one.ours(ids, attention_mask=mask).logits
    for row, tokens in enumerate(rows):
        expected = one.theirs(torch.tensor([tokens])).logits[0]
        assert float((ours[row, -len(tokens) :] - expected).abs().max()) < 1e-4


def test_loss(pair):
    ids = torch.tensor(ROWS[:1])
    labels = ids.clone()
    labels[0, 2] = -100
    with torch.no_grad():
        ours, theirs = (model(ids, labels=labels).loss for model in (pair.ours, pair.theirs))
    assert abs(float(ours) - float(theirs)) < 1e-5


def test_results_come_as_tuples_too(one):
    logits, cache = one.ours(torch.tensor(ROWS[:1]), return_dict=False)
    assert logits.shape == (1, 7, 131)
    assert isinstance(cache, PagedCache)
    assert one.ours(torch.tensor(ROWS[:1]), use_cache=False).past_key_values is None


def test_a_streamer_gets_every_token(one):
    class Kept(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append(None)

    streamer = Kept()
    found = one.ours.generate(torch.tensor(ROWS[:1]), max_new_tokens=5, streamer=streamer)
    assert streamer.tokens == [*found[0].tolist(), None]


def test_threads_generate_at_the_same_time(one):
    found, expected = {}, {}
    for index, row in enumerate(ROWS * 2):
        expected[index] = one.theirs.generate(torch.tensor([row]), max_new_tokens=10, do_sample=False)

    def run(index, row):
        way = {"no_repeat_ngram_size": 100} if index % 3 else {}
        found[index] = one.ours.generate(torch.tensor([row]), max_new_tokens=10, **way)

    threads = [threading.Thread(target=run, args=(i, row)) for i, row in enumerate(ROWS * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(torch.equal(found[i], expected[i]) for i in expected)


def test_seeds_go_through_our_loop_and_arrays_come_back_as_arrays(one):
    ids, mask = padded(ROWS)
    tensors = one.ours.generate(ids, mask, max_new_tokens=6, do_sample=True, seed=3)
    assert one.ours.last_loop == ENGINE
    arrays = one.ours.generate(ids.numpy(), mask.numpy(), max_new_tokens=6, do_sample=True, seed=3)
    assert isinstance(arrays, np.ndarray)
    assert (arrays == tensors.numpy()).all()
    scored = one.ours.generate(ids.numpy(), mask.numpy(), max_new_tokens=6, no_repeat_ngram_size=2)
    assert isinstance(scored, np.ndarray)


def test_a_changed_generation_config_counts(one):
    ids, mask = padded(ROWS)
    for name, value, loop in (("num_beams", 3, ENGINE), ("no_repeat_ngram_size", 2, TORCH)):
        for model in (one.ours, one.theirs):
            setattr(model.generation_config, name, value)
        try:
            ours, theirs = one.both(ids, mask)
        finally:
            for model in (one.ours, one.theirs):
                setattr(model.generation_config, name, None)
        assert one.ours.last_loop == loop
        assert torch.equal(ours, theirs)


def test_rows_that_part_after_sharing_do_not_touch_each_other(one):
    cache = one.ours.new_cache()
    ids = torch.tensor(ROWS[:1])
    one.ours(ids, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    new = torch.tensor([[1], [2], [3]])
    ours = one.ours(new, past_key_values=cache).logits
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.crop(-1)
    again = one.ours(torch.tensor([[2], [1]]), past_key_values=cache).logits
    for row, token in enumerate((1, 2, 3)):
        expected = one.theirs(torch.tensor([[*ROWS[0], token]])).logits[0, -1]
        assert float((ours[row, 0] - expected).abs().max()) < 1e-4
    assert float((again[0] - ours[1]).abs().max()) < 1e-5
    assert float((again[1] - ours[0]).abs().max()) < 1e-5


def test_a_full_cache_is_one_error_and_loses_nothing(one):
    small = QwenForCausalLM.from_pretrained(
        one.path, engine_config=EngineConfig(max_seq_len=64, kvcache_num_blocks=2, batch_size=1)
    )
    kept = small.new_cache()
    small(torch.tensor([ROWS[0]]), past_key_values=kept)
    with pytest.raises(EngineError, match=r"the cache has 1 of 2 blocks free, expected 2 or more; feed fewer rows"):
        small(torch.tensor([ROWS[0], ROWS[0]]))
    after = small(torch.tensor([[3]]), past_key_values=kept).logits
    assert float((after[0, 0] - one.theirs(torch.tensor([[*ROWS[0], 3]])).logits[0, -1]).abs().max()) < 1e-4
    with pytest.raises(RequestError, match="row 0 has 72 tokens, expected 64 or fewer"):
        small(torch.ones(1, 64, dtype=torch.int64), past_key_values=kept)
    kept.reset()
    assert small.num_free_blocks == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 80)}, "inputs_embeds is given, engines look embeddings up"),
        ({"output_hidden_states": True}, "output_hidden_states is given, an engine returns logits alone"),
        ({"token_type_ids": torch.zeros(1, 2)}, "token_type_ids is given, an engine has no such input"),
        ({"input_ids": torch.tensor([[1, 131]])}, "input_ids holds 1 to 131, expected 0 to 130"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids is \(2,\), expected a tensor of integers \(rows, columns\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \(1, 3\), expected \(1, 2\)"),
        ({"position_ids": torch.tensor([[1, 2]])}, "position_ids do not count the tokens"),
        ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache, expected a PagedCache"),
    ],
)
def test_what_an_engine_does_not_compute_is_refused(one, arguments, message):
    with pytest.raises(ValueError, match=message):
        one.ours(**{"input_ids": torch.tensor([[1, 2]]), **arguments})


def test_positions_that_say_the_same_are_taken(one):
    ids, mask = padded(ROWS)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(
        one.ours(ids, attention_mask=mask, position_ids=positions).logits, one.ours(ids, attention_mask=mask).logits
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.to("cuda"),
        lambda model: model.cuda(),
        lambda model: model.half(),
        lambda model: model.to(dtype=torch.bfloat16),
        lambda model: model.train(),
        lambda model: model.resize_token_embeddings(140),
        lambda model: model.get_input_embeddings(),
    ],
)
def test_what_a_model_of_weights_could_do_is_refused(one, call):
    with pytest.raises(ValueError, match="an engine"):
        call(one.ours)


def test_it_has_what_a_model_has(one):
    assert one.ours.to("cpu") is one.ours.eval() is one.ours
    assert (one.ours.device, one.ours.dtype) == (torch.device("cpu"), torch.float32)
    matrices = sum(value.numel() for value in one.theirs.parameters() if value.dim() == 2)
    assert one.ours.num_parameters() == matrices
    assert one.ours.num_parameters(exclude_embeddings=True) == matrices - 131 * 80
    assert one.ours.num_parameters(only_trainable=True) == 0
    assert one.ours.config.hidden_size == one.theirs.config.hidden_size
    assert not one.ours.training


def test_keywords_of_from_pretrained(one, tmp_path):
    with pytest.warns(UserWarning, match="torch_dtype, device_map, trust_remote_code has no effect"):
        QwenForCausalLM.from_pretrained(one.path, torch_dtype="auto", device_map="cpu", trust_remote_code=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = QwenForCausalLM.from_pretrained(one.path, engine_max_seq_len=64, local_files_only=True)
    assert small.engine.manifest.limits.max_seq_len == 64
    with pytest.raises(TypeError, match="from_pretrained has no 'quantise', expected export, engine_config"):
        QwenForCausalLM.from_pretrained(one.path, quantise=True)
    with pytest.raises(ValueError, match="engine_config has 'batches', expected batch_size"):
        QwenForCausalLM.from_pretrained(one.path, engine_batches=2)
    with pytest.raises(ValueError, match="max_seq_len is in engine_config and given as engine_max_seq_len"):
        QwenForCausalLM.from_pretrained(one.path, engine_config={"max_seq_len": 64}, engine_max_seq_len=32)
    with pytest.raises(ValueError, match="device_map is 'cuda', expected 'cpu'"):
        QwenForCausalLM.from_pretrained(one.path, device_map="cuda")
    inside = one.path.parent
    assert QwenForCausalLM.from_pretrained(inside, subfolder=one.path.name).engine.directory == inside / one.path.name


def test_a_model_and_its_tokenizer_build_an_engine_for_pipelines(tmp_path, caplog):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core_tokenizer(), eos_token="<|im_end|>")
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY | {"vocab_size": 320, "model_type": "qwen2"}))
    model = QwenForCausalLM.from_model(theirs, {"quantization": "none"}, tokenizer)
    model.save_pretrained(tmp_path / "engine")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "engine")
    said = {}
    for name, one in (("ours", model), ("theirs", theirs)):
        caplog.clear()
        answer = pipeline("text-generation", model=one, tokenizer=loaded)
        said[name] = (answer("hello", max_new_tokens=4, do_sample=False), [record.message for record in caplog.records])
    assert said["ours"] == said["theirs"]
    streamer = TextIteratorStreamer(loaded, skip_prompt=True, timeout=120)
    ids = torch.tensor([loaded.encode("hello")])
    answer = model.generate(ids, max_new_tokens=4, streamer=streamer)
    assert "".join(streamer) == loaded.decode(answer[0, ids.shape[1] :])
    model.close()
