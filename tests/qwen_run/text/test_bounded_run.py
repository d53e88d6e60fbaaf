"""Templates that hang or fill memory: an error that names the file, within seconds, and no process is left."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from cases.scripted import write_text_files
from qwen_engine.errors import EngineError
from qwen_run.text.bounded_run import BoundsError, run_bounded
from qwen_run.text.chat_template import ChatTemplate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are limited on Linux only")

HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'a' * 3000000000 }}",
    "a long number": "{{ 2 ** (2 ** 40) }}",
    "a wide text": "{{ 'a'|center(3000000000) }}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "calls without end": "{% macro m(n) %}{{ m(n - 1) if n }}{{ m(n - 1) if n }}{% endmacro %}{{ m(90) }}",
}


@pytest.mark.parametrize("name", list(HOSTILE))
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_hostile_template_is_refused_and_its_file_named(
    tmp_path: Path, name: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_run.text.bounded_run.CPU_S", 1)
    write_text_files(tmp_path)
    if file == "chat_template.jinja":
        (tmp_path / file).write_text(HOSTILE[name], "utf-8")
    else:
        (tmp_path / file).write_text(json.dumps({"chat_template": HOSTILE[name]}), "utf-8")
    with pytest.raises(EngineError, match=rf"/{file}: to write two short messages the chat template takes more than"):
        ChatTemplate.load(tmp_path)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_what_a_function_returns_or_that_it_raises() -> None:
    assert run_bounded(lambda: "text ä \ud800") == "text ä \ud800"
    assert run_bounded(lambda: "") == ""
    assert run_bounded(lambda: str(1 / 0)) is None
    assert len(run_bounded(lambda: "x" * 1000_000) or "") == 1_000_000
    with pytest.raises(BoundsError, match="of text"):
        run_bounded(lambda: "x" * 2_000_000)
