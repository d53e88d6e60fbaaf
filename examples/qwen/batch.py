"""Several prompts in one batch: python batch.py ENGINE"""

import sys
from dataclasses import replace
from pathlib import Path

from qwen_run.text import TextModel

PROMPTS = ["Name three colours.", "What is the largest planet?", "Write one sentence about the sea."]

model = TextModel.load(Path(sys.argv[1]))
params = replace(model.defaults, max_tokens=60)
requests = [model.request(model.encode_chat([{"role": "user", "content": p}]), params) for p in PROMPTS]
answers = [""] * len(PROMPTS)
for piece in model.stream(requests):
    answers[piece.request_index] += piece.text
for prompt, answer in zip(PROMPTS, answers, strict=True):
    print(f"> {prompt}\n{answer}\n")
