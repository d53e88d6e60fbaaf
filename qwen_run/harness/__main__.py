"""The harness's own command line, to which ``--model qwen-engine`` is known.

python -m qwen_run.harness run --model qwen-engine --model_args engine=ENGINE --tasks hellaswag,gsm8k
"""

from lm_eval.__main__ import cli_evaluate

import qwen_run.harness.engine_lm  # noqa: F401  # registers the model

if __name__ == "__main__":
    cli_evaluate()
