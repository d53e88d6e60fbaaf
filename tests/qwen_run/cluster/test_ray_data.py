"""The example of a dataset of Ray Data, on two processors and no more."""

import json

import pytest

from cases import ROOT
from cases.ray_cluster import missing, run_inside
from qwen_run import LLM, SamplingParams

WHY = missing()
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(WHY is not None, reason=str(WHY))]

EXAMPLE = """
import runpy, sys
import ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_the_example_answers_every_row(chat_engine, tmp_path):
    prompts = [f"Question {index}" for index in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    code = EXAMPLE.replace("sys.argv[1]", "sys.argv.pop(1)")
    example = ROOT / "examples" / "qwen" / "ray_data.py"
    run_inside(code, example, chat_engine, tmp_path / "prompts.jsonl", tmp_path / "answers", cwd=tmp_path)
    lines = [line for file in (tmp_path / "answers").iterdir() for line in file.read_text("utf-8").splitlines()]
    found = {row["prompt"]: row["text"] for row in map(json.loads, lines)}
    with LLM(chat_engine) as llm:
        expected = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
    assert len(lines) == 40
    assert found == {prompt: each.outputs[0].text for prompt, each in zip(prompts, expected, strict=True)}
