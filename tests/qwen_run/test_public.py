"""The names of ``qwen_run`` that programs use."""

from __future__ import annotations

import qwen_engine
import qwen_run
from qwen_engine import errors


def test_every_public_name_is_there() -> None:
    assert {name for name in qwen_run.__all__ if not hasattr(qwen_run, name)} == set()
    assert qwen_run.__version__ == qwen_engine.__version__


def test_every_error_can_be_caught_by_its_public_name() -> None:
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    tree = {name: value for name, value in classes.items() if value.__module__ == errors.__name__}
    assert {name: getattr(qwen_run, name) for name in tree} == tree
    assert tree.keys() <= set(qwen_run.__all__)
