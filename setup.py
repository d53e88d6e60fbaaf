"""Compiles the operator library when the package is built or installed; everything else is in pyproject.toml.

A wheel is for this machine alone, unless the option --plat-name of bdist_wheel names a platform: manylinux_2_28_aarch64
makes one for any Linux on ARM with glibc 2.28 or later. The Makefile's ``dist`` does that.
"""

import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from qwen_engine.errors import EngineError
from qwen_plugin import LIBRARY_NAME
from qwen_plugin.compile import SOURCES, Target, compile_library, is_current


class BuildLibrary(build_ext):
    """A plain shared library instead of a Python extension module."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1], LIBRARY_NAME))

    def build_extension(self, ext):
        library, in_place = Path(self.get_ext_fullpath(ext.name)), SOURCES.parent / LIBRARY_NAME
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        tag = wheel.plat_name if wheel and wheel.plat_name_supplied else None
        if tag is None and not self.force and is_current(in_place):
            library.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(in_place, library)
            return
        try:
            compile_library(library, target=None if tag is None else Target.of_wheel(tag))
        except EngineError as error:
            raise SystemExit(f"Error: {error}") from None


class PlatformWheel(bdist_wheel):
    """For one platform, but any Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "qwen_plugin." + LIBRARY_NAME.split(".")[0],
            sources=[str(path.relative_to(Path(__file__).parent)) for path in sorted(SOURCES.rglob("*.cc"))],
            depends=[str(path.relative_to(Path(__file__).parent)) for path in sorted(SOURCES.rglob("*.h"))],
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
