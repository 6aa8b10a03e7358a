"""What native attention brings: `quantize-attention`'s kernel and the float one beside torch's, shape by shape.

    python benchmarks/bench_attention.py
    python benchmarks/bench_attention.py --avx2

The second command holds both to AVX2, where 7 bits for queries and softmax are faster than 8. Both compute on one
thread from what linear layers make, [B, T, heads * d], rounding included; times are the least processor time of many
calls. Errors are relative to float64 on normal random numbers: of the kernel, whose codes have scales of their own for each
row of Q, head of K and channel of V, and of codes with one scale for a tensor and a fixed step of 1/255 for the softmax.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from machine import held_to_avx2, write
from torch import Tensor
from torch.nn import functional as F

from dmqfx.runtime.kernels.attend import attend, average
from dmqfx.runtime.kernels.native import library

SHAPES = {
    "SD1.5, 64 x 64": (2, 4096, 4096, 8, 40),
    "SD1.5, 32 x 32": (2, 1024, 1024, 8, 80),
    "SD1.5, 16 x 16": (2, 256, 256, 8, 160),
    "SD1.5, 8 x 8": (2, 64, 64, 8, 160),
    "SD1.5, 64 x 64, context": (2, 4096, 77, 8, 40),
    "SD1.5, 32 x 32, context": (2, 1024, 77, 8, 80),
    "SD1.5, 16 x 16, context": (2, 256, 77, 8, 160),
    "SD1.5, 8 x 8, context": (2, 64, 77, 8, 160),
    "emoji, 8 x 8": (32, 64, 64, 4, 24),
    "emoji, 8 x 8, context": (32, 64, 8, 4, 24),
    "emoji, 4 x 4": (32, 16, 16, 4, 32),
}
"""Batch, queries, keys, heads, channels of a head."""
BITS = (8, 7)

Inputs = tuple[Tensor, Tensor, Tensor]


def by_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def by_torch(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """As a UNet calls it."""
    found = F.scaled_dot_product_attention(*(by_heads(each, heads) for each in (q, k, v)))
    return found.transpose(1, 2).reshape(q.shape)


def by_averages(q: Tensor, k: Tensor, v: Tensor, heads: int, instruction_set: str) -> Tensor:
    """As a compiled UNet calls it over few keys, in float."""
    found = average(*(by_heads(each, heads) for each in (q, k, v)), None, instruction_set)
    return found.transpose(1, 2).reshape(q.shape)


def by_codes(q: Tensor, k: Tensor, v: Tensor, heads: int, bits: int, instruction_set: str) -> Tensor:
    """As a compiled UNet calls it."""
    found = attend(*(by_heads(each, heads) for each in (q, k, v)), None, bits, instruction_set)
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


def row(shape: tuple[int, int, int, int, int], instruction_set: str) -> dict[str, object]:
    """Milliseconds and errors of one shape."""
    inputs, heads = drawn(shape), shape[3]
    coded = {f"{bits} bits": partial(by_codes, bits=bits, instruction_set=instruction_set) for bits in BITS}
    spent = {"float32, torch": milliseconds(partial(by_torch, *inputs, heads))}
    spent["float32, native"] = milliseconds(partial(by_averages, *inputs, heads, instruction_set))
    spent |= {name: milliseconds(partial(call, *inputs, heads)) for name, call in coded.items()}
    errors = {}
    for deviation in (1.0, 3.0):
        small = tuple(each[:1] for each in drawn(shape, deviation))
        exact = by_torch(*(each.double() for each in small), heads)
        found = {name: error(call(*small, heads), exact) for name, call in coded.items()}
        fixed = {"fixed steps": error(by_fixed_steps(*small, heads), exact)}
        errors[f"logits of deviation {deviation:g}"] = found | fixed
    return {
        "batch, queries, keys, heads, width": shape,
        "milliseconds": {name: round(each, 3) for name, each in spent.items()},
        "times as fast": {name: round(spent["float32, torch"] / each, 2) for name, each in spent.items()},
        "relative_l2_errors": errors,
    }


@torch.no_grad()
def main() -> None:
    """Measure, write results/attention.json, or attention_avx2.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--avx2", action="store_true", help="as on a machine without AVX-512 and VNNI")
    given = parser.parse_args()
    if given.avx2:
        held_to_avx2()
    native = library()
    if native is None:
        raise SystemExit("there are no native kernels to measure")
    torch.set_num_threads(1)
    result = {
        "what": f"attention of UNets on one thread, {native.chosen}",
        "torch": torch.backends.cpu.get_cpu_capability(),
        "shapes": {name: row(shape, native.chosen) for name, shape in SHAPES.items()},
    }
    write("attention" + "_avx2" * given.avx2, result)


if __name__ == "__main__":
    main()
