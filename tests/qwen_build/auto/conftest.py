"""A search that takes seconds."""

import pytest

from qwen_build.auto import knapsack
from qwen_build.auto import search as auto


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(auto, "_MEASURED", 1)
    monkeypatch.setattr(knapsack, "STEPS", 1 << 12)
