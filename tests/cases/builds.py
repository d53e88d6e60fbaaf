"""``qwen-build`` as it is typed, and changes of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from click.testing import CliRunner
from tokenizers import decoders, models

from qwen_build.checkpoint.safetensors_file import write_safetensors
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.cli import main


def run_build(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result, message: str, left: Path, exit_code: int = 1) -> None:
    """The command failed with one line that holds ``message``, and left nothing in the directory ``left``."""
    assert result.exit_code == exit_code, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not left.exists() or not list(left.iterdir())


def tiny_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def edit_config(checkpoint: Path, **changes: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(checkpoint: Path, edit) -> None:
    path = checkpoint / "model.safetensors"
    with Checkpoint.open(checkpoint) as weights:
        tensors = {name: weights.read(name) for name in weights.tensors}
    edit(tensors)
    write_safetensors(path, tensors, "float32")
