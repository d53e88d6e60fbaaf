"""Answers of ``benchmarks.questions``, by the checkout that is first on the path: imports the names for programs alone.

    PYTHONPATH=CHECKOUT python -P benchmarks/questions_worker.py ENGINE TOKENS < QUESTIONS.json > ANSWERS.json

Every question is a conversation of its own, answered greedily in up to ``TOKENS`` tokens.
"""

import json
import sys


def main():
    if len(sys.argv) != 3:
        print(__doc__)
        return
    from qwen_run import LLM, SamplingParams

    questions = json.load(sys.stdin)
    conversations = [[{"role": "user", "content": question}] for question in questions]
    params = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]))
    found = LLM(sys.argv[1]).chat(conversations, params, use_tqdm=False)
    json.dump([result.outputs[0].text for result in found], sys.stdout)


if __name__ == "__main__":
    main()
