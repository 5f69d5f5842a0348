"""Builds mergetune._C with CMake and ninja, in seconds and against no torch. All metadata is in pyproject.toml.

Environment: MERGETUNE_CUDA=0 leaves the CUDA kernels out, 1 demands them; by default they are built if nvcc is found.
MERGETUNE_CUDA_ARCHS="80;90" names the compute capabilities.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


def tool(name: str) -> str:
    """The program `name`: on PATH in pip's build environment, else beside Python (an environment not activated)."""
    beside_python = Path(sys.executable).with_name(name)
    found = shutil.which(name) or (str(beside_python) if beside_python.exists() else None)
    if not found:
        raise RuntimeError(f"{name} is needed to build mergetune, and is neither on PATH nor beside {sys.executable}")
    return found


class CMakeBuild(build_ext):
    """Hands the one extension to CMake."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        source = Path(__file__).resolve().parent
        digest_of_sources = runpy.run_path(str(source / "mergetune/facts/source_tree.py"))["digest_of_sources"]
        settings = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "MERGETUNE_VERSION": self.distribution.get_version(),
            "MERGETUNE_SOURCES": digest_of_sources(source),
            "MERGETUNE_CUDA": os.environ.get("MERGETUNE_CUDA", "auto"),
            "MERGETUNE_CUDA_ARCHS": os.environ.get("MERGETUNE_CUDA_ARCHS", ""),
        }
        flags = [f"-D{name}={value}" for name, value in settings.items()]
        cmake = tool("cmake")
        subprocess.run([cmake, "-G", "Ninja", "-S", str(source), "-B", str(build), *flags], check=True)
        subprocess.run([cmake, "--build", str(build), "--target", "_C"], check=True)


setup(
    packages=[*find_packages(include=["mergetune", "mergetune.*"]), "mergetune.kernels"],
    # A top-level package called kernels would collide with others': the folder is installed inside mergetune.
    package_dir={"mergetune.kernels": "kernels"},
    package_data={"mergetune": ["assets/**", "py.typed", "_C.pyi"]},
    include_package_data=False,
    ext_modules=[Extension("mergetune._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
