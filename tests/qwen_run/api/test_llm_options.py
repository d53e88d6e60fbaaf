"""The options of LLM: vLLM's names, those without effect, and mistakes."""

import warnings

import pytest

from cases.scripted import scripted_model, write_text_files
from qwen_engine.errors import EngineError
from qwen_run import LLM
from qwen_run.api.llm_options import IDLE, SYNONYMS, LLMOptions

OTHER = {
    "gpu_memory_utilization": "much",
    "dtype": "float16",
    "tensor_parallel_size": 2,
    "enforce_eager": 1,
    "trust_remote_code": "yes",
    "disable_log_stats": None,
    "tokenizer_mode": "slow",
    "load_format": "gguf",
    "quantization": "awq",
    "swap_space": "4 GiB",
}
USUAL = {
    "gpu_memory_utilization": 0.9,
    "dtype": "auto",
    "tensor_parallel_size": 1,
    "enforce_eager": True,
    "trust_remote_code": False,
    "disable_log_stats": True,
    "tokenizer_mode": "auto",
    "load_format": "auto",
    "quantization": None,
    "swap_space": 4,
}


@pytest.fixture
def model(tmp_path):
    return scripted_model(write_text_files(tmp_path), str.upper)[0]


def test_names_of_vllm_are_synonyms(model):
    llm = LLM(model, max_num_seqs=3, max_num_batched_tokens=40, enable_prefix_caching=False)
    options = llm.core.options
    assert (options.max_batch_size, options.max_batch_tokens, options.prefix_caching) == (3, 40, False)
    chosen = LLMOptions.of({"max_model_len": 512, "quant": "int8"})
    assert (chosen.max_seq_len, chosen.build) == (512, {"quant": "int8"})


def test_a_large_batch_brings_its_tokens_with_it(model):
    assert LLM(model, max_num_seqs=300).core.options.max_batch_tokens == 300
    assert LLM(model, max_num_seqs=30).core.options.max_batch_tokens == 256
    with pytest.raises(EngineError, match="max_batch_tokens is 20, expected at least"):
        LLM(model, max_num_seqs=30, max_num_batched_tokens=20)


def test_options_without_effect_get_one_warning(model):
    assert USUAL.keys() == OTHER.keys() == IDLE.keys()
    with pytest.warns(UserWarning, match="without effect on an engine: gpu_memory_utilization, dtype, ") as caught:
        LLM(model, **USUAL)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLM(model, seed=3, max_num_seqs=2)


@pytest.mark.parametrize("name", IDLE)
def test_an_option_without_effect_is_refused_where_it_asks_for_one(model, name):
    with pytest.raises(EngineError, match=f"^{name} is {OTHER[name]!r}, expected [^:]*: [a-z]"):
        LLM(model, **{name: OTHER[name]})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_batch_sise", "max_batch_size"),
        ("max_num_seq", "max_num_seqs"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("num_threads", "threads"),
        ("quantisation", "quantization"),
        ("groupsize", "group_size"),
    ],
)
def test_an_unknown_option_names_the_nearest(model, name, nearest):
    with pytest.raises(EngineError, match=rf"^unknown option {name}; did you mean {nearest}\?$"):
        LLM(model, **{name: 1})


def test_an_option_like_no_other_gets_the_list(model):
    with pytest.raises(EngineError, match=r"^unknown option xyzzy; expected one of threads, .*, max_num_seqs, .*quant"):
        LLM(model, xyzzy=1)


@pytest.mark.parametrize("synonym", SYNONYMS)
def test_an_option_is_given_once(model, synonym):
    with pytest.raises(EngineError, match=f"^{SYNONYMS[synonym]} and {synonym} are one option; give one of them"):
        LLM(model, **{SYNONYMS[synonym]: 1, synonym: 1})


@pytest.mark.parametrize("seed", [-1, 2**64, "7", True, 0.5])
def test_a_seed_is_a_whole_number(model, seed):
    with pytest.raises(EngineError, match=r"^seed is .*, expected None or a whole number from 0"):
        LLM(model, seed=seed)
