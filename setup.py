"""Builds the library of integer kernels: plain C++17, no torch, each file with the flags of its instruction set.

Without a compiler the package is installed all the same, and its layers run in plain torch.
"""

from __future__ import annotations

import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = "dmqfx/runtime/kernels"
X86 = platform.machine().lower() in ("x86_64", "amd64")
SOURCES = {
    "dispatch.cpp": [],
    "arrange.cpp": [],
    "pack.cpp": [],
    "scalar.cpp": [],
    "avx2.cpp": ["-mavx2"] if X86 else [],
    "avx512vnni.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vnni", "-Wno-maybe-uninitialized"] if X86 else [],
}
FLAGS = (
    "-std=c++17 -O3 -fPIC -ffp-contract=off -fno-trapping-math -fno-math-errno "
    "-fvisibility=hidden -Wall -Wextra -Wno-ignored-attributes"
).split()


class BuildKernels(build_ext):
    """A shared library that is no Python module: one file for every interpreter."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # a build that fails must leave no older one behind
        self._take_any_compiler()
        more = os.environ.get("DMQFX_CXXFLAGS", "").split()
        try:
            objects, threads = self._objects([*more, "-fopenmp"]), ["-fopenmp"]
        except CompileError:
            self.warn("this compiler has no OpenMP: the kernels will run on one thread")
            objects, threads = self._objects(more), []
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=[*more, *threads], target_lang="c++"
        )

    def _take_any_compiler(self) -> None:
        """Where the one that Python was built with is not there: the first of the usual ones that is."""
        there = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
        if there and not shutil.which(self.compiler.compiler_so[0]):
            self.compiler.set_executables(compiler_so=there[0], compiler_so_cxx=there[0])
        if there and not shutil.which(self.compiler.linker_so[0]):
            linker = f"{there[0]} -shared"
            self.compiler.set_executables(linker_so=linker, linker_so_cxx=linker, compiler_cxx=there[0])

    def _objects(self, more: list[str]) -> list[str]:
        """Each source with flags of its own, as many at a time as there are cores."""
        Path(self.build_temp, HERE).mkdir(parents=True, exist_ok=True)

        def compiled(source: str) -> list[str]:
            flags = [*FLAGS, *SOURCES[source], *more]
            return self.compiler.compile(
                [f"{HERE}/{source}"], output_dir=self.build_temp, extra_postargs=flags
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [made for found in pool.map(compiled, SOURCES) for made in found]


setup(
    ext_modules=[
        Extension(
            "dmqfx.runtime.kernels.libdmqfx",
            sources=[f"{HERE}/{source}" for source in SOURCES],
            depends=[f"{HERE}/{header}" for header in sorted(path.name for path in Path(HERE).glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
