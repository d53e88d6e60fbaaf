"""LLM and AsyncLLM: what programs get, with a scripted engine for texts and tiny engines for numbers."""

from dataclasses import replace

import pytest

import qwen_run.text.stops
from cases.scripted import Script, poison, scripted_model, write_text_files
from qwen_engine.errors import EngineError, RequestError
from qwen_run import LLM, AsyncLLM, SamplingParams

GREEDY = SamplingParams(temperature=0)
LONG = "x" * 60


# -- LLM


def test_prompts_of_every_kind(model):
    llm = LLM(model)
    ids = llm.tokenizer.encode("ab")
    for prompts, texts in (
        ("ab", ["AB"]),
        (ids, ["AB"]),
        (["ab", "c"], ["AB", "C"]),
        ([ids, "c"], ["AB", "C"]),
        ([], []),
    ):
        results = llm.generate(prompts, GREEDY)
        assert [result.outputs[0].text for result in results] == texts
        assert all(result.finished and result.outputs[0].finish_reason == "stop" for result in results)
    text, numbers = llm.generate(["ab", ids], GREEDY)
    assert (text.prompt, numbers.prompt) == ("ab", None)
    assert text.prompt_token_ids == numbers.prompt_token_ids == ids
    assert int(numbers.request_id) == int(text.request_id) + 1
    assert model.engine.is_idle


def test_params_for_each_prompt_and_defaults(model):
    llm = LLM(model)
    first, second = llm.generate(["abc", "abc"], [GREEDY, replace(GREEDY, max_tokens=2)])
    assert (first.outputs[0].text, second.outputs[0].text) == ("ABC", "AB")
    assert second.outputs[0].finish_reason == "length"
    llm.generate("a")
    assert model.engine.seen[-1].params == llm.default_params == model.defaults
    with pytest.raises(RequestError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])


def test_mistakes_are_told_before_anything_runs(model):
    llm = LLM(model)
    with pytest.raises(RequestError, match="prompt 2 has 500 tokens, the engine takes 399"):
        llm.generate(["a", [1] * 500], GREEDY)
    with pytest.raises(RequestError, match="num_beams is 20, expected at most"):
        llm.generate(["a", "b"], replace(GREEDY, num_beams=20))
    assert (model.engine.num_runs, model.engine.is_idle, llm.core.is_done) == (0, True, True)


def test_one_poisonous_prompt_ends_with_its_error_and_all_others_answer(model):
    poison(model.engine, "Paris")
    llm = LLM(model)
    one, bad, two = llm.generate(["abc", "I love Paris", "x"], GREEDY)
    assert [output.outputs[0].text for output in (one, two)] == ["ABC", "X"]
    assert (one.outputs[0].error, bad.finished, bad.outputs[0].finish_reason) == (None, True, "error")
    assert "hold nan, expected numbers" in bad.outputs[0].error
    assert llm.generate("abc", GREEDY)[0].outputs[0].text == "ABC"
    assert model.engine.is_idle


def test_a_drawn_seed_is_told_and_repeats_the_answer(engine):
    llm, params = LLM(engine), SamplingParams(temperature=1.5, max_tokens=8)
    drawn = llm.generate([[1, 2, 3]] * 3, params)
    assert len({tuple(output.outputs[0].token_ids) for output in drawn}) > 1
    for output in drawn:
        (again,) = llm.generate([[1, 2, 3]], replace(params, seed=output.seed))
        assert (again.seed, again.outputs) == (output.seed, output.outputs)
    assert llm.generate([[1, 2, 3]], GREEDY)[0].seed is None


def test_a_text_that_is_far_too_long_is_refused_by_its_beginning(model, monkeypatch):
    llm, tokenized = LLM(model), []
    encode = model.tokenizer._core.encode

    class Spy:
        def encode(self, text, **options):
            tokenized.append(len(text))
            return encode(text, **options)

    monkeypatch.setattr(model.tokenizer, "_core", Spy())
    for text in ("word " * 200_000, "a" * 1_000_000, "\n\n" * 500_000):
        with pytest.raises(RequestError, match=rf"^the prompt of {len(text)} characters has more than 400 tokens"):
            llm.prepare(text, GREEDY)
    assert sum(tokenized) < 3 * 7000
    with pytest.raises(RequestError, match="the prompt has 6000 tokens, the engine takes 399"):
        llm.prepare("a" * 6000, GREEDY)


def test_stop_texts_are_prepared_once_for_all_answers_of_a_request(model, monkeypatch):
    prepared = []
    borders = qwen_run.text.stops._borders
    monkeypatch.setattr(qwen_run.text.stops, "_borders", lambda text: prepared.append(text) or borders(text))
    params = SamplingParams(n=5, max_tokens=6, stop=["CD", "zz"])
    (output,) = LLM(model).generate("abcdef", params)
    assert [(answer.text, answer.stop_reason) for answer in output.outputs] == [("AB", "CD")] * 5
    assert prepared == ["CD", "zz"]


def test_chat(model):
    llm = LLM(model)
    turn = {"role": "user", "content": "hi"}
    (result,) = llm.chat([turn], replace(GREEDY, max_tokens=12))
    assert result.prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert len(llm.chat([[turn], [turn]], GREEDY)) == 2
    with pytest.raises(RequestError, match="the conversation is empty"):
        llm.chat([], GREEDY)
    with pytest.raises(RequestError, match="no chat template"):
        LLM(replace(model, template=None)).chat([turn])


def test_a_stream_grows_to_what_generate_returns(model):
    llm = LLM(model)
    params = replace(GREEDY, stop="E")
    seen = {}
    for output in llm.stream(["abcdef", "xy"], params):
        earlier = seen.get(output.request_id)
        text = output.outputs[0].text
        assert earlier is None or (not earlier.finished and text.startswith(earlier.outputs[0].text))
        seen[output.request_id] = output
    answers = [output.outputs[0] for output in seen.values()]
    assert [(answer.text, answer.stop_reason) for answer in answers] == [("ABCD", "E"), ("XY", None)]
    expected = llm.generate(["abcdef", "xy"], params)
    assert [replace(output, request_id="") for output in seen.values()] == [replace(o, request_id="") for o in expected]


@pytest.mark.parametrize(("reply", "length", "text"), [("ab", 9, "ab"), ("aé", 2, "a\ufffd"), ("a<|im_end|>b", 9, "a")])
def test_the_text_of_an_answer(tmp_path, reply, length, text):
    """The token that stops it is no part of it, half a character that ends it is not lost."""
    model, _ = scripted_model(write_text_files(tmp_path), lambda prompt: reply)
    *_, last_output = LLM(model).stream([1, 2], SamplingParams(max_tokens=length))
    assert last_output.outputs[0].text == text


def test_a_stop_string_ends_an_answer(tmp_path):
    model, script = scripted_model(write_text_files(tmp_path), lambda prompt: "one two three")
    texts = [output.outputs[0].text for output in LLM(model).stream([1, 2], SamplingParams(stop="o t"))]
    assert (texts[-1], texts[:3]) == ("one tw", ["", "on", "one"])
    assert script.is_idle


def test_a_closed_stream_frees_the_cache(model):
    stream = LLM(model).stream([1, 2], SamplingParams())
    next(stream)
    assert not model.engine.is_idle
    stream.close()
    assert model.engine.is_idle


def test_streams_read_in_turn_and_closed_early(model):
    llm = LLM(model)
    one, two = llm.stream(LONG, GREEDY), llm.stream("abc", GREEDY)
    next(one)
    assert [output.outputs[0].text for output in two][-1] == "ABC"
    assert next(one).outputs[0].text.startswith("XXX")  # it went on in the meantime
    one.close()
    assert (model.engine.is_idle, llm.core.is_done) == (True, True)


def test_a_stream_whose_request_is_given_up_ends(model):
    llm = LLM(model)
    stream = llm.stream(LONG, GREEDY)
    next(stream)
    llm.close()
    assert [output.outputs[0].finish_reason for output in stream] == ["abort"]
    assert model.engine.is_idle


def test_an_open_engine_takes_no_options_of_a_build(model):
    with pytest.raises(EngineError, match="quant, max_seq_len cannot change it; expected max_batch_size"):
        LLM(model, quant="int8", max_model_len=300)


def test_the_longest_sequence_is_chosen_where_an_engine_is_opened(engine):
    for options in ({"max_seq_len": 40}, {"max_model_len": 40}):
        llm = LLM(engine.directory, num_blocks=2, threads=1, **options)
        assert (llm.max_seq_len, llm.core.engine.cache.num_blocks) == (40, 2)
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 37


def test_an_open_engine_takes_no_options_of_a_load(model, engine):
    for name, value in (("threads", 2), ("num_blocks", 20), ("cache_bytes", 10**6)):
        for opened in (model, engine):
            with pytest.raises(EngineError, match=f"the engine is open, {name} cannot change it"):
                LLM(opened, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((3,), "prompts is 3, expected a text, token ids, or a list of them"),
        ((None,), "prompts is None, expected"),
        ((b"abc",), "prompts is b'abc', expected"),
        (([None],), r"the prompt is \[None\], expected a text or token ids"),
        ((["a", ["b"]],), r"prompt 2 is \['b'\], expected a text or token ids"),
        (([1.5, 2],), r"the prompt is \[1.5, 2\], expected a text or token ids"),
        (("a", {"temperature": 0}), r"sampling_params is \{'temperature': 0\}, expected SamplingParams"),
        ((["a", "b"], [GREEDY, 3]), "sampling_params is 3, expected SamplingParams"),
        (("a", 0), "sampling_params is 0, expected SamplingParams"),
    ],
)
def test_arguments_of_another_type(model, arguments, says):
    llm = LLM(model)
    for method in (llm.generate, llm.stream):
        with pytest.raises(RequestError, match=f"^{says}"):
            method(*arguments)
    assert (model.engine.num_runs, llm.core.is_done) == (0, True)


def test_messages_and_models_of_another_type(model):
    for messages in (3, "hi", None):
        with pytest.raises(RequestError, match=f"messages is {messages!r}, expected a list of messages"):
            LLM(model).chat(messages)
    with pytest.raises(RequestError, match="message 0 is 'hi', expected an object"):
        LLM(model).chat([["hi"]])
    with pytest.raises(EngineError, match="model is 3, expected an engine or a checkpoint"):
        LLM(3)
    with pytest.raises(EngineError, match="prefix_caching is 'no', expected True or False"):
        LLM(model, prefix_caching="no")
    with pytest.raises(EngineError, match="max_requests is '9', expected a whole number"):
        AsyncLLM(model, max_requests="9")
    with pytest.raises(RequestError, match="request_id is 7, expected str"):
        LLM(model).prepare("a", GREEDY, 7)


def test_earlier_outputs_of_a_stream_keep_what_they_had(engine):
    seen = list(
        LLM(engine, max_batch_size=1, max_batch_tokens=2).stream(
            [[3, 1, 4]], replace(GREEDY, max_tokens=4, logprobs=0, prompt_logprobs=0)
        )
    )
    assert [len(output.outputs[0].token_ids) for output in seen] == [1, 2, 3, 4]
    assert [len(output.outputs[0].logprobs) for output in seen] == [1, 2, 3, 4]
    assert len({id(output.prompt_logprobs) for output in seen}) == 4


def test_a_stop_token_is_the_reason(model):
    llm = LLM(model)
    (token_id,) = llm.tokenizer.encode("B")
    answer = llm.generate("abc", replace(GREEDY, stop_token_ids=[token_id]))[0].outputs[0]
    assert (answer.text, answer.token_ids[-1], answer.stop_reason) == ("A", token_id, token_id)


def test_an_engine_that_fails_gives_everything_up(model, monkeypatch):
    llm = LLM(model)
    monkeypatch.setattr(Script, "run", lambda self, batch: (_ for _ in ()).throw(EngineError("broken")))
    with pytest.raises(EngineError, match="broken"):
        llm.generate(["a", "b"], GREEDY)
    assert (model.engine.is_idle, llm.core.is_done) == (True, True)


def test_samples_and_logprobs(engine):
    llm = LLM(engine)
    params = SamplingParams(n=3, max_tokens=6, logprobs=2, prompt_logprobs=1, seed=5)
    (result,) = llm.generate([[3, 1, 4, 1, 5]], params)
    assert [answer.index for answer in result.outputs] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in result.outputs}) == 3
    for answer in result.outputs:
        assert answer.text == ""
        for token_id, likely in zip(answer.token_ids, answer.logprobs, strict=True):
            assert len(likely) == 2 + (likely[token_id].rank > 2)
            assert sorted(found.rank for found in likely.values())[:2] == [1, 2]
        own = [likely[token_id].logprob for token_id, likely in zip(answer.token_ids, answer.logprobs, strict=True)]
        assert answer.cumulative_logprob == pytest.approx(sum(own))
    assert result.prompt_logprobs[0] is None
    assert all(token_id in likely for token_id, likely in zip([1, 4, 1, 5], result.prompt_logprobs[1:], strict=True))
    alone = [llm.generate([[3, 1, 4, 1, 5]], replace(params, prompt_logprobs=None))[0].outputs for _ in range(2)]
    assert alone[0] == alone[1] == result.outputs


def test_beams_come_once_best_first(engine):
    llm = LLM(engine)
    outputs = list(llm.stream([3, 1, 4], SamplingParams(temperature=0, num_beams=4, n=2, max_tokens=5)))
    assert [len(output.outputs) for output in outputs] == [2]
    assert outputs[0].outputs[0].token_ids != outputs[0].outputs[1].token_ids


def test_an_engine_without_a_tokenizer_takes_ids_only(engine):
    llm = LLM(engine)
    for call in (
        lambda: llm.generate("a"),
        lambda: llm.chat([{"role": "user", "content": "a"}]),
        lambda: llm.tokenizer,
    ):
        with pytest.raises(RequestError, match="has no tokenizer, expected token ids"):
            call()
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.generate([1, 2], SamplingParams(stop="x"))
    assert llm.generate([1, 2], SamplingParams(max_tokens=1))[0].outputs[0].text == ""


def test_an_engine_opened_without_its_tokenizer_takes_ids_only(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "directory", write_text_files(tmp_path))
    assert LLM(engine).tokenizer.encode("a")
    llm = LLM(engine, skip_tokenizer_init=True)
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.generate("a")
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    assert len(llm.generate([1, 2], params)[0].outputs[0].token_ids) == 2


def test_options_of_the_engine(model):
    assert LLM(model, max_batch_size=3, max_batch_tokens=40).core.options.max_batch_size == 3
