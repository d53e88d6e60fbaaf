"""An engine from Python: python build.py CHECKPOINT ENGINE"""

import sys

import qwen_build
from qwen_run import QwenError

try:
    engine = qwen_build.build(sys.argv[1], sys.argv[2], quant="int8", group_size=64)
except QwenError as error:
    sys.exit(f"Error: {error}")
print(f"{engine}: open it with qwen_run.LLM({str(engine)!r})")
