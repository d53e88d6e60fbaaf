"""An engine from Python: python build.py CHECKPOINT ENGINE"""

import sys
from pathlib import Path

from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.safetensors import Checkpoint
from qwen_build.engine_build import plan_build, write_engine
from qwen_build.plan.options import BuildOptions

located = resolve_checkpoint(sys.argv[1])
with Checkpoint.open(located.path) as weights:
    plan = plan_build(weights, located, BuildOptions(quant="int8", group_size=64))
    print(f"{plan.layout.size_bytes / 1e6:.1f} MB of weights, {plan.cache_bytes_per_token} bytes of cache a token")
    manifest = write_engine(plan, weights, Path(sys.argv[2]))
print(f"{manifest.name}: {len(manifest.linears)} linears, {manifest.limits.max_seq_len} tokens")
