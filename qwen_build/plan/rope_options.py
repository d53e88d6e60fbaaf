"""``--yarn`` and ``--rope-scaling``: the rotation that a user asks for in place of the checkpoint's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_build.checkpoint.config import ModelConfig, RopeOverride
from qwen_build.checkpoint.files import read_json
from qwen_build.checkpoint.rope import read_rope
from qwen_build.plan.options import BuildOptions
from qwen_engine.errors import BuildError, OptionsError

# any length, to check a rope object before there is a config
_SOME_POSITIONS = 32768


def rope_override(options: BuildOptions) -> RopeOverride | None:
    """What makes the rope object that counts in place of that of a ``config.json``; None: its own counts.

    Raises:
        OptionsError: both options are given, or the text of ``--rope-scaling`` is no rope object.
    """
    text, factor = options.rope_scaling, options.yarn
    if text is not None and factor is not None:
        raise OptionsError("--yarn and --rope-scaling both say how positions are rotated; leave one out")
    if text is not None:
        rope = _parsed(text)
        return lambda config: rope
    if factor is None:
        return None

    def yarn(config: ModelConfig) -> Mapping[str, Any]:
        if config.longest.trained is None:
            raise BuildError(f"--yarn cannot stretch the {config.longest.tokens} tokens {config.longest.why}")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": config.longest.trained}

    return yarn


def rope_given(options: BuildOptions, checkpoint: Path) -> str | None:
    """The JSON text of the rope object that ``options`` put in place of the checkpoint's; None: its own counts."""
    override = rope_override(options)
    if override is None:
        return None
    config = ModelConfig.from_json(read_json(checkpoint / "config.json"))
    return json.dumps({"rope_theta": config.rope.theta} | dict(override(config)))


def _parsed(text: str) -> dict[str, Any]:
    """The rope object that ``--rope-scaling`` says."""
    example = 'expected an object such as {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}'
    try:
        rope = json.loads(text)
    except ValueError as error:
        raise OptionsError(f"--rope-scaling {text!r} is not JSON ({error}), {example}") from error
    if not isinstance(rope, dict):
        raise OptionsError(f"--rope-scaling is {text!r}, {example}")
    try:
        read_rope({"rope_scaling": rope}, 10000.0, _SOME_POSITIONS)
    except BuildError as error:
        raise OptionsError(f"--rope-scaling: {str(error).removeprefix('config.json: ')}") from error
    return rope
