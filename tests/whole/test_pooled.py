"""Embeddings, classes and scores: equal to transformers, the same bits in any batch, refused where there are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from cases.pooled import QUERY_PROMPT, add_words, write_pooled, write_sentence_files
from cases.scripted import ENDOFTEXT
from qwen_build import build
from qwen_engine.errors import BuildError, CheckpointError, EngineError, RequestError, UnsupportedModel, WeightMismatch
from qwen_engine.manifest import Manifest
from qwen_run import LLM, PoolingParams, SamplingParams
from qwen_run.commands.bench import main as bench
from qwen_run.commands.inspect import main as inspect
from qwen_run.commands.run import main as run
from qwen_run.commands.summarize import main as summarize
from qwen_run.text.rerank_prompt import AFTER, BEFORE, INSTRUCTION

TEXTS = ["Who wrote it?", "A cat.", "x" * 300, "Der Fluss fließt " * 8, "the"]
# float32 sums in another order than torch's: 1e-5 of numbers up to 1
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SCHEMES = ["int8", "int4"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory, build_engine):
    """A published checkpoint's files: a causal model's config, the decoder's names alone, no head."""
    path = tmp_path_factory.mktemp("embedder") / "embedder"
    model = write_pooled(path, "Qwen3ForCausalLM", tie_word_embeddings=True)
    weights = {name.removeprefix("model."): each for name, each in load_file(path / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors")
    write_sentence_files(path)
    return path, model.model


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    path = tmp_path_factory.mktemp("reranker") / "reranker"
    model = write_pooled(path, "Qwen3ForCausalLM")
    add_words(path, "yes", "no")
    return path, model


def hidden(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0, -1].numpy()


def expected_embedding(model, ids, dimensions=None):
    kept = torch.tensor(hidden(model, ids))[:dimensions]
    return torch.nn.functional.normalize(kept, dim=-1).numpy()


def test_embeddings_equal_transformers(embedder, build_engine):
    path, model = embedder
    with LLM(build_engine(path, quant="none"), threads=1) as llm:
        results = llm.embed(TEXTS)
        assert llm.task == "embed"
        for text, result in zip(TEXTS, results, strict=True):
            ids = [*llm.tokenizer.encode(text), ENDOFTEXT]
            assert result.prompt_token_ids == ids
            np.testing.assert_allclose(result.outputs.embedding, expected_embedding(model, ids), **CLOSE)
        (cut,) = llm.embed(TEXTS[0], PoolingParams(dimensions=33))
        np.testing.assert_allclose(cut.outputs.embedding, expected_embedding(model, cut.prompt_token_ids, 33), **CLOSE)
        (raw,) = llm.embed(TEXTS[0], PoolingParams(normalize=False))
        np.testing.assert_allclose(raw.outputs.embedding, hidden(model, raw.prompt_token_ids), rtol=1e-5, atol=1e-4)


def test_what_stands_before_a_query(embedder, build_engine):
    path, _ = embedder
    with LLM(build_engine(path, quant="none"), threads=1) as llm:
        plain = llm.embed(f"{QUERY_PROMPT}who?")
        assert llm.embed("who?", prompt_name="query")[0].outputs == plain[0].outputs
        assert llm.embed("who?", instruction="find it")[0].outputs == plain[0].outputs
        assert llm.embed("who?")[0].outputs != plain[0].outputs
        with pytest.raises(RequestError, match="prompt_name is 'nope', expected one of query, document"):
            llm.embed("who?", prompt_name="nope")
        assert llm.embed({"prompt": "who?"}, prompt_name="query")[0].outputs == plain[0].outputs
        with pytest.raises(RequestError, match="are put before texts, found token ids"):
            llm.embed([1, 2], prompt_name="query")
        with pytest.raises(RequestError, match="expected one of them"):
            llm.embed("who?", prompt_name="query", instruction="find it")


def test_a_cosine_of_query_and_documents(embedder, build_engine):
    path, model = embedder
    with LLM(build_engine(path, quant="none"), threads=1) as llm:
        scores = [each.outputs.score for each in llm.score("who?", TEXTS)]
        rows = [
            expected_embedding(model, [*llm.tokenizer.encode(text), ENDOFTEXT])
            for text in (f"{QUERY_PROMPT}who?", *TEXTS)
        ]
        np.testing.assert_allclose(scores, [rows[0] @ row for row in rows[1:]], **CLOSE)


def test_a_long_text_is_cut_as_asked_for(embedder, build_engine):
    path, _ = embedder
    with LLM(build_engine(path, quant="none"), threads=1) as llm:
        with pytest.raises(RequestError, match="the text has 601 tokens, the engine takes 512; shorten it"):
            llm.embed("x" * 600)
        (cut,) = llm.embed("x" * 600, PoolingParams(truncate_prompt_tokens=10))
        assert cut.prompt_token_ids == [*llm.tokenizer.encode("x" * 9), ENDOFTEXT]
        (whole,) = llm.embed("x" * 600, PoolingParams(truncate_prompt_tokens=-1))
        assert len(whole.prompt_token_ids) == 512


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bits_depend_on_the_text_alone(scheme, embedder, build_engine):
    path, model = embedder
    engine = build_engine(path, quant=scheme)
    with LLM(engine, threads=1, prefix_caching=False) as llm:
        alone = [llm.embed(text)[0].outputs for text in TEXTS]
    cosines = [
        np.dot(one.embedding, expected_embedding(model, ids))
        for one, ids in zip(alone, [each.prompt_token_ids for each in LLM(engine, threads=1).embed(TEXTS)], strict=True)
    ]
    assert min(cosines) > (0.999 if scheme == "int8" else 0.8)
    texts = TEXTS * 4
    for options in ({"max_batch_tokens": 16}, {"max_batch_size": 2}, {"num_blocks": 8}, {"threads": 2}):
        with LLM(engine, **{"threads": 1} | options) as llm:
            for _ in range(2):  # the second time the beginnings are in the cache
                results = llm.embed(texts)
                assert [each.outputs for each in results] == alone * 4, options
            assert results[2].num_cached_tokens > 0


@pytest.mark.parametrize("tied", [False, True])
def test_scores_equal_the_sigmoid_of_two_logits(tied, tmp_path, build_engine):
    model = write_pooled(tmp_path / "own", "Qwen3ForCausalLM", tie_word_embeddings=tied)
    add_words(tmp_path / "own", "yes", "no")
    engine = build_engine(tmp_path / "own", quant="none", task="score")
    names = [linear.name for linear in Manifest.read(engine).linears]
    assert "lm_head" not in names
    with LLM(engine, threads=1) as llm:
        encode = llm.tokenizer.encode
        results = llm.score("who?", TEXTS[:2], instruction="find it")
        default = llm.score(["who?"], TEXTS[:1])
        for document, task, result in zip(
            (*TEXTS[:2], TEXTS[0]), ("find it", "find it", INSTRUCTION), (*results, *default), strict=True
        ):
            body = f"<Instruct>: {task}\n<Query>: who?\n<Document>: {document}"
            ids = [*encode(BEFORE), *encode(body), *encode(AFTER)]
            assert result.prompt_token_ids == ids
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            yes, no = (logits[llm.tokenizer.token_id(word)] for word in ("yes", "no"))
            assert abs(yes - no) > 0.01
            assert result.outputs.score == pytest.approx(torch.sigmoid(yes - no).item(), abs=1e-5)


def test_a_document_spells_no_control_token_and_is_cut(reranker, build_engine):
    path, _ = reranker
    with LLM(build_engine(path, quant="int8", task="score"), threads=1) as llm:
        encode = llm.tokenizer.encode
        (own,) = llm.score("who?", "<|im_end|>")
        count = len(encode(BEFORE)) + len(encode(AFTER))
        end = own.prompt_token_ids[: -len(encode(AFTER))]
        assert llm.tokenizer.decode(end[-10:], False).endswith("<|im_end|>")
        assert llm.tokenizer.token_id("<|im_end|>") not in end[len(encode(BEFORE)) :]
        with pytest.raises(RequestError, match="the engine takes 512"):
            llm.score("who?", "x" * 600)
        (cut,) = llm.score("who?", "x" * 600, PoolingParams(truncate_prompt_tokens=-1))
        assert (len(cut.prompt_token_ids), cut.prompt_token_ids[-len(encode(AFTER)) :]) == (512, encode(AFTER))
        with pytest.raises(RequestError, match="hold no more than the words around a document"):
            llm.score("who?", "x", PoolingParams(truncate_prompt_tokens=count))
        scores = [each.outputs.score for each in llm.score("who?", TEXTS[:2] * 8)]
        assert scores == [llm.score("who?", text)[0].outputs.score for text in TEXTS[:2]] * 8


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(("labels", "problem"), [(3, None), (1, None), (3, "multi_label_classification")])
def test_classes_equal_transformers(model_type, labels, problem, tmp_path, build_engine):
    kind = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[model_type]
    names = {i: f"class {i}" for i in range(labels)}
    model = write_pooled(
        tmp_path / "own", f"{kind}ForSequenceClassification", model_type, id2label=names, problem_type=problem
    )
    for quant in ("none", "int8"):
        with LLM(build_engine(tmp_path / "own", quant=quant), threads=1) as llm:
            results = llm.classify(TEXTS)
            raw = llm.classify(TEXTS, PoolingParams(use_activation=False))
            assert [llm.classify(text)[0].outputs for text in TEXTS] == [each.outputs for each in results] or (
                quant == "none"
            )
            for text, result, logits in zip(TEXTS, results, raw, strict=True):
                with torch.no_grad():
                    expected = model(torch.tensor([llm.tokenizer.encode(text)])).logits[0]
                way = torch.softmax if problem is None and labels > 1 else lambda x, _: torch.sigmoid(x)
                if quant == "none":
                    np.testing.assert_allclose(logits.outputs.probs, expected.numpy(), rtol=1e-5, atol=1e-5)
                    np.testing.assert_allclose(result.outputs.probs, way(expected, -1).numpy(), **CLOSE)
                    assert result.outputs.label == f"class {int(expected.argmax())}"
                assert result.outputs.num_classes == labels


def test_any_checkpoint_makes_embeddings_if_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = write_pooled(tmp_path / "own", "Qwen2ForCausalLM", "qwen2")
    with pytest.warns(UserWarning, match=r"lm_head.weight is left out: the head over the vocabulary"):
        llm = LLM(tmp_path / "own", task="embed", quant="none", threads=1)
    ids = [5, 6, 7]
    with llm:
        (result,) = llm.embed(ids)
        np.testing.assert_allclose(result.outputs.embedding, expected_embedding(model.model, ids), **CLOSE)


def test_a_model_without_a_head_makes_embeddings(tmp_path, build_engine):
    write_pooled(tmp_path / "own", "Qwen3Model")
    assert Manifest.read(build_engine(tmp_path / "own", quant="int4")).task == "embed"


def test_an_engine_is_asked_for_what_it_is_for(embedder, reranker, chat_engine, build_engine):
    path, _ = embedder
    with LLM(build_engine(path, quant="int8"), threads=1) as llm:
        for ask in (llm.generate, lambda text: next(llm.stream(text))):
            with pytest.raises(RequestError, match=r"the engine makes embeddings, .*LLM.embed.*--task generate"):
                ask("hi")
        with pytest.raises(RequestError, match="the engine makes embeddings, expected one that classifies texts"):
            llm.classify("hi")
        with pytest.raises(RequestError, match="dimensions is 81, expected at most the model's 80"):
            llm.embed("hi", PoolingParams(dimensions=81))
        with pytest.raises(RequestError, match="expected PoolingParams"):
            llm.embed("hi", SamplingParams())
        with pytest.raises(RequestError, match="the text is empty"):
            llm.embed([[]])
        with pytest.raises(RequestError, match="2 queries for 3 documents"):
            llm.score(["a", "b"], ["a", "b", "c"])
    with LLM(chat_engine, threads=1) as llm:
        for ask, task in ((llm.embed, "embed"), (llm.classify, "classify"), (lambda x: llm.score(x, x), "score")):
            with pytest.raises(RequestError, match=rf"the engine writes text, .*qwen-build CHECKPOINT --task {task}"):
                ask("hi")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (run, ["--engine", "ENGINE", "hi"]),
        (run, ["--engine", "ENGINE", "--raw", "hi"]),
        (bench, ["latency", "--engine", "ENGINE"]),
        (summarize, ["--engine", "ENGINE"]),
    ],
)
def test_commands_say_what_such_an_engine_is_for(command, arguments, embedder, build_engine, tmp_path, monkeypatch):
    path, _ = embedder
    engine = str(build_engine(path, quant="int8"))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(command, [engine if each == "ENGINE" else each for each in arguments])
    assert done.exit_code == 1
    assert done.stderr.strip() == (
        "Error: the engine makes embeddings, expected one that writes text; ask this one with LLM.embed, "
        "qwen-run --embed (/v1/embeddings), "
        "or build another of the checkpoint with `qwen-build CHECKPOINT --task generate`"
    )


def test_such_an_engine_is_inspected(embedder, build_engine):
    path, _ = embedder
    done = CliRunner().invoke(inspect, [str(build_engine(path, quant="int8")), "--verify"])
    assert done.exit_code == 0, done.output


def test_what_chooses_by_next_tokens_is_refused(embedder, tmp_path):
    path, _ = embedder
    with pytest.raises(BuildError, match="an engine that makes embeddings has none"):
        build(path, tmp_path / "engine", quant="auto", max_kl=0.1)


def test_an_output_that_is_no_number_is_the_text_s_own_error(embedder, build_engine, monkeypatch):
    path, _ = embedder
    with LLM(build_engine(path, quant="int8"), threads=1) as llm:
        run = llm.core.engine.run

        def broken(batch):
            found = run(batch)
            found[batch.input_ids[batch.logits_indices - 1] == 7] = np.nan
            return found

        monkeypatch.setattr(llm.core.engine, "run", broken)
        with pytest.raises(EngineError, match="hold nan, expected numbers"):
            llm.embed([[5, 6, 8], [5, 7, 8]])
        assert llm.embed([[5, 6, 8]])[0].finished


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda path: write_sentence_files(path, pooling_mode_lasttoken=False, pooling_mode_mean_tokens=True),
         UnsupportedModel, "pooling of mean_tokens is not supported, only of lasttoken"),
        (lambda path: write_sentence_files(path, word_embedding_dimension=79),
         CheckpointError, "word_embedding_dimension is 79, config.json has 80"),
        (lambda path: (path / "modules.json").write_text('[{"path": "2", "type": "a.Dense"}]'),
         UnsupportedModel, "module 'Dense' is not supported, only Transformer, Pooling, Normalize"),
        (lambda path: (path / "modules.json").write_text("{}["), CheckpointError, "is no list of modules"),
        (lambda path: (path / "modules.json").write_text('[{"path": "../x", "type": "a.Pooling"}]'),
         CheckpointError, "outside the checkpoint"),
        (lambda path: (path / "sentence_bert_config.json").write_text('{"do_lower_case": true}'),
         UnsupportedModel, "do_lower_case is not supported"),
        (lambda path: (path / "config_sentence_transformers.json").write_text('{"default_prompt_name": "x"}'),
         CheckpointError, "default_prompt_name is 'x', expected one of its prompts"),
    ],
)  # fmt: skip
def test_other_embeddings_are_refused(change, error, says, tmp_path, build_engine):
    write_pooled(tmp_path / "own", "Qwen3Model")
    write_sentence_files(tmp_path / "own")
    change(tmp_path / "own")
    with pytest.raises(error, match=says):
        build_engine(tmp_path / "own")


def test_a_snapshot_of_the_hub_has_links_for_files(embedder, tmp_path):
    path, _ = embedder
    snapshot, blobs = tmp_path / "models--own" / "snapshots" / "abc", tmp_path / "models--own" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(each for each in sorted(path.rglob("*")) if each.is_file()):
        link = snapshot / file.relative_to(path)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(number)).write_bytes(file.read_bytes())
        link.symlink_to(blobs / str(number))
    with pytest.warns(UserWarning, match="in place of 'model.'"):
        assert Manifest.read(build(snapshot, tmp_path / "engine", quant="int8")).task == "embed"


def with_config(path, **fields):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))
    return path


@pytest.mark.parametrize(
    ("fields", "options", "error", "says"),
    [
        ({"architectures": ["Qwen3ForTokenClassification"]}, {}, UnsupportedModel, "--task embed leaves its head out"),
        ({"architectures": "x"}, {}, CheckpointError, "architectures is 'x', expected a list of names"),
        ({}, {"task": "score"}, UnsupportedModel, "has no tokens 'no' and 'yes'.*build it without --task score"),
        ({"classifier_from_token": ["a"]}, {}, UnsupportedModel, "expected two tokens"),
        ({}, {"task": "classify"}, WeightMismatch, "the checkpoint lacks score.weight"),
        ({"problem_type": "x"}, {"task": "classify"}, UnsupportedModel, "problem_type 'x' is not one of"),
        ({}, {"task": "draw"}, BuildError, "task is 'draw', expected one of generate, embed, classify, score"),
    ],
)
def test_other_heads_are_refused(fields, options, error, says, tmp_path, build_engine):
    write_pooled(tmp_path / "own", "Qwen3ForCausalLM")
    with_config(tmp_path / "own", **fields)
    with pytest.raises(error, match=says):
        build_engine(tmp_path / "own", **options)


def test_the_tokens_that_a_config_names_are_answers(tmp_path, build_engine):
    write_pooled(tmp_path / "own", "Qwen3ForCausalLM")
    engine = build_engine(with_config(tmp_path / "own", classifier_from_token=["a", "b"]), quant="int8")
    assert Manifest.read(engine).task == "score"


def test_the_embedding_of_a_calibrated_engine_is_nearer(embedder, build_engine):
    path, model = embedder
    nearness = []
    for method in ("rtn", "gptq"):
        with LLM(build_engine(path, quant="int4", int4_method=method), threads=1) as llm:
            found = llm.embed(TEXTS)
            rows = [np.dot(each.outputs.embedding, expected_embedding(model, each.prompt_token_ids)) for each in found]
            nearness.append(np.mean(rows))
    assert nearness[1] > nearness[0]
