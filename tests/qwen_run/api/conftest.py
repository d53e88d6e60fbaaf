"""A scripted model, and a tiny engine."""

import pytest

from cases.scripted import scripted_model, write_text_files
from qwen_run.runtime.engine import Engine


def echo(prompt: str) -> str:
    return prompt.upper()


@pytest.fixture
def model(tmp_path):
    return scripted_model(write_text_files(tmp_path), echo, max_seq_len=400)[0]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint, build_engine):
    return Engine.load(build_engine(tiny_checkpoint("qwen3-tied").path, quant="none"), threads=1)
