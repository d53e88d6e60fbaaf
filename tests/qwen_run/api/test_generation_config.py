"""What generation_config.json asks for: equal to transformers' generate, and what a request says goes before it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from cases.scripted import core_tokenizer
from cases.tiny import FAMILIES, TINY
from qwen_engine.errors import RequestError
from qwen_run import LLM, QwenForCausalLM

PROMPT = [5, 17, 99, 3, 8, 41, 7]
LENGTH = len(PROMPT)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(directory, model) of a random model whose tokenizer has text for every token."""
    transformers.utils.logging.disable_progress_bar()
    directory = tmp_path_factory.mktemp("checkpoint")
    tokenizer = core_tokenizer()
    torch.manual_seed(0)
    config = TINY | FAMILIES["qwen3-tied"] | {"vocab_size": tokenizer.get_vocab_size()}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).float().eval()
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (directory / "generation_config.json").unlink(missing_ok=True)
    return directory, transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture
def asking(checkpoint, build_engine, tmp_path_factory):
    """Makes ``asking(**generation config)``: the engine of a checkpoint that asks for it, and transformers' answer."""

    def make(**config):
        directory = tmp_path_factory.mktemp("asking") / "checkpoint"
        shutil.copytree(checkpoint[0], directory)
        (directory / "generation_config.json").write_text(json.dumps(config))
        model = checkpoint[1]
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core_tokenizer())
        options = {"tokenizer": tokenizer} if "stop_strings" in config else {}

        def expected(**given):
            asked = transformers.GenerationConfig(pad_token_id=0, **config)
            ids = torch.tensor([PROMPT])
            rows = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=asked, **options, **given)
            return rows[:, LENGTH:].tolist()

        return build_engine(directory, quant="none"), expected

    return make


@pytest.fixture(scope="module")
def answer(checkpoint):
    """The 16 tokens with which transformers goes on."""
    ids = torch.tensor([PROMPT])
    rows = checkpoint[1].generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, pad_token_id=0
    )
    return rows[0, LENGTH:].tolist()


def asked_of(name, answer):
    """A configuration that changes ``answer``, the likeliest one."""
    decode = core_tokenizer().decode
    texts = [decode([token_id], skip_special_tokens=False) for token_id in answer[:11]]
    text = next(t for i, t in enumerate(texts) if i and t.isascii() and not any(t in before for before in texts[:i]))
    return {
        "suppress_tokens": {"suppress_tokens": [answer[0], answer[3]]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [answer[0]]},
        "bad_words_ids": {"bad_words_ids": [answer[2:4], [PROMPT[-1], answer[0]]]},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "forced_eos_token_id": {"forced_eos_token_id": 40},
        "min_length": {"min_length": LENGTH + 6, "eos_token_id": answer[2]},
        "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": answer[2]},
        "max_length": {"max_length": LENGTH + 3, "max_new_tokens": None},
        "stop_strings": {"stop_strings": [text]},
    }[name]


NAMES = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "no_repeat_ngram_size", "forced_eos_token_id",
         "min_length", "min_new_tokens", "max_length", "stop_strings")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_it_asks_for_is_what_transformers_answers(asking, answer, name):
    config = {"do_sample": False, "max_new_tokens": 12} | asked_of(name, answer)
    engine, expected = asking(**{name: value for name, value in config.items() if value is not None})
    (tokens,) = expected()
    assert tokens != answer[:12]
    model = QwenForCausalLM.from_pretrained(engine)
    assert model.generate(np.array([PROMPT]))[0, LENGTH:].tolist() == tokens
    (output,) = LLM(engine).generate({"prompt_token_ids": PROMPT}, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == tokens


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("suppress_tokens", {"suppress_tokens": []}),
        ("begin_suppress_tokens", {"begin_suppress_tokens": []}),
        ("bad_words_ids", {"bad_words_ids": []}),
        ("no_repeat_ngram_size", {"no_repeat_ngram_size": 0}),
        ("forced_eos_token_id", {"forced_eos_token_id": []}),
        ("max_length", {"max_tokens": 12}),
        ("stop_strings", {"stop": []}),
    ],
)
def test_what_a_request_says_goes_before_it(asking, answer, name, given):
    config = {"max_new_tokens": 12} | asked_of(name, answer)
    engine, _ = asking(**{name: value for name, value in config.items() if value is not None})
    llm = LLM(engine)
    params = llm.default_params.with_options(**given)
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == answer[:12]


def test_beams_are_those_of_transformers_and_a_default_of_generate_alone(asking):
    config = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True}
    engine, expected = asking(max_new_tokens=6, suppress_tokens=[7], forced_eos_token_id=40, **config)
    model = QwenForCausalLM.from_pretrained(engine)
    assert model.generate(np.array([PROMPT]))[:, LENGTH:].tolist() == expected()
    given = {"num_beams": 1, "num_return_sequences": 1}
    assert model.generate(np.array([PROMPT]), **given)[:, LENGTH:].tolist() == expected(**given)
    assert dataclasses.replace(LLM(engine).default_params).num_beams == 1


def test_a_prompt_that_fills_the_length_says_what_to_set(asking):
    engine, _ = asking(max_length=LENGTH)
    llm = LLM(engine)
    with pytest.raises(
        RequestError, match=f"the prompt has {LENGTH} tokens, and max_length is {LENGTH} .* ask for a number of new tok"
    ):
        llm.generate({"prompt_token_ids": PROMPT}, use_tqdm=False)
    params = llm.default_params.with_options(max_tokens=3)
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3
