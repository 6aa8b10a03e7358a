"""Builds the library of integer kernels: plain C++17, no torch, each file with the flags of its instruction set.

Without a compiler the package is installed all the same, and its layers run in plain torch.
"""

from __future__ import annotations

import os
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = "dmqfx/runtime/kernels"
X86 = platform.machine().lower() in ("x86_64", "amd64")
SOURCES = {
    "dispatch.cpp": [],
    "scalar.cpp": [],
    "avx2.cpp": ["-mavx2"] if X86 else [],
    "avx512vnni.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vnni"] if X86 else [],
}
FLAGS = "-std=c++17 -O3 -fPIC -ffp-contract=off -fvisibility=hidden -Wall -Wextra -Wno-ignored-attributes".split()


class BuildKernels(build_ext):
    """A shared library that is no Python module: one file for every interpreter."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        more = os.environ.get("DMQFX_CXXFLAGS", "").split()
        try:
            objects, threads = self._objects([*more, "-fopenmp"]), ["-fopenmp"]
        except CompileError:
            self.warn("this compiler has no OpenMP: the kernels will run on one thread")
            objects, threads = self._objects(more), []
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(
            objects, target, extra_postargs=[*more, *threads], target_lang="c++"
        )

    def _objects(self, more: list[str]) -> list[str]:
        return [
            made
            for source, flags in SOURCES.items()
            for made in self.compiler.compile(
                [f"{HERE}/{source}"],
                output_dir=self.build_temp,
                extra_postargs=[*FLAGS, *flags, *more],
            )
        ]


setup(
    ext_modules=[
        Extension(
            "dmqfx.runtime.kernels.libdmqfx",
            sources=[f"{HERE}/{source}" for source in SOURCES],
            depends=[f"{HERE}/{header}" for header in ("layer.h", "sets.h", "tile.h")],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
