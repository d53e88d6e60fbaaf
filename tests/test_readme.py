"""The README's Python examples, run as they stand on the demo's engine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
ENGINE = "engines/SmolLM2-135M-Instruct-int4"


@pytest.fixture(scope="module")
def demo(tmp_path_factory, build_engine):
    """A directory in which ``qwen-build`` was run."""
    pytest.importorskip("gguf")
    from qwen_build.checkpoint.locate import resolve_checkpoint
    from qwen_engine.errors import BuildError

    try:
        checkpoint = resolve_checkpoint(None).path
    except BuildError as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("readme")
    shutil.copytree(build_engine(checkpoint), directory / ENGINE)
    return directory


def test_there_are_examples():
    assert [next(name for name in ("AsyncLLM", "QwenForCausalLM", "LLM") if name in text) for text in EXAMPLES] == [
        "LLM",
        "AsyncLLM",
        "QwenForCausalLM",
    ]
    assert all(ENGINE in text for text in EXAMPLES)


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_an_example_runs(demo, monkeypatch, capsys, index):
    monkeypatch.chdir(demo)
    exec(compile(EXAMPLES[index], f"README example {index}", "exec"), {"__name__": "__main__"})
    assert "Paris" in capsys.readouterr().out
