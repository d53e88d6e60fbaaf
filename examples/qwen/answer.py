"""One prompt, streamed: python answer.py ENGINE PROMPT"""

import sys
from dataclasses import replace
from pathlib import Path

from qwen_run.text import TextModel

engine, prompt = Path(sys.argv[1]), sys.argv[2]
model = TextModel.load(engine)
token_ids = model.encode_chat([{"role": "user", "content": prompt}])
request = model.request(token_ids, replace(model.defaults, max_tokens=200))
for piece in model.stream([request]):
    print(piece.text, end="", flush=True)
print()
