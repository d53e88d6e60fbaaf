"""Many mixed requests, a fifth of them left by their clients, on a cache that is too small for all of them at once."""

import asyncio
import json
import random
from collections import deque

import httpx2

from cases.processes import PATIENCE_S, run_async
from cases.scripted import Script, last_question, scripted_model, write_text_files
from cases.serving import running
from qwen_engine.graph_io import TensorSpec
from qwen_run.runtime.kv_cache import KVCache

NUM_REQUESTS, AT_ONCE = 150, 24
THOUGHT = "<think>\nHm.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "%s"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def reply(prompt):
    question = last_question(prompt) if "<|im_start|>" in prompt else prompt
    if question.startswith("call"):
        return CALL % question
    return (THOUGHT if question.startswith("think") else "") + question.upper()


def request(rng, index):
    """A path, a body, and the text that is the answer."""
    kind = rng.choice(["", "think ", "call "])
    text = f"{kind}{index} " + "x" * rng.randint(0, 120)
    if rng.random() < 0.3 and not kind:
        return "/v1/completions", {"prompt": text, "max_tokens": 400}, text.upper()
    body = {"messages": [{"role": "user", "content": text}], "n": rng.choice([1, 1, 1, 2])}
    body |= {"tools": TOOLS} if kind == "call " else {}
    expected = json.dumps({"x": text}) if kind == "call " else text.upper()
    return "/v1/chat/completions", body, expected


async def answer(client, path, body):
    """The texts of all choices: what was said, or the arguments of the call."""
    texts = {}
    if not body.get("stream"):
        for choice in (await client.post(path, json=body)).json()["choices"]:
            message = choice.get("message", {})
            calls = message.get("tool_calls")
            said = choice.get("text") or message.get("content")
            texts[choice["index"]] = calls[0]["function"]["arguments"] if calls else said
        return texts
    async with client.stream("POST", path, json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                delta = choice.get("delta", {})
                calls = delta.get("tool_calls", [])
                said = choice.get("text") or delta.get("content") or ""
                said += "".join(call["function"]["arguments"] for call in calls)
                texts[choice["index"]] = texts.get(choice["index"], "") + said
    return texts


async def one(client, rng, index, wrong):
    path, body, expected = request(rng, index)
    body["stream"] = rng.random() < 0.5
    if rng.random() < 0.2:
        try:
            await asyncio.wait_for(answer(client, path, body), rng.random() * 0.3)
        except TimeoutError:
            return "left"
        return "was quick"
    texts = await answer(client, path, body)
    if set(texts.values()) != {expected} or len(texts) != body.get("n", 1):
        wrong.append((index, path, body, texts))
    return "answered"


async def soak(url):
    wrong, waiting, ends = [], iter(range(NUM_REQUESTS)), []

    async def client_of_many():
        async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            ends.extend([await one(client, random.Random(index), index, wrong) for index in waiting])

    await asyncio.gather(*(client_of_many() for _ in range(AT_ONCE)))
    return wrong, ends


def test_nothing_is_lost_and_nothing_is_left(tmp_path):
    model, script = scripted_model(write_text_files(tmp_path, "qwen3"), reply, max_seq_len=1000)
    pool = TensorSpec("tokens", "paged_state", "int32", ("num_blocks", Script.BLOCK_SIZE))
    script.cache = KVCache([pool], Script.BLOCK_SIZE, 36)  # a little more than the longest may have
    script.seen = deque(maxlen=4 * AT_ONCE)  # it looks at all of them for every token
    with running(model, options={"max_batch_size": 8}, max_queue=1000) as server:
        wrong, ends = run_async(soak(server.url))
        server.wait_until_idle()
        assert wrong == []
        assert len(ends) == NUM_REQUESTS
        assert ends.count("left") > NUM_REQUESTS // 20
        assert server.serving.opened.statistics.num_preempted > 0
        assert {record["status"] for record in server.log} <= {200, 499}
