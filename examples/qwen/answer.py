"""One question, its answer streamed: python answer.py ENGINE_OR_CHECKPOINT QUESTION"""

import sys

from qwen_run import LLM

llm = LLM(sys.argv[1])
prompt = llm.chat_prompt([{"role": "user", "content": sys.argv[2]}])
shown = ""
for output in llm.stream(prompt, llm.default_params.with_options(max_tokens=200)):
    print(output.outputs[0].text[len(shown) :], end="", flush=True)
    shown = output.outputs[0].text
print()
