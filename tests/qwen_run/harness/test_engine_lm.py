"""The harness's model: log likelihoods and answers equal to those of transformers' model in the harness."""

import json
import random

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from cases.scripted import core_tokenizer
from cases.tiny import TINY
from qwen_engine.errors import RequestError
from qwen_run import QwenForCausalLM, SamplingParams
from qwen_run.harness.engine_lm import EngineLM

EOS = core_tokenizer().token_to_id("<|im_end|>")
EXAMPLES = [
    {"question": "what barks", "choices": ["dogs", "cats and dogs", " a tree"], "answer": 0},
    {"question": "what is two and two", "choices": ["four", "five", "it is four"], "answer": 2},
    {"question": "hello the", "choices": ["world", "the", "e"], "answer": 1},
]
for example in EXAMPLES:
    words = random.Random(example["question"])
    example["long"] = " ".join(words.choice(["dogs", "hello", "world", "four", "it", "is"]) for _ in range(60))
TASKS = {
    "local_choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "num_fewshot": 2},
    "local_rolling": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{long}}", "doc_to_text": ""},
    "local_answer": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
    },
}
METRICS = {
    "local_choice": ("acc", "acc_norm"),
    "local_rolling": ("bits_per_byte",),
    "local_answer": ("exact_match",),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks over a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "examples.jsonl")}},
            "test_split": "test",
            "fewshot_split": "test",
            "doc_to_text": "question {{question}} answer",
            "doc_to_target": "answer",
            "metric_list": [{"metric": metric} for metric in METRICS[name]],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(the harness's own model, ours) of one tiny checkpoint with a tokenizer."""
    config = AutoConfig.for_model(**TINY | {"vocab_size": 320, "model_type": "qwen2", "eos_token_id": EOS})
    model = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core_tokenizer(), eos_token="<|im_end|>")
    assert tokenizer.eos_token_id == EOS
    engine = tmp_path_factory.mktemp("engines") / "tiny"
    QwenForCausalLM.from_model(model, {"quantization": "none"}, tokenizer).save_pretrained(engine)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=120), EngineLM(engine, max_length=120)


def results(model, tasks, name):
    """Metrics of a task, and the answers to each request."""
    found = lm_eval.simple_evaluate(
        model=model, tasks=[name], task_manager=tasks, bootstrap_iters=0, log_samples=True, random_seed=1
    )
    metrics = {key: value for key, value in found["results"][name].items() if isinstance(value, float)}
    return metrics, [sample["resps"] for sample in found["samples"][name]]


def flat(value):
    return [each for part in value for each in flat(part)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_gives_what_transformers_gives(models, tasks, name):
    (expected, theirs), (found, ours) = (results(model, tasks, name) for model in models)
    assert expected.keys() >= {f"{metric},none" for metric in METRICS[name]}
    assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert len(flat(ours)) == len(flat(theirs)) > 0
    for one, other in zip(flat(ours), flat(theirs), strict=True):
        number = isinstance(other, float)
        assert one == pytest.approx(other, rel=1e-4) if number else str(one) == str(other)


def test_an_engine_goes_through_the_harnesss_own_model(models, tasks):
    theirs, ours = models
    model = QwenForCausalLM.from_pretrained(ours.llm.core.engine.directory)
    through = HFLM(pretrained=model, tokenizer=theirs.tokenizer, batch_size=2, max_length=120)
    (expected, _), (found, _) = results(theirs, tasks, "local_choice"), results(through, tasks, "local_choice")
    assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)


def test_a_shared_context_is_computed_once(models):
    llm = models[1].llm
    context = [7] * 200
    judged = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, prompt_logprobs_start=200)
    first, second = (llm.generate([{"prompt_token_ids": [*context, token]}], judged)[0] for token in (5, 9))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 192)
    assert second.prompt_logprobs[:200] == [None] * 200
    whole = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    expected = llm.generate([{"prompt_token_ids": [*context, 9]}], whole)[0]
    assert second.prompt_logprobs[200][9].logprob == pytest.approx(expected.prompt_logprobs[200][9].logprob, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams is set by a task, expected 1"),
        ({"typical_p": 0.5}, "a task sets typical_p, expected temperature"),
        ({"max_gen_toks": 500}, "max_gen_toks is 500, expected less than max_length, which is 120"),
    ],
)
def test_what_a_task_may_not_ask_for(models, options, message):
    class Asked:
        args = ("hello", options)

    with pytest.raises(RequestError, match=message):
        models[1].generate_until([Asked()])


def test_the_engine_bounds_the_length(models):
    with pytest.raises(RequestError, match="max_length is 5000, expected 638 or less"):
        EngineLM(models[1].llm.core.engine.directory, max_length=5000)
