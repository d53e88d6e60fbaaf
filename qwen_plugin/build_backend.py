"""setuptools as the build backend, which also asks for the ziglang wheel where there is no C++ compiler."""

from setuptools import build_meta  # type: ignore[import-untyped]
from setuptools.build_meta import *  # type: ignore[import-untyped]  # noqa: F403

from qwen_plugin.compile import find_compiler


def get_requires_for_build_wheel(config_settings=None):  # type: ignore[no-untyped-def]
    return _with_compiler(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):  # type: ignore[no-untyped-def]
    return _with_compiler(build_meta.get_requires_for_build_editable(config_settings))


def _with_compiler(requirements: list[str]) -> list[str]:
    return [*requirements, *([] if find_compiler() else ["ziglang>=0.13"])]
