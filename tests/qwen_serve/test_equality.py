"""Bit equality over HTTP: 64 mixed requests at once give what each gives alone, and what ``LLM`` gives."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

from cases.serving import running
from qwen_run import LLM, SamplingParams

NUM_REQUESTS = 64
WORDS = ["cache", "block", "token", "Köln", "你好", "sum", " ", "\n", "the", "{", "}", "<think>"]
VOLATILE = ("id", "created", "timings", "usage")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"type": "array", "items": {"enum": [1, 2, "x"]}}},
    "required": ["a", "b"],
}


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
            if index % 6 == 1:
                tools = {"tools": TOOLS, "tool_choice": "required"}
            elif index % 8 == 2:
                tools = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}
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


def test_answers_do_not_depend_on_each_other(chat_engine):
    asked = list(requests())
    with running(chat_engine, options={"max_batch_size": 16, "max_seq_len": 640, "threads": 2}) as server:
        alone = [answer(server, path, body) for path, body in asked]
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            together = list(pool.map(lambda each: answer(server, *each), asked))
        assert [index for index in range(NUM_REQUESTS) if alone[index] != together[index]] == []
        server.wait_until_idle()
    assert len(set(alone)) > NUM_REQUESTS // 2  # they are not all the same


def test_an_answer_is_that_of_llm(chat_engine):
    body = {"messages": [{"role": "user", "content": "Same?"}], "max_tokens": 40, "temperature": 1.0, "seed": 5}
    with running(chat_engine, options={"max_seq_len": 640}) as server:
        served = server.post("/v1/chat/completions", {**body, "return_token_ids": True}).json()
        defaults = server.serving.opened.default_params
    llm = LLM(chat_engine, max_seq_len=640)
    params = SamplingParams(**{**vars(defaults), "max_tokens": 40, "temperature": 1.0, "seed": 5})
    (expected,) = llm.chat(body["messages"], params, use_tqdm=False)
    assert served["choices"][0]["token_ids"] == expected.outputs[0].token_ids
