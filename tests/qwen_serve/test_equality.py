"""Bit equality over HTTP: 64 mixed requests at once give what each gives alone, and what ``LLM`` gives."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from cases.scripted import write_text_files
from cases.serving import running
from cases.tiny import TINY
from qwen_run import LLM, SamplingParams

NUM_REQUESTS = 64
WORDS = ["cache", "block", "token", "Köln", "你好", "sum", " ", "\n", "the", "{", "}", "<think>"]
VOLATILE = ("id", "created", "timings", "usage")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory, build_engine):
    """A tiny Qwen3 with random weights, quantised, and the tokenizer and template of the scripted model."""
    import torch
    import transformers

    path = write_text_files(tmp_path_factory.mktemp("tiny") / "tiny", "qwen3", eos_token_id=[264, 262])
    generation_config = (path / "generation_config.json").read_text("utf-8")
    torch.manual_seed(3)
    sizes = TINY | {"model_type": "qwen3", "head_dim": 16, "vocab_size": 283}
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**sizes)).save_pretrained(path)
    (path / "generation_config.json").write_text(generation_config, "utf-8")
    return build_engine(path, quant="int8")


def requests():
    """Mixed requests: path and body."""
    rng = random.Random(7)
    for index in range(NUM_REQUESTS):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 30)))
        body = {"max_tokens": rng.randint(1, 60), "return_token_ids": True, "stream": bool(index % 2)}
        if index % 3:
            body |= {"temperature": rng.choice([0.5, 1.0, 2.0]), "seed": index, "top_p": rng.choice([1.0, 0.9])}
        if index % 5 == 0:
            body |= {"n": 2, "repetition_penalty": 1.2}
        if index % 7 == 0:
            body |= {"stop": ["a", "0"], "presence_penalty": 0.5}
        if index % 4 == 0:
            yield "/v1/completions", {**body, "prompt": text, "logprobs": 3}
        else:
            tools = {"tools": TOOLS} if index % 4 == 1 else {"thinking_token_budget": 5}
            chat = {"messages": [{"role": "user", "content": text}], "logprobs": True, "top_logprobs": 2}
            yield "/v1/chat/completions", {**body, **tools, **chat}


def answer(server, path, body):
    """What is the same however often it is asked: ids, texts and log probabilities of each choice."""
    if not body["stream"]:
        response = server.post(path, body)
        assert response.status_code == 200, response.text
        found = response.json()
        return json.dumps({name: value for name, value in found.items() if name not in VOLATILE})
    ids, texts, logprobs, reasons = {}, {}, {}, {}
    for chunk in server.stream(path, body):
        for choice in chunk["choices"]:
            index, delta = choice["index"], choice.get("delta", {})
            ids.setdefault(index, []).extend(choice.get("token_ids") or [])
            texts[index] = texts.get(index, "") + (choice.get("text") or delta.get("content") or "")
            if choice["logprobs"]:
                content = choice["logprobs"].get("content") or choice["logprobs"]["token_logprobs"]
                logprobs.setdefault(index, []).extend(content)
            reasons[index] = choice["finish_reason"] or reasons.get(index)
    return json.dumps([ids, texts, logprobs, reasons], sort_keys=True)


def test_answers_do_not_depend_on_each_other(engine):
    asked = list(requests())
    with running(engine, options={"max_batch_size": 16, "max_seq_len": 640, "threads": 2}) as server:
        alone = [answer(server, path, body) for path, body in asked]
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            together = list(pool.map(lambda each: answer(server, *each), asked))
        assert [index for index in range(NUM_REQUESTS) if alone[index] != together[index]] == []
        server.wait_until_idle()
    assert len(set(alone)) > NUM_REQUESTS // 2  # they are not all the same


def test_an_answer_is_that_of_llm(engine):
    body = {"messages": [{"role": "user", "content": "Same?"}], "max_tokens": 40, "temperature": 1.0, "seed": 5}
    with running(engine, options={"max_seq_len": 640}) as server:
        served = server.post("/v1/chat/completions", {**body, "return_token_ids": True}).json()
        defaults = server.serving.opened.default_params
    llm = LLM(engine, max_seq_len=640)
    params = SamplingParams(**{**vars(defaults), "max_tokens": 40, "temperature": 1.0, "seed": 5})
    (expected,) = llm.chat(body["messages"], params, use_tqdm=False)
    assert served["choices"][0]["token_ids"] == expected.outputs[0].token_ids
