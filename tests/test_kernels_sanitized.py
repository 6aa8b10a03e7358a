"""The kernels' own tests once more, on a library that watches every access and every undefined operation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
WATCHED = (
    "convolution or linear or overflow or padding or threads or malformed or strip or codes or magnitudes "
    "or attention or instruction_set or finite or block or few_channels or in_turns or added or folded or wide_heads "
    "or share_memory or input_channels or replayed or called_in_a_row or take_turns"
)
FILES = tuple(
    f"tests/test_{name}.py" for name in ("kernels", "codes", "attend", "average", "lower_float", "recording")
)

# A layer that says it is a little longer than its tensors are, so that no thread reads far away, and one whose zero points
# lie where no int32 may: the sanitizers must see them.
PROVOKE = """
import ctypes
import sys
import torch
from dmqfx.runtime.kernels import layers, weights
from dmqfx.runtime.kernels.native import library
w = torch.ones(16, 64, dtype=torch.int8)
packed, honest = weights.pack(w, 1), library().handle.dmqfx_run
def longer(layer, *more):
    layer._obj.width += 2
    layer._obj.out_width += 2
    return honest(layer, *more)
def askew(layer, *more):
    zero_points = (ctypes.c_char * 64)()
    layer._obj.zero_points = ctypes.addressof(zero_points) + 1
    return honest(layer, *more)
object.__setattr__(library(), "handle", type("H", (), {"dmqfx_run": staticmethod(globals()[sys.argv[1]])})())
zero, x = torch.zeros(1, 1), torch.ones(3, 64, dtype=torch.uint8)
layers.linear(x, None, zero, None, packed, (16, 64), zero, None)
"""


def sanitized(folder: Path) -> Path:
    """A library of the same sources with both sanitizers."""
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib")]
    done = subprocess.run(
        [*build, "--build-temp", str(folder / "temp")],
        cwd=ROOT, env={**os.environ, "DMQFX_CXXFLAGS": FLAGS}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    made = list(folder.glob("lib/**/libdmqfx.so"))
    assert len(made) == 1, done.stdout + done.stderr
    return made[0]


def run(library: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A Python in which the sanitizers were loaded before anything else."""
    named = ("libasan.so", "libubsan.so")
    preload = " ".join(
        subprocess.run(
            ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in named
    )
    options = {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    environment = {**os.environ, **options, "LD_PRELOAD": preload, "DMQFX_KERNELS": str(library)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_kernels_touch_nothing_that_is_not_theirs(tmp_path: Path) -> None:
    library = sanitized(tmp_path)
    done = run(library, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES, "-k", WATCHED)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 100
    for how, seen in (
        ("longer", "AddressSanitizer: heap-buffer-overflow"),
        ("askew", "load of misaligned address"),
    ):
        assert seen in run(library, "-c", PROVOKE, how).stderr, "the sanitizer does not watch"
