"""What integer attention would bring: softmax(Q K^T) V with codes of 8 bits beside torch's float32 kernel.

    python benchmarks/bench_attention.py
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python benchmarks/bench_attention.py --set avx2

The kernels in `attention/`, which no target uses, are compiled with the C++ compiler. The second command holds torch to
AVX2 too, where the codes of queries and of the softmax have 7 bits. Both compute on one thread from what linear layers
make, [B, T, heads * d], rounding included; times are the least processor time of many calls. Errors are relative to
float64 on normal random numbers: of the kernel, whose codes have scales of their own for each row of Q, head of K and
channel of V, and of codes with one scale for a tensor and a fixed step of 1/255 for the softmax.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import write
from torch import Tensor
from torch.nn import functional as F

SOURCES = Path(__file__).with_name("attention")
FLAGS = "-std=c++17 -O3 -shared -fPIC".split()
SETS = {"avx512vnni": ("-mavx512f", "-mavx512bw", "-mavx512vnni"), "avx2": ("-mavx2", "-mfma")}
SHAPES = {
    "SD1.5, 64 x 64": (2, 4096, 4096, 8, 40),
    "SD1.5, 32 x 32": (2, 1024, 1024, 8, 80),
    "SD1.5, 16 x 16": (2, 256, 256, 8, 160),
    "SD1.5, 8 x 8": (2, 64, 64, 8, 160),
    "SD1.5, 64 x 64, context": (2, 4096, 77, 8, 40),
    "emoji, 8 x 8": (32, 64, 64, 4, 24),
    "emoji, 4 x 4": (32, 16, 16, 4, 32),
}
"""Batch, queries, keys, heads, channels of a head."""
CHUNK = 256  # keys whose codes are relative to one maximum

Inputs = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def built(instruction_set: str, folder: Path) -> Attention:
    """The kernel of an instruction set, compiled into a folder."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise SystemExit("no C++ compiler: install g++ or clang++")
    library = folder / "attend.so"
    source = SOURCES / f"attend_{instruction_set}.cpp"
    subprocess.run([compiler, *FLAGS, *SETS[instruction_set], "-o", library, source], check=True)
    run = ctypes.CDLL(str(library)).attend
    run.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 5
    run.argtypes += [ctypes.c_float, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        out, width = torch.empty_like(q), q.shape[2] // heads
        places = [each.data_ptr() for each in (q, k, v, out)]
        sizes = (q.shape[0], q.shape[1], k.shape[1], heads, width)
        if run(*places, *sizes, width**-0.5, CHUNK, 1, None) != 0:
            raise MemoryError
        return out

    return attend


def by_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def by_torch(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """As a UNet calls it."""
    found = F.scaled_dot_product_attention(*(by_heads(each, heads) for each in (q, k, v)))
    return found.transpose(1, 2).reshape(q.shape)


def by_fixed_steps(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """One scale for a tensor, and softmax codes of 1/255, in float64."""
    coded = []
    for each in (q, k, v):
        step = each.abs().max().double() / 127
        coded.append(by_heads((each.double() / step).round() * step, heads))
    softmax = torch.softmax(coded[0] @ coded[1].mT * (q.shape[2] // heads) ** -0.5, -1)
    return (((softmax * 255).round() / 255) @ coded[2]).transpose(1, 2).reshape(q.shape)


def drawn(shape: tuple[int, int, int, int, int], deviation: float = 1.0) -> Inputs:
    """Normal numbers whose logits have a deviation."""
    batch, queries, keys, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, n, heads * width, generator=generator) for n in (queries, keys, keys))
    return q * deviation, k, v


def milliseconds(call: Callable[[], object]) -> float:
    """The least processor time, of at least three calls and half a second."""
    call()
    least, started, calls = float("inf"), time.thread_time(), 0
    while calls < 3 or time.thread_time() - started < 0.5:
        before = time.thread_time()
        call()
        least, calls = min(least, time.thread_time() - before), calls + 1
    return 1e3 * least


def error(found: Tensor, exact: Tensor) -> float:
    return float(f"{(found.double() - exact).norm() / exact.norm():.2e}")


@torch.no_grad()
def main() -> None:
    """Measure, write results/attention.json, or attention_avx2.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=list(SETS), default="avx512vnni", help="instructions of the kernel")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        attend = built(given.set, Path(folder))
        for name, shape in SHAPES.items():
            inputs, heads = drawn(shape), shape[3]
            ours, torchs = (milliseconds(partial(each, *inputs, heads)) for each in (attend, by_torch))
            errors = {}
            for deviation in (1.0, 3.0):
                small = tuple(each[:1] for each in drawn(shape, deviation))
                exact = by_torch(*(each.double() for each in small), heads)
                errors[f"logits of deviation {deviation:g}"] = {
                    "kernel": error(attend(*small, heads), exact),
                    "fixed steps": error(by_fixed_steps(*small, heads), exact),
                }
            rows[name] = {
                "batch, queries, keys, heads, width": shape,
                "milliseconds": {"float32, torch": round(torchs, 3), "8 bit codes": round(ours, 3)},
                "times as fast": round(torchs / ours, 2),
                "relative_l2_errors": errors,
            }
    result = {
        "what": f"attention of UNets on one thread, {given.set}",
        "torch": torch.backends.cpu.get_cpu_capability(),
        "shapes": rows,
    }
    write("attention" if given.set == "avx512vnni" else f"attention_{given.set}", result)


if __name__ == "__main__":
    main()
