"""Builds the optional C++ extension with CMake. Everything else is static metadata in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


class CMakeExtension(Extension):
    """An extension whose sources CMakeLists.txt knows. Optional: without a compiler the package still installs."""

    def __init__(self, name):
        super().__init__(name, sources=[], optional=True)


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        try:
            subprocess.run(
                [
                    "cmake",
                    "-S",
                    str(ROOT),
                    "-B",
                    str(build),
                    *generator,
                    f"-DPython_EXECUTABLE={sys.executable}",
                    f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
                ],
                check=True,
            )
            subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                f"maskd-kernels: the C++ kernels were not built ({error}). The package installs without them: "
                "CPU tensors then take the slower PyTorch reference. GPUs are not affected."
            ) from error
        shutil.copy2(build / target.name, target)


setup(ext_modules=[CMakeExtension("maskd_kernels._native")], cmdclass={"build_ext": CMakeBuild})
