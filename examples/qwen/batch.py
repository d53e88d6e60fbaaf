"""Several questions at once: python batch.py ENGINE_OR_CHECKPOINT"""

import sys

from qwen_run import LLM

QUESTIONS = ["Name three colours.", "What is the largest planet?", "Write one sentence about the sea."]

llm = LLM(sys.argv[1])
conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
for question, result in zip(
    QUESTIONS, llm.chat(conversations, llm.default_params.with_options(max_tokens=60)), strict=True
):
    print(f"> {question}\n{result.outputs[0].text}\n")
