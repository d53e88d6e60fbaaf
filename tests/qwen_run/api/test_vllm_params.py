"""Fields of SamplingParams that scripts written for vLLM set: each has the meaning it has there."""

import asyncio
import threading
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from cases.processes import run_async
from cases.scripted import Script, scripted_model, write_text_files
from qwen_engine.errors import EngineError, RequestError
from qwen_run import LLM, AsyncLLM, RequestOutputKind, SamplingParams
from qwen_run.runtime.engine import Engine

GREEDY = SamplingParams(temperature=0)
DELTA = SamplingParams(temperature=0, output_kind=RequestOutputKind.DELTA)
FINAL = SamplingParams(temperature=0, output_kind=RequestOutputKind.FINAL_ONLY)
PROMPT = [3, 1, 4]


@pytest.fixture
def model(tmp_path):
    return scripted_model(write_text_files(tmp_path), str.upper, max_seq_len=400)[0]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint, build_engine):
    return Engine.load(build_engine(tiny_checkpoint("qwen3-tied").path, quant="none"), threads=1)


def answer(engine, **params):
    (result,) = LLM(engine).generate(PROMPT, SamplingParams(**{"temperature": 0, "max_tokens": 6} | params))
    if result.error:
        raise EngineError(result.error)
    return result.outputs[0].token_ids


# -- which tokens may come


def test_only_allowed_tokens_come(engine):
    allowed = [7, 11, 100]
    assert set(answer(engine, allowed_token_ids=allowed)) <= set(allowed)
    assert set(answer(engine, allowed_token_ids=allowed, temperature=1, seed=1, max_tokens=20)) <= set(allowed)
    assert answer(engine, allowed_token_ids=range(engine.manifest.model.vocab_size)) == answer(engine)
    with pytest.raises(RequestError, match="allowed_token_ids holds token 1000000, expected 0 to"):
        answer(engine, allowed_token_ids=[3, 10**6])


def test_a_bad_word_does_not_come(model):
    """The scripted model has one choice; where it is taken away, the first of the others comes."""
    llm = LLM(model)

    def tokens(prompt, *words):
        return llm.generate(prompt, replace(GREEDY, bad_words=words, max_tokens=len(prompt)))[0].outputs[0].token_ids

    a, b, c = llm.tokenizer.encode("ABC")
    assert tokens("abc") == [a, b, c]
    assert tokens("abc", "B")[0] == a
    assert tokens("abc", "B")[1] != b
    assert tokens("abc", "AB")[:2] != [a, b]
    assert tokens("abc", "AC", "BA") == [a, b, c]  # no token is forbidden but after those before it
    assert tokens("a bc", "b", "BC")[-1] != c
    spaced = llm.tokenizer.encode(" THE")
    assert tokens("x the", "THE")[-len(spaced) :] != spaced


def test_a_bad_word_is_found_inside_a_sentence(tmp_path):
    """``he`` begins a text as one token and follows a space as two: both spellings are of the same text."""
    llm = LLM(scripted_model(write_text_files(tmp_path), lambda prompt: "a t")[0])
    found = llm.generate("x", replace(GREEDY, bad_words="t"))[0].outputs[0].text
    assert not found.startswith("a t")


def test_samples_and_drafts_keep_to_the_rules(engine):
    params = SamplingParams(n=4, seed=3, max_tokens=12, temperature=1.5, allowed_token_ids=[5, 6])
    (result,) = LLM(engine).generate(PROMPT, params)
    assert {token_id for each in result.outputs for token_id in each.token_ids} <= {5, 6}
    without = LLM(engine, max_drafts=0).generate(PROMPT, params)[0]
    assert [each.token_ids for each in result.outputs] == [each.token_ids for each in without.outputs]


# -- functions of the caller's


def test_a_processor_sees_the_answer_so_far(engine):
    seen = []

    def only_seven(output, logits):
        seen.append(list(output))
        logits[:] = -np.inf
        logits[7] = 0
        return logits

    assert answer(engine, logits_processors=[only_seven], max_tokens=3) == [7, 7, 7]
    assert seen == [[], [7], [7, 7]]


def test_a_processor_of_three_arguments_sees_the_prompt_too(engine):
    def first_of_the_prompt(prompt, output, logits):
        return np.where(np.arange(len(logits)) == prompt[len(output)], 1.0, 0.0)

    assert answer(engine, logits_processors=[first_of_the_prompt], max_tokens=3) == PROMPT


def test_processors_of_transformers(engine):
    torch = pytest.importorskip("torch")
    from transformers import LogitsProcessor, LogitsProcessorList, SuppressTokensLogitsProcessor

    plain = answer(engine)
    suppressed = answer(engine, logits_processors=LogitsProcessorList([SuppressTokensLogitsProcessor(plain[:1])]))
    assert suppressed[0] != plain[0]
    assert answer(engine, logit_bias={plain[0]: -100}) == suppressed

    class Repeat(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert isinstance(scores, torch.Tensor)
            return torch.nn.functional.one_hot(input_ids[:, -1], scores.shape[1]).float()

    assert answer(engine, logits_processors=[LogitsProcessorList([Repeat()])], max_tokens=2) == [PROMPT[-1]] * 2


def test_processors_go_their_own_way_for_each_sample(engine):
    lengths = []

    def note(output, logits):
        lengths.append(len(output))
        return logits

    params = SamplingParams(n=3, seed=3, max_tokens=3, logits_processors=[note])
    (with_note,) = LLM(engine).generate(PROMPT, params)
    assert sorted(lengths) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    (without,) = LLM(engine).generate(PROMPT, replace(params, logits_processors=None))
    assert [each.token_ids for each in with_note.outputs] == [each.token_ids for each in without.outputs]


@pytest.mark.parametrize(
    ("processor", "says"),
    [
        (lambda ids, logits: None, "has returned None, expected 256 logits"),
        (lambda ids, logits: logits[:3], "expected 256 logits"),
        (lambda ids, logits: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_processor_that_fails_ends_its_answer_alone(engine, processor, says):
    params = SamplingParams(temperature=0, max_tokens=4)
    bad, good = LLM(engine).generate([PROMPT, PROMPT], [replace(params, logits_processors=[processor]), params])
    assert bad.outputs[0].finish_reason == "error"
    assert says.replace("256", str(engine.manifest.model.vocab_size)) in bad.error
    assert good.outputs[0].token_ids == answer(engine, max_tokens=4)


# -- what text is made


def test_special_tokens_have_text_if_asked_for(tmp_path):
    llm = LLM(scripted_model(write_text_files(tmp_path), lambda prompt: "a<|im_start|>b")[0])
    (plain,) = llm.generate("x", GREEDY)
    (special,) = llm.generate("x", replace(GREEDY, skip_special_tokens=False, spaces_between_special_tokens=False))
    assert (plain.outputs[0].text, special.outputs[0].text) == ("ab", "a<|im_start|>b")
    assert plain.outputs[0].token_ids == special.outputs[0].token_ids


def test_no_text_is_made_if_none_is_asked_for(model):
    (result,) = LLM(model).generate("ab", replace(GREEDY, detokenize=False))
    assert (result.outputs[0].text, len(result.outputs[0].token_ids)) == ("", 3)
    with pytest.raises(RequestError, match=r"stop is .* with detokenize False: .*; leave one out"):
        replace(GREEDY, detokenize=False, stop="x")


@pytest.mark.parametrize(("kept", "text"), [(None, "abcdef"), (2, "ef"), (99, "abcdef"), (-1, "abcdef")])
def test_a_prompt_keeps_its_last_tokens(model, kept, text):
    llm = LLM(model)
    params = replace(GREEDY, truncate_prompt_tokens=kept)
    for prompt in ("abcdef", llm.tokenizer.encode("abcdef")):
        (result,) = llm.generate(prompt, params)
        assert (result.outputs[0].text, result.prompt_token_ids) == (text.upper(), llm.tokenizer.encode(text))


def test_a_prompt_that_is_too_long_is_cut_to_what_the_engine_takes(model):
    (result,) = LLM(model).generate("ab" * 3000, replace(GREEDY, truncate_prompt_tokens=-1))
    assert (len(result.prompt_token_ids), result.outputs[0].finish_reason) == (399, "length")


# -- what a stream tells


def test_parts_join_to_the_whole(model):
    llm = LLM(model, max_drafts=0)
    parts = [output.outputs[0] for output in llm.stream("aéb", replace(DELTA, logprobs=1))]
    (whole,) = llm.generate("aéb", replace(DELTA, logprobs=1))
    assert "".join(part.text for part in parts) == whole.outputs[0].text == "AÉB"
    assert [token_id for part in parts for token_id in part.token_ids] == whole.outputs[0].token_ids
    assert [likely for part in parts for likely in part.logprobs] == whole.outputs[0].logprobs
    assert {len(part.token_ids) for part in parts} == {1}


def test_only_the_end_is_told_if_that_is_asked_for(model):
    (only,) = LLM(model).stream(["abc"], FINAL)
    assert (only.finished, only.outputs[0].text) == (True, "ABC")


def test_kinds_of_outputs_in_asyncio(model, monkeypatch):
    original = Script.run

    def run(self, batch):
        time.sleep(0.002)
        return original(self, batch)

    monkeypatch.setattr(Script, "run", run)

    async def main():
        async with AsyncLLM(model, max_drafts=0) as llm:
            parts = [output.outputs[0] async for output in llm.generate("abcdef", DELTA)]
            late = await llm.add_request("abcdef", DELTA)
            while not late.pending.is_told:
                await asyncio.sleep(0.002)
            rest = [output async for output in late]
            final = [output async for output in llm.generate("abc", FINAL)]
            return parts, rest, final

    parts, rest, final = run_async(main())
    assert len(parts) > 1
    assert "".join(part.text for part in parts) == "ABCDEF"
    assert [output.outputs[0].text for output in rest] == ["ABCDEF"]
    assert rest[0].outputs[0].token_ids == [token_id for part in parts for token_id in part.token_ids]
    assert [output.outputs[0].text for output in final] == ["ABC"]


# -- parameters as an object


def test_params_are_changed_field_by_field(model):
    llm = LLM(model)
    params = llm.get_default_sampling_params()
    params.max_tokens = 2
    params.temperature = 0
    assert llm.generate("abc", params)[0].outputs[0].text == "AB"
    assert llm.default_params.max_tokens == 512
    with pytest.raises(RequestError, match=r"^max_tokens is 0, expected"):
        params.max_tokens = 0
    assert params.max_tokens == 2
    with pytest.raises(AttributeError, match="SamplingParams has no 'max_new_tokens', it has temperature"):
        params.max_new_tokens = 3
    params.min_tokens = 5
    with pytest.raises(RequestError, match="min_tokens is 5, expected at most max_tokens, which is 2"):
        llm.generate("abc", params)


def test_a_request_keeps_the_params_it_was_made_with(model):
    llm, params = LLM(model, max_drafts=0), SamplingParams(temperature=0)
    with closing(llm.stream("abcdef", params)) as outputs:
        next(outputs)
        params.max_tokens = 1
        *_, end = outputs
    assert end.outputs[0].text == "ABCDEF"


def test_extra_args_are_kept(model):
    (result,) = LLM(model).generate("a", replace(GREEDY, extra_args={"mine": [1]}))
    assert result.outputs[0].text == "A"
    assert model.engine.seen[-1].params.extra_args == {"mine": [1]}
    hash(model.engine.seen[-1].params)


def test_everything_at_once_from_many_threads(model):
    llm, found = LLM(model), []

    def ask(number):
        params = replace(GREEDY, bad_words=["zz"], output_kind=RequestOutputKind(number % 3), extra_args={"n": number})
        found.append(llm.generate("abc", params, use_tqdm=False)[0].outputs[0].text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == ["ABC"] * 9


def test_beams_take_no_rules_that_leave_too_few_tokens():
    for given in ({"allowed_token_ids": [1]}, {"logits_processors": [lambda ids, logits: logits]}):
        with pytest.raises(RequestError, match="are given with num_beams 3; leave one out"):
            SamplingParams(temperature=0, num_beams=3, **given)
