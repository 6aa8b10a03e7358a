"""The distinct convolutions and linear layers of SD1.5 at 512 x 512: native kernels beside torch, batch 1.

python benchmarks/bench_layers.py [--repeats 5] [--rounds 1] [--least 0.2] [--processor-time] [--avx2] [--uniform]

All ways of one layer are timed in one turn, one after the other, and a turn is repeated: `ratio` is the median over turns
of float32's time over the kernel's. float32 has the better of the two memory layouts; torch's own int8 is oneDNN's and
fbgemm's linear and convolution where this torch still has them. Those of fbgemm give codes, and so do the kernels' ways of
that name; all others give real numbers. Codes of images lie channels last for all, as quantize leaves them and as both int8
libraries are fastest. The kernels are called as a UNet that runs again calls them, without Python, but for the way that says
so; the others by one call of torch. Memory of large results is kept between calls, for all ways. `peak_gops` is the rate of
the innermost instructions on data in the first cache, times the threads, measured in the same run, and `of_peak` a layer's
share of it; `summary` tells of all layers together. Weight codes are normally distributed, as spread as those of the bundled
model: bounds of 16 bit sums on AVX2 follow from them, and with --uniform W4A8 takes longer. With --avx2 all compute as on a
machine without AVX-512 and VNNI. On one that runs other programs too, --processor-time counts what one thread really got.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from layers_summary import summary
from machine import held_to_avx2, write
from models import sd15
from torch import Tensor, nn
from torch.nn import functional as F

from dmqfx.runtime.kernels import layers, weights
from dmqfx.runtime.kernels.coded import Coded
from dmqfx.runtime.kernels.native import Layer, Library, library, taped
from dmqfx.runtime.replay import Row

Way = Callable[[], object]
Clock = Callable[[], float]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SPREAD = 0.41  # of half the range: 4 bit codes of the bundled model deviate by 3.28 from 0; of 8 bits taken as alike
FORMATS = {"W4A6": (4, 6), "W4A8": (4, 8), "W8A8": (8, 8)}


@dataclass(frozen=True)
class Shape:
    """One layer: input [1, C, H, W] and weight [O, C, h, w], or rows [1, N, K] and [O, K]."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: int = 1

    @property
    def is_conv(self) -> bool:
        return len(self.w) == 4

    @property
    def macs(self) -> int:
        positions = self.x[1] if not self.is_conv else self.x[2] * self.x[3] // self.stride**2
        return positions * torch.Size(self.w).numel()

    def __str__(self) -> str:
        if self.is_conv:
            return (
                f"conv{self.w[2]}x{self.w[3]}/{self.stride} {self.w[1]}->{self.w[0]} @{self.x[2]}x{self.x[3]}"
            )
        return f"linear {self.x[1]}x{self.w[1]}->{self.w[0]}"


def shapes() -> Counter[Shape]:
    """Every distinct layer of a call at batch 1, and how often it occurs; nothing is computed."""
    found: Counter[Shape] = Counter()

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = tuple(given[0].shape)
        if isinstance(module, nn.Conv2d):
            found[Shape(x, tuple(module.weight.shape), module.stride[0])] += 1
        elif isinstance(module, nn.Linear):
            found[Shape((1, torch.Size(x[:-1]).numel(), x[-1]), tuple(module.weight.shape))] += 1

    with torch.device("meta"):
        unet = sd15()
        for module in unet.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_pre_hook(note)
        unet(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))
    return found


def float32(shape: Shape) -> dict[str, Way]:
    """torch in float32, in both layouts."""
    x, w, bias = torch.randn(shape.x), torch.randn(shape.w), torch.randn(shape.w[0])
    if not shape.is_conv:
        return {"float32": lambda: F.linear(x, w, bias)}
    pad = shape.w[2] // 2
    last = x.contiguous(memory_format=torch.channels_last), w.contiguous(memory_format=torch.channels_last)
    return {
        "float32": lambda: F.conv2d(x, w, bias, shape.stride, pad),
        "float32 channels last": lambda: F.conv2d(*last, bias, shape.stride, pad),
    }


def weight_codes(size: Sequence[int], bits: int, spread: float | None) -> Tensor:
    """Codes of a standard deviation of so much of half their range, or any codes as often as others."""
    half = 2 ** (bits - 1)
    if spread is None:
        return torch.randint(-half, half, tuple(size), dtype=torch.int8)
    return (torch.randn(tuple(size)) * (spread * half)).round_().clamp_(-half, half - 1).to(torch.int8)


def native(
    shape: Shape,
    bits: tuple[int, int],
    found: Library,
    instruction_set: str,
    spread: float | None,
    *,
    gives_codes: bool = False,
    from_python: bool = False,
) -> Way:
    """The kernel on codes, real numbers out, or codes of them: the call alone, as `runtime.replay` repeats it."""
    weight_bits, activation_bits = bits
    x = _last(torch.randint(2**activation_bits, shape.x, dtype=torch.uint8))
    w = weight_codes(shape.w, weight_bits, spread)
    blob, zero_point = weights.pack(w, 1), torch.full((1, 1), 2 ** (activation_bits - 1), dtype=torch.int32)
    head = (x, torch.rand(1, 1), zero_point, None, blob, shape.w, torch.rand(1, len(w)), torch.randn(len(w)))
    coded = Coded(torch.full((1, 1), 1e4), zero_point, 0, 2**activation_bits - 1) if gives_codes else None
    if shape.is_conv:
        tail = ([shape.stride] * 2, [shape.w[2] // 2] * 2, [1, 1], 1)
        python = partial(layers.conv2d, *head, *tail, instruction_set, coded=coded)
    else:
        python = partial(layers.linear, *head, instruction_set, coded=coded)
    if from_python:
        return python
    row = Row(replace(found, chosen=instruction_set))
    with taped() as row.calls:
        out = python()
    if any(isinstance(call, Layer) and call.raw for call in row.calls):
        raise SystemExit(f"{shape} is laid out anew in memory that is gone by now")
    return lambda kept=(python, out): row([])  # what the row points to


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def onednn(shape: Shape) -> Way | None:
    """What this torch has of oneDNN's int8, W8A8 with 7 bit activations, or None."""
    x, w = (
        _last(torch.randint(128, shape.x, dtype=torch.uint8)),
        torch.randint(-127, 128, shape.w).to(torch.int8),
    )
    scales, zeros, bias = torch.ones(len(w)), torch.zeros(len(w), dtype=torch.int64), torch.randn(len(w))
    try:
        if shape.is_conv:
            pads = [shape.w[2] // 2] * 2
            stride = [shape.stride] * 2
            packed = torch.ops.onednn.qconv_prepack(w, scales, 1.0, 3, stride, pads, [1, 1], 1, list(shape.x))
            tail = (
                packed,
                scales,
                zeros,
                bias,
                stride,
                pads,
                [1, 1],
                1,
                1.0,
                0,
                torch.float32,
                "none",
                [],
                "",
            )
            way: Way = lambda: torch.ops.onednn.qconv_pointwise(x, 1.0, 3, *tail)  # noqa: E731
        else:
            packed = torch.ops.onednn.qlinear_prepack(w, list(shape.x))
            tail = (packed, scales, zeros, bias, 1.0, 0, torch.float32, "none", [], "")
            way = lambda: torch.ops.onednn.qlinear_pointwise(x, 1.0, 3, *tail)  # noqa: E731
        way()
    except (AttributeError, RuntimeError, TypeError) as error:
        print(f"no oneDNN int8 for {shape}: {str(error).splitlines()[0][:100]}")
        return None
    return way


def fbgemm(shape: Shape) -> Way | None:
    """What this torch has of fbgemm's int8, W8A8 with 7 bit activations, or None."""
    x, w = (
        _last(torch.randint(128, shape.x, dtype=torch.uint8)),
        torch.randint(-127, 128, shape.w).to(torch.int8),
    )
    scales, zeros, bias = torch.ones(len(w)), torch.zeros(len(w), dtype=torch.int64), torch.randn(len(w))
    try:
        weight = torch._make_per_channel_quantized_tensor(w, scales, zeros, 0)
        if shape.is_conv:
            codes = torch._make_per_tensor_quantized_tensor(x, 1.0, 3)
            pads, stride = [shape.w[2] // 2] * 2, [shape.stride] * 2
            packed = torch.ops.quantized.conv2d_prepack(weight, bias, stride, pads, [1, 1], 1)
            way: Way = lambda: torch.ops.quantized.conv2d(codes, packed, 1e4, 3)  # noqa: E731
        else:
            codes = torch._make_per_tensor_quantized_tensor(x, 1.0, 3)
            packed = torch.ops.quantized.linear_prepack(weight, bias)
            way = lambda: torch.ops.quantized.linear(codes, packed, 1e4, 3)  # noqa: E731
        way()
    except (AttributeError, RuntimeError) as error:
        print(f"no fbgemm int8 for {shape}: {str(error).splitlines()[0][:100]}")
        return None
    return way


def timed(way: Way, least: float, clock: Clock) -> float:
    """Seconds of a call: the least of as many as fit the time."""
    best, spent = float("inf"), 0.0
    while spent < least:
        started = clock()
        way()
        took = clock() - started
        best, spent = min(best, took), spent + took
    return best


def measure(
    shape: Shape, found: Library, spread: float | None, repeats: int, least: float, clock: Clock
) -> list[dict[str, float]]:
    """One layer, every way: seconds, turn by turn."""
    ways = float32(shape)
    for name, bits in FORMATS.items():
        sets = [found.chosen] if found.chosen != found.instruction_sets[-1] else found.instruction_sets[1:]
        ways |= {f"{name} {each}": native(shape, bits, found, each, spread) for each in sets}
        ways[f"{name} {sets[-1]}, codes"] = native(shape, bits, found, sets[-1], spread, gives_codes=True)
    called = {"gives_codes": True, "from_python": True}
    ways[f"W4A6 {sets[-1]}, codes, from Python"] = native(
        shape, FORMATS["W4A6"], found, sets[-1], spread, **called
    )
    theirs = {"oneDNN int8": onednn(shape), "fbgemm int8": fbgemm(shape)}
    ways |= {name: way for name, way in theirs.items() if way is not None}
    for way in ways.values():
        way()
    return [{name: timed(way, least, clock) for name, way in ways.items()} for _ in range(repeats)]


def row(
    shape: Shape, turns: list[dict[str, float]], rates: Mapping[str, float], count: int
) -> dict[str, object]:
    """GOP/s of each way (two for a multiply-add), its paired ratio to float32, and its share of the peak."""
    floats = [min(t for name, t in turn.items() if name.startswith("float32")) for turn in turns]
    ways = {}
    for name in turns[0]:
        ratios = [f / turn[name] for f, turn in zip(floats, turns, strict=True)]
        rate = 2e-9 * shape.macs / min(turn[name] for turn in turns)
        ways[name] = {"gops": round(rate, 1), "ratio": round(statistics.median(ratios), 2)}
        if (peak := rates.get(name) or rates.get(name.rpartition(" ")[2])) is not None:
            ways[name]["of_peak"] = round(rate / peak, 3)
    return {"layer": str(shape), "megamacs": round(shape.macs / 1e6, 1), "ways": ways, "count": count}


def peaks(found: Library) -> dict[str, float]:
    """GOP/s of the innermost instructions, all threads."""
    count = torch.get_num_threads()
    every = {each: found.peak(each) for each in found.instruction_sets}
    if "avx2" in every:
        every["W8A8 avx2"] = found.peak("avx2", widening=True)
    return {name: round(2 * rate * count, 1) for name, rate in every.items()}


def keep_memory() -> None:
    """Have the C library keep the memory of large results: otherwise the system makes it anew, and zero, at every call."""
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def main() -> None:
    """Measure, write results/layers_sd15.json, or layers_sd15_avx2.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of a layer, one behind the other")
    parser.add_argument(
        "--rounds", type=int, default=1, help="of all layers: a shared machine's speed changes by the minute"
    )
    parser.add_argument("--least", type=float, default=0.2, metavar="SECONDS", help="for each way in a turn")
    parser.add_argument(
        "--first", type=int, default=None, metavar="N", help="only the N layers with most work"
    )
    parser.add_argument("--processor-time", action="store_true", help="of one thread")
    parser.add_argument("--avx2", action="store_true", help="as on a machine without AVX-512 and VNNI")
    parser.add_argument(
        "--uniform",
        action="store_true",
        help="every weight code as often as any other",
    )
    options = parser.parse_args()
    if options.avx2:
        held_to_avx2()
    keep_memory()
    if "fbgemm" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "fbgemm"
    warnings.filterwarnings("ignore", ".*quantized tensor creation.*")
    if options.processor_time:
        torch.set_num_threads(1)
    clock = time.process_time if options.processor_time else time.perf_counter
    found = library()
    if found is None:
        raise SystemExit("there are no native kernels to measure")
    counted = sorted(shapes().items(), key=lambda each: -each[0].macs * each[1])[: options.first]
    rates = peaks(found)
    spread, turns = None if options.uniform else SPREAD, dict[Shape, list[dict[str, float]]]()
    for _ in range(options.rounds):
        for shape, _ in counted:
            with torch.no_grad():
                turns.setdefault(shape, []).extend(
                    measure(shape, found, spread, options.repeats, options.least, clock)
                )
        rates = {name: max(rate, rates[name]) for name, rate in peaks(found).items()}  # one may be disturbed
    rows = [row(shape, turns[shape], rates, count) for shape, count in counted]
    what = (__doc__ or "").partition("\n")[0]
    told = {
        "what": what,
        "clock": clock.__name__,
        "weights": f"normal, of deviation {spread} of half the range" if spread else "uniform",
        "peak_gops": rates,
        "summary": summary(rows),
        "layers": rows,
    }
    write("layers_sd15" + "_avx2" * options.avx2, told)


if __name__ == "__main__":
    main()
