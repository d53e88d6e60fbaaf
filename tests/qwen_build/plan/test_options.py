"""Options of a build from Python: whatever is given, they are taken or refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build
from qwen_build.plan.options import RULES, BuildOptions
from qwen_engine.errors import BuildError, QwenError
from qwen_run.api.build_on_demand import build_options

ODD = (
    None, True, False, 0, 1, -1, 7, 64, 64.0, 1e300, math.nan, math.inf, 10**30, "", "none", "int8", "auto", "\0",
    "x" * 300, b"int8", [], [1], ["*"], (), {}, {"quant": "int8"}, Path("absent"), Path("."), object(),
)  # fmt: skip


def test_every_option_has_a_rule_that_its_default_keeps():
    assert RULES.keys() == BuildOptions.__dataclass_fields__.keys()
    BuildOptions()


@pytest.mark.parametrize("name", RULES)
def test_an_odd_value_is_taken_or_refused_by_name(name, tiny_checkpoint):
    path = tiny_checkpoint("qwen2").path
    refused = 0
    with Checkpoint.open(path) as weights:
        for value in ODD:
            try:
                options = build_options({name: value})
            except BuildError:
                refused += 1
                continue
            try:
                options.resolved()
                if options.quant != "auto":
                    plan_build(weights, resolve_checkpoint(str(path)), options)
            except QwenError:
                refused += 1
    assert refused > len(ODD) // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"symmetric": 1}, "symmetric is 1, expected one of True, False"),
        ({"group_size": 64.0}, "group_size is 64.0, expected one of 32, 64, 128"),
        (
            {"quant": ["int8"]},
            r"quant is \['int8'\], expected one of none, int8, int6, int5, int4, int4-mixed, smooth",
        ),
        ({"alpha": math.nan}, "alpha is nan, expected a number from 0 to 1, or 'auto'"),
        ({"exclude": [1]}, r"exclude is \(1,\), expected a pattern of names or several"),
        ({"max_seq_len": True}, "max_seq_len is True, expected a number of tokens"),
        ({"calibration_tokens": 0}, "calibration_tokens is 0, expected a number of tokens"),
        ({"kernels": None}, "kernels is None, expected one of native, stock"),
    ],
    ids=str,
)
def test_the_message_names_option_and_choices(options, message):
    with pytest.raises(BuildError, match=message):
        build_options(options)
