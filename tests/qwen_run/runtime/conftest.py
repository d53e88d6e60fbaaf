"""An engine of one small graph, and a copy to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cases.one_graph import write_graph, write_manifest
from qwen_engine.manifest import (
    GRAPH_FILE,
    LAYERS_GRAPH_FILE,
    WEIGHTS_FILE,
)


@pytest.fixture(scope="session")
def intact_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine")
    write_graph(directory / LAYERS_GRAPH_FILE, ["logits", "hidden", "cached"])
    (directory / WEIGHTS_FILE).unlink()  # saving the second graph appends to the file of the first
    write_graph(directory / GRAPH_FILE, ["logits"])
    write_manifest(directory)
    return directory


@pytest.fixture
def engine_directory(intact_engine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(intact_engine, tmp_path / "engine"))
