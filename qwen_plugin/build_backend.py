"""setuptools as the build backend, which also asks for the ziglang wheel where that compiles the operators."""

from setuptools import build_meta  # type: ignore[import-untyped]
from setuptools.build_meta import *  # type: ignore[import-untyped]  # noqa: F403

from qwen_plugin.compile import find_compiler


def get_requires_for_build_wheel(config_settings=None):  # type: ignore[no-untyped-def]
    """Of ``--build-option=--plat-name=...``, a wheel for another platform than this, too."""
    options = str((config_settings or {}).get("--build-option", ""))
    return _with_compiler(build_meta.get_requires_for_build_wheel(config_settings), "--plat-name" in options)


def get_requires_for_build_editable(config_settings=None):  # type: ignore[no-untyped-def]
    return _with_compiler(build_meta.get_requires_for_build_editable(config_settings))


def _with_compiler(requirements: list[str], is_for_other_platform: bool = False) -> list[str]:
    has_compiler = not is_for_other_platform and find_compiler() is not None
    return requirements if has_compiler else [*requirements, "ziglang>=0.13"]
