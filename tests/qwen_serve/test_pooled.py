"""Embeddings, scores and classes over HTTP: what ``LLM`` gives, in the forms of OpenAI's, vLLM's and Cohere's."""

import base64

import numpy as np
import openai
import pytest

from cases.pooled import QUERY_PROMPT, add_words, write_pooled, write_sentence_files
from cases.serving import running
from qwen_run import LLM, PoolingParams
from qwen_serve.http.program import in_force

TEXTS = ["Who wrote it?", "A cat.", "the" * 40]


@pytest.fixture(scope="module")
def engines(tmp_path_factory, build_engine):
    """An engine for each task that pools."""
    root = tmp_path_factory.mktemp("pooled")
    write_pooled(root / "embed", "Qwen3Model")
    write_sentence_files(root / "embed")
    write_pooled(root / "score", "Qwen3ForCausalLM")
    add_words(root / "score", "yes", "no")
    write_pooled(root / "classify", "Qwen3ForSequenceClassification", id2label={0: "bad", 1: "good", 2: "odd"})
    return {
        task: build_engine(root / task, quant="int8", task="score" if task == "score" else None)
        for task in ("embed", "score", "classify")
    }


@pytest.fixture(scope="module")
def serve(engines):
    """Runs a server of the engine for a task, which is idle at its end."""
    from contextlib import contextmanager

    @contextmanager
    def of(task, **settings):
        with running(str(engines[task]), options={"max_batch_size": 4, "threads": 1}, **settings) as found:
            yield found
            found.wait_until_idle()

    return of


@pytest.fixture(scope="module")
def embedder(serve):
    with serve("embed") as found:
        yield found


@pytest.fixture(scope="module")
def embeddings(engines):
    with LLM(engines["embed"], threads=1) as llm:
        yield llm


def test_an_openai_client_gets_the_embeddings_of_llm(embedder, embeddings):
    with openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="none", max_retries=0) as client:
        found = client.embeddings.create(model="m", input=TEXTS)  # the client asks for base64
        numbers = client.embeddings.create(model="m", input=TEXTS, encoding_format="float")
        cut = client.embeddings.create(model="m", input=TEXTS[0], dimensions=7)
        ids = client.embeddings.create(model="m", input=embeddings.embed(TEXTS[0])[0].prompt_token_ids)
    expected = embeddings.embed(TEXTS)
    assert [each.index for each in found.data] == [0, 1, 2]
    for answer in (found, numbers):
        assert [each.embedding for each in answer.data] == [each.outputs.embedding for each in expected]
    assert cut.data[0].embedding == embeddings.embed(TEXTS[0], PoolingParams(dimensions=7))[0].outputs.embedding
    assert ids.data[0].embedding == expected[0].outputs.embedding
    count = sum(len(each.prompt_token_ids) for each in expected)
    assert (found.usage.prompt_tokens, found.usage.total_tokens, found.object) == (count, count, "list")


def test_base64_is_little_endian_float32(embedder):
    body = {"input": TEXTS[0]}
    text = embedder.post("/v1/embeddings", body | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
    numbers = embedder.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == numbers


def test_many_more_inputs_than_places(embedder, embeddings):
    texts = [f"text {index}" for index in range(50)]
    found = embedder.post("/v1/embeddings", {"input": texts}).json()["data"]
    assert [each["embedding"] for each in found] == [each.outputs.embedding for each in embeddings.embed(texts)]


def test_what_stands_before_a_query(embedder, embeddings):
    expected = embeddings.embed(QUERY_PROMPT + "who?")[0].outputs.embedding
    for more in ({"prompt_name": "query"}, {"instruction": "find it"}):
        assert embedder.post("/v1/embeddings", {"input": "who?", **more}).json()["data"][0]["embedding"] == expected


def test_unknown_fields_are_named(embedder):
    assert "'nope'" in embedder.post("/v1/embeddings", {"input": "a", "nope": 1}).json()["warnings"][0]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/embeddings", {}, "input is missing"),
        ("/v1/embeddings", {"input": []}, "input has 0 texts, expected 1 to 2048"),
        ("/v1/embeddings", {"input": [[]]}, "the input is empty"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "input has 2049 texts, expected 1 to 2048"),
        ("/v1/embeddings", {"input": [10**6]}, "token 1000000, expected 0 to 282"),
        ("/v1/embeddings", {"input": ["a", "x" * 600]}, "input 2 has 601 tokens, the engine takes 512;"),
        ("/v1/embeddings", {"input": "a", "dimensions": 81}, "dimensions is 81, expected at most the model's 80"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions is 0, expected a whole number"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format is 'hex'"),
        ("/v1/embeddings", {"input": "a", "prompt_name": "x"}, "expected one of query, document"),
        ("/classify", {"input": "a"}, "the engine makes embeddings, expected one that classifies texts"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "2 queries for 3 documents"),
        ("/rerank", {"query": "a", "documents": []}, "documents has 0 texts"),
        ("/v1/completions", {"prompt": "a"}, "the engine makes embeddings, expected one that writes text"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "expected one that writes text"),
    ],
)
def test_what_cannot_be_done(embedder, path, body, says):
    response = embedder.post(path, body)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]
    embedder.wait_until_idle()


@pytest.mark.parametrize("task", ["score", "embed"])
def test_documents_are_ordered(task, serve, engines):
    documents = [*TEXTS, "the cat wrote it", "\n"]
    with LLM(engines[task], threads=1) as llm:
        scores = [each.outputs.score for each in llm.score("who?", documents)]
        (other,) = llm.score("who?", documents[0], instruction="find it")
    order = sorted(range(5), key=lambda index: -scores[index])
    with serve(task) as server:
        for path in ("/v1/rerank", "/rerank"):
            found = server.post(path, {"query": "who?", "documents": documents}).json()
            expected = [{"index": i, "relevance_score": scores[i], "document": {"text": documents[i]}} for i in order]
            assert (found["results"], found["model"]) == (expected, "scripted")
        body = {"query": "who?", "documents": [{"text": each} for each in documents], "top_n": 2}
        found = server.post("/rerank", body | {"return_documents": False}).json()["results"]
        assert found == [{"index": i, "relevance_score": scores[i]} for i in order[:2]]
        for path in ("/v1/score", "/score"):
            found = server.post(path, {"text_1": "who?", "text_2": documents}).json()
            assert found["data"] == [{"index": i, "object": "score", "score": scores[i]} for i in range(5)]
        found = server.post("/score", {"text_1": ["who?"], "text_2": documents[0], "instruction": "find it"}).json()
        assert found["data"][0]["score"] == other.outputs.score


def test_classes(serve, engines):
    with LLM(engines["classify"], threads=1) as llm:
        expected = [
            {"index": index, "label": each.outputs.label, "probs": each.outputs.probs, "num_classes": 3}
            for index, each in enumerate(llm.classify(TEXTS))
        ]
    with serve("classify") as server:
        for path in ("/v1/classify", "/classify"):
            assert server.post(path, {"input": TEXTS}).json()["data"] == expected
        assert server.post("/v1/embeddings", {"input": "a"}).status_code == 400


def test_keys_do_not_share_what_was_read(serve):
    with serve("embed", api_keys=("one", "two"), cache_per_key=True) as server:
        cached = [
            server.post("/v1/embeddings", {"input": "x" * 200}, headers={"authorization": f"Bearer {key}"}).json()
            for key in ("one", "one", "two")
        ]
    found = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in cached]
    assert found[0] == found[2] == 0 < found[1]


def test_what_is_in_force_says_what_the_engine_is_for(embedder):
    lines = list(in_force(embedder.serving))
    assert lines[-1] == "the engine makes embeddings: LLM.embed, qwen-run --embed (/v1/embeddings)"
    assert not any("sampling" in line or "template" in line for line in lines)


def test_metrics_count_them(embedder):
    embedder.post("/v1/embeddings", {"input": "a"})
    text = embedder.client.get("/metrics").text
    assert 'finished_reason="stop"' in text
