"""What scripts written for vLLM ask of an LLM beside its answers: tokenizer, defaults, beams, metrics."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from cases.scripted import IM_END, scripted_model, write_text_files
from qwen_engine.errors import RequestError
from qwen_run import LLM, BeamSearchParams, SamplingParams
from qwen_run.runtime.engine import Engine
from qwen_run.sampling.logprobs import log_softmax

GREEDY = SamplingParams(temperature=0)
TURN = {"role": "user", "content": "hi"}


@pytest.fixture
def model(tmp_path):
    made, script = scripted_model(write_text_files(tmp_path, max_new_tokens=9), str.upper, max_seq_len=400)
    script.directory = tmp_path
    return made


@pytest.fixture(scope="module")
def engine(tiny_checkpoint, build_engine):
    return Engine.load(build_engine(tiny_checkpoint("qwen3-tied").path, quant="none"), threads=1)


def test_the_tokenizer_has_the_names_of_transformers(model):
    llm = LLM(model)
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode("ab the<|im_end|>")
    assert ids == llm.tokenizer.encode("ab the<|im_end|>")
    assert (tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)) == ("ab the<|im_end|>", "ab the")
    assert tokenizer.decode(np.array(ids)) == tokenizer.batch_decode([ids])[0] == "ab the<|im_end|>"
    assert tokenizer.decode(ids[0]) == "a"
    assert tokenizer("ab") == {"input_ids": ids[:2], "attention_mask": [1, 1]}
    assert tokenizer(["ab", "a"])["input_ids"] == [ids[:2], ids[:1]]
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", IM_END, None)
    assert IM_END in tokenizer.all_special_ids
    assert tokenizer.tokenize("a the") == ["a", "Ġthe"]
    assert tokenizer.convert_ids_to_tokens(IM_END) == "<|im_end|>"
    assert tokenizer.convert_ids_to_tokens([IM_END, 10**6]) == ["<|im_end|>", None]
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "nothing"]) == [IM_END, None]
    assert tokenizer.vocab_size == len(tokenizer) == llm.tokenizer.vocab_size


def test_its_chat_template_is_that_of_chat(model):
    llm = LLM(model)
    tokenizer = llm.get_tokenizer()
    text = tokenizer.apply_chat_template([TURN], tokenize=False, add_generation_prompt=True)
    assert text == llm.chat_prompt([TURN])
    assert tokenizer.apply_chat_template([TURN], add_generation_prompt=True) == llm.tokenizer.encode(text)
    assert (
        tokenizer.apply_chat_template([[TURN], [TURN]], tokenize=False)
        == [text.removesuffix("<|im_start|>assistant\n")] * 2
    )
    with pytest.raises(RequestError, match="no chat template"):
        LLM(replace(model, template=None)).get_tokenizer().apply_chat_template([TURN])


def test_default_params_are_a_copy(model):
    llm = LLM(model)
    params = llm.get_default_sampling_params()
    assert params == llm.default_params
    assert params is not llm.default_params
    assert params.max_tokens == 9


def test_prompts_are_objects_too(model):
    llm = LLM(model)
    ids = llm.tokenizer.encode("ab")
    for prompts in ({"prompt": "ab"}, [{"prompt_token_ids": ids}], [{"prompt": "ab", "prompt_token_ids": ids}]):
        (result,) = llm.generate(prompts, GREEDY)
        assert (result.outputs[0].text, result.prompt_token_ids) == ("AB", ids)
    for prompt in ({}, {"prompt": 3}, {"prompt": "a", "multi_modal_data": {}}, {"text": "a"}):
        with pytest.raises(RequestError, match="expected an object with prompt or prompt_token_ids"):
            llm.generate([prompt], GREEDY)


def test_metrics_and_cached_tokens(model):
    llm = LLM(model)
    before = time.time()
    shared = "x" * 100
    (first,) = llm.generate(shared + "a", GREEDY)
    second, third = llm.generate([shared + "b", "c"], replace(GREEDY, max_tokens=3))
    assert [result.num_cached_tokens for result in (first, second, third)] == [0, 96, 0]
    for result in (first, second, third):
        times = result.metrics
        order = [before, times.arrival_time, times.first_scheduled_time, times.first_token_time]
        order += [times.last_token_time, times.finished_time, time.time()]
        assert order == sorted(order)
        assert times.time_in_queue == times.first_scheduled_time - times.arrival_time
        assert times.first_token_latency == times.first_token_time - times.arrival_time
        assert result.outputs[0].finished()


def test_metrics_as_an_answer_grows(model):
    seen = list(LLM(model, max_drafts=0).stream("abc", GREEDY))
    assert [output.metrics.finished_time is None for output in seen] == [True] * 3 + [False]
    assert [output.outputs[0].finished() for output in seen] == [False] * 3 + [True]
    assert len({output.metrics.first_token_time for output in seen}) == 1
    assert len({output.metrics.last_token_time for output in seen}) == 4


def test_who_waits_for_a_place_has_not_begun(model):
    llm = LLM(model, max_batch_size=1)
    one, two = llm.prepare("abc", GREEDY), llm.prepare("d", GREEDY)
    llm.submit(one, two)
    llm.step()
    assert one.metrics.first_scheduled_time is not None
    assert (two.metrics.first_scheduled_time, two.output().num_cached_tokens) == (None, None)
    while llm.step():
        pass
    assert two.metrics.first_scheduled_time >= one.metrics.finished_time
    assert two.metrics.time_in_queue > 0


def log_probability(engine, prompt, answer):
    """Of ``answer`` after ``prompt``, fed token by token."""
    llm = LLM(engine, keep_logits=True, prefix_caching=False)
    total, tokens = 0.0, list(prompt)
    for token_id in answer:
        pending = llm.prepare(tokens, SamplingParams(temperature=0, max_tokens=1))
        list(llm.run([pending]))
        total += float(log_softmax(pending.logits[0])[token_id])
        tokens.append(token_id)
    return total


@pytest.mark.parametrize("penalty", [1.0, 0.5])
def test_beams_carry_their_log_probability(engine, penalty):
    params = BeamSearchParams(beam_width=3, max_tokens=4, length_penalty=penalty)
    found = LLM(engine).beam_search([{"prompt_token_ids": [3, 1, 4]}, [2, 7]], params)
    assert [len(output.sequences) for output in found] == [3, 3]
    for prompt, output in zip(([3, 1, 4], [2, 7]), found, strict=True):
        scores = []
        for beam in output.sequences:
            assert beam.tokens[: len(prompt)] == prompt
            answer = beam.tokens[len(prompt) :]
            assert beam.cum_logprob == pytest.approx(log_probability(engine, prompt, answer), abs=1e-4)
            scores.append(beam.cum_logprob / len(answer) ** penalty)
        assert scores == sorted(scores, reverse=True)
    (single,) = LLM(engine).beam_search([3, 1, 4], BeamSearchParams(beam_width=1, max_tokens=4))
    greedy = LLM(engine).generate([3, 1, 4], replace(GREEDY, max_tokens=4, logprobs=0))[0].outputs[0]
    assert single.sequences[0].tokens == [3, 1, 4, *greedy.token_ids]
    assert single.sequences[0].cum_logprob == pytest.approx(greedy.cumulative_logprob)


def test_the_text_of_a_beam_has_the_prompt(model):
    (output,) = LLM(model).beam_search(["ab"], BeamSearchParams(beam_width=2, max_tokens=6))
    assert output.sequences[0].text == "abAB<|im_end|>"
    assert output.sequences[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (GREEDY, "params is SamplingParam.*, expected BeamSearchParams"),
        (BeamSearchParams(0, 4), "beam_width is 0, expected a whole number from 1 to 128"),
        (BeamSearchParams(2, 4, temperature=0.5), "temperature is 0.5, expected 0"),
        (BeamSearchParams(2, 0), "max_tokens is 0, expected"),
        (BeamSearchParams(2, 4, length_penalty=9), "length_penalty is 9, expected"),
    ],
)
def test_mistakes_of_a_beam_search(model, params, says):
    with pytest.raises(RequestError, match=says):
        LLM(model).beam_search(["a"], params)


@pytest.mark.parametrize("seed", [5, 2**64 - 1])
def test_the_seed_of_an_llm_makes_a_run_repeatable(engine, seed):
    params = SamplingParams(max_tokens=8)
    prompts = [[3, 1, 4]] * 3
    first, second = (
        [result.outputs[0].token_ids for result in LLM(engine, seed=seed).generate(prompts, params)] for _ in range(2)
    )
    assert first == second
    assert len({tuple(answer) for answer in first}) == 3
    own = LLM(engine, seed=seed).generate(prompts, replace(params, seed=1))
    assert len({tuple(result.outputs[0].token_ids) for result in own}) == 1


def test_the_config_may_be_without_special_tokens(model, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert LLM(model).get_tokenizer().eos_token_id == IM_END
    (tmp_path / "tokenizer_config.json").unlink()
    assert LLM(model).get_tokenizer().eos_token_id is None
