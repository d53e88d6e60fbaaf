"""An engine as a model of transformers: every way to generate equals transformers' model in float32."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

from cases.scripted import core_tokenizer
from cases.tiny import TINY
from cases.torch_pair import PAD, ROWS, padded
from qwen_engine.errors import EngineError, RequestError
from qwen_run import EngineConfig, QwenForCausalLM
from qwen_run.torch_model.paged_cache import PagedCache


def test_padding_on_the_right_is_for_our_loop(one):
    ids, mask = padded(ROWS, left=False)
    found, expected = one.ours.generate(ids, mask, max_new_tokens=4), one.ours.generate(*padded(ROWS), max_new_tokens=4)
    assert torch.equal(found[:, 7:], expected[:, 7:])
    with pytest.raises(ValueError, match="attention_mask ends with padding, expected padding on the left"):
        one.ours.generate(ids, mask, max_new_tokens=4, no_repeat_ngram_size=2)


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


def test_results_come_as_tuples_too(one):
    logits, cache = one.ours(torch.tensor(ROWS[:1]), return_dict=False)
    assert logits.shape == (1, 7, 131)
    assert isinstance(cache, PagedCache)
    assert one.ours(torch.tensor(ROWS[:1]), use_cache=False).past_key_values is None


def test_seeds_go_through_our_loop_and_arrays_come_back_as_arrays(one):
    ids, mask = padded(ROWS)
    tensors = one.ours.generate(ids, mask, max_new_tokens=6, do_sample=True, seed=3)
    assert one.ours.last_loop == "engine"
    arrays = one.ours.generate(ids.numpy(), mask.numpy(), max_new_tokens=6, do_sample=True, seed=3)
    assert isinstance(arrays, np.ndarray)
    assert (arrays == tensors.numpy()).all()
    scored = one.ours.generate(ids.numpy(), mask.numpy(), max_new_tokens=6, no_repeat_ngram_size=2)
    assert isinstance(scored, np.ndarray)


def test_an_end_that_was_taken_off_the_generation_config_is_none(one):
    (answer,) = one.ours.generate(torch.tensor(ROWS[:1]), max_new_tokens=8)[:, 7:].tolist()
    ended = QwenForCausalLM.from_pretrained(one.path)
    for eos, length in ((answer[0], 1), (None, 8)):
        ended.generation_config.eos_token_id = eos
        assert ended.generate(torch.tensor(ROWS[:1]), max_new_tokens=8, pad_token_id=PAD).shape == (1, 7 + length)


def test_a_changed_generation_config_counts(one):
    ids, mask = padded(ROWS)
    for name, value, loop in (("num_beams", 3, "engine"), ("no_repeat_ngram_size", 2, "transformers")):
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
        (
            {"inputs_embeds": torch.zeros(1, 2, 80), "input_ids": None},
            r"inputs_embeds is given, the engine was built without; .* build it with --inputs-embeds",
        ),
        ({"input_ids": None}, "input_ids and inputs_embeds are both given or both missing, expected one of them"),
        ({"output_hidden_states": True}, "output_hidden_states is given, an engine returns logits alone"),
        ({"token_type_ids": torch.zeros(1, 2)}, "token_type_ids is given, an engine has no such input"),
        ({"input_ids": torch.tensor([[1, 131]])}, "input_ids holds 1 to 131, expected 0 to 130"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids is \(2,\), expected a tensor of integers \(rows, columns\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \(1, 3\), expected \(1, 2\)"),
        ({"labels": torch.ones(1, 3)}, r"labels is \(1, 3\), expected \(1, 2\), a label for each column"),
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
        lambda model: model.requires_grad_(),
        lambda model: model.gradient_checkpointing_enable(),
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
    assert one.ours.config.max_position_embeddings == one.ours.engine.manifest.limits.max_seq_len
    assert one.ours.requires_grad_(False) is one.ours
    assert one.ours.name_or_path == str(one.path)
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


TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def loud(caplog):
    """What transformers logs, which it keeps from handlers that are not its own."""
    transformers.logging.enable_propagation()
    yield caplog
    transformers.logging.disable_propagation()


def test_a_model_and_its_tokenizer_build_an_engine_for_pipelines(tmp_path, loud):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core_tokenizer(), eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY | {"vocab_size": 320, "model_type": "qwen2"}))
    theirs.generation_config.pad_token_id = 0
    model = QwenForCausalLM.from_model(theirs, {"quantization": "none"}, tokenizer)
    model.save_pretrained(tmp_path / "engine")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "engine")
    chat = [{"role": "user", "content": "hello"}]
    said = {}
    for name, one in (("ours", model), ("theirs", theirs)):
        loud.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answer = pipeline("text-generation", model=one, tokenizer=loaded)
            said[name] = [answer(asked, max_new_tokens=4, do_sample=False) for asked in ("hello", chat, ["a", "b"])]
        assert name == "theirs" or [record.message for record in loud.records if record.levelname != "INFO"] == []
    assert said["ours"] == said["theirs"]
    assert said["ours"][1][0]["generated_text"][0] == chat[0]
    streamer = TextIteratorStreamer(loaded, skip_prompt=True, timeout=120)
    ids = torch.tensor([loaded.encode("hello")])
    answer = model.generate(ids, max_new_tokens=4, streamer=streamer)
    assert "".join(streamer) == loaded.decode(answer[0, ids.shape[1] :])
    model.close()
