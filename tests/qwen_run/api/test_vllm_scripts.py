"""Programs written for vLLM's offline use run with nothing replaced but the import and the model."""

import re

import pytest

from cases.scripted import last_question, scripted_model, write_text_files

BASIC = """
from vllm import LLM, SamplingParams

prompts = ["Hello, my name is", "The future of AI is"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=40)

def main():
    llm = LLM(model=MODEL, gpu_memory_utilization=0.8, enforce_eager=True)
    outputs = llm.generate(prompts, sampling_params)
    for output in outputs:
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")

if __name__ == "__main__":
    main()
"""

CHAT = """
from vllm import LLM

llm = LLM(model=MODEL, dtype="auto", trust_remote_code=True)
sampling_params = llm.get_default_sampling_params()
for name, value in {"max_tokens": 60, "temperature": 0.0, "top_p": None, "top_k": 20}.items():
    if value is not None:
        setattr(sampling_params, name, value)
conversation = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I assist you today?"},
    {"role": "user", "content": "Write an essay"},
]
for output in llm.chat(conversation, sampling_params, use_tqdm=False):
    print(output.outputs[0].text)
outputs = llm.chat([conversation for _ in range(3)], sampling_params, use_tqdm=True)
print(len(outputs), len({output.outputs[0].text for output in outputs}))
"""

TEMPLATE = """
from vllm import LLM, SamplingParams

llm = LLM(MODEL, max_model_len=None, max_num_seqs=8, tensor_parallel_size=1, seed=0)
tokenizer = llm.get_tokenizer()
text = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Say it"}], tokenize=False, add_generation_prompt=True
)
stop = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else None
params = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=stop, skip_special_tokens=True, bad_words=["zzz"])
(output,) = llm.generate({"prompt_token_ids": tokenizer.encode(text)}, params)
print(output.outputs[0].text, output.finished, output.outputs[0].finished())
"""

PREFIX = """
from vllm import LLM, SamplingParams

prefix = "You are an expert school principal, skilled in effectively managing faculty and staff. "
prompts = [prefix + question for question in ("Hello, my name is", "The president of the US is")]
params = SamplingParams(temperature=0.0, max_tokens=20)
regular = LLM(model=MODEL, enable_prefix_caching=False)
expected = [output.outputs[0].text for output in regular.generate(prompts, params)]
del regular
cached = LLM(model=MODEL, enable_prefix_caching=True, gpu_memory_utilization=0.4)
cached.generate(prompts[0], params)
outputs = cached.generate(prompts, params)
print([output.outputs[0].text for output in outputs] == expected, outputs[1].num_cached_tokens > 0)
print(outputs[0].metrics.first_token_time >= outputs[0].metrics.arrival_time)
"""

BEAMS = """
from vllm import LLM
from vllm.sampling_params import BeamSearchParams

llm = LLM(model=MODEL)
params = BeamSearchParams(beam_width=3, max_tokens=10)
for output in llm.beam_search([{"prompt": "ab"}, {"prompt": "cd"}], params):
    print(len(output.sequences), output.sequences[0].text)
"""


@pytest.mark.filterwarnings("ignore:without effect")
@pytest.mark.parametrize(
    ("script", "printed"),
    [
        (BASIC, "'Hello, my name is' -> 'HELLO, MY NAME IS'\n'The future of AI is' -> 'THE FUTURE OF AI IS'\n"),
        (CHAT, "WRITE AN ESSAY\n3 1\n"),
        (TEMPLATE, "SAY IT True True\n"),
        (PREFIX, "True True\nTrue\n"),
        (BEAMS, "3 abAB<|im_end|>\n3 cdCD<|im_end|>\n"),
    ],
    ids=["basic", "chat", "template", "prefix", "beams"],
)
def test_a_program_for_vllm_runs_as_it_is(tmp_path, capsys, script, printed):
    def reply(prompt):
        return last_question(prompt).upper() if "<|im_start|>user" in prompt else prompt.upper()

    model, engine = scripted_model(write_text_files(tmp_path), reply)
    engine.directory = tmp_path
    own = re.sub(r"from vllm[.\w]* import", "from qwen_run import", script)
    exec(own, {"__name__": "__main__", "MODEL": model})
    assert capsys.readouterr().out == printed
    assert engine.is_idle
