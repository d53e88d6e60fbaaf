"""A scripted engine in place of one under engines/."""

import warnings

import pytest

from cases.scripted import scripted_model, shout, write_text_files
from qwen_run.text.text_model import TextModel


@pytest.fixture
def script(tmp_path, monkeypatch):
    """An engine under engines/ whose answers are the questions in capitals; its requests are in ``.seen``."""
    monkeypatch.chdir(tmp_path)
    directory = write_text_files(tmp_path / "engines" / "tiny", do_sample=True, temperature=0.7, top_k=20)
    (directory / "engine.json").write_text("{}")
    model, script = scripted_model(directory, shout, max_seq_len=300)
    raw_model, _ = scripted_model(directory, str.upper, raw=True)
    script.loaded, script.warning = [], None

    def load(engine, threads=None, raw=False, cache_bytes=None, max_seq_len=None, pipeline_parallel_size=None):
        script.loaded.append((str(engine), threads, raw, cache_bytes, max_seq_len, pipeline_parallel_size))
        if script.warning:
            warnings.warn(script.warning, stacklevel=1)
        return raw_model if raw else model

    monkeypatch.setattr(TextModel, "load", load)
    return script
