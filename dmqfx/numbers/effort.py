"""What local problems cost on this machine: their parts, timed as they are, put together by size."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dmqfx.numbers.fitting import Sample, search
from dmqfx.numbers.gptq import COLUMNS, ROW_BLOCKS, by_columns, elimination
from dmqfx.numbers.parts import part_sizes
from dmqfx.numbers.quant import QuantSpec, dequantize, params_from_range, quantize
from dmqfx.numbers.ranges import search_range
from dmqfx.numbers.rounding import Grid, damped
from dmqfx.numbers.scaledinput import grid_between
from dmqfx.numbers.speeds import Prepare, Speeds
from dmqfx.numbers.voting import step_errors

__all__ = [
    "fitted_range",
    "learned_codes",
    "learned_scale",
    "means",
    "nbytes",
    "product",
    "reconstruction",
    "rounding",
    "surrogate_scale",
    "votes",
    "weight_range",
]

_TALL = 1024
_LOOKS = 1.5  # `Reconstruction` centres its rows; before, they are rounded and made double
_OUTPUTS, _GRAMS, _WEIGHTS = (
    3,
    5,
    8,
)  # copies of what has the shape of the outputs, of the Gram, of the weight
_LEARNING_LOOKS = 2.0  # of the kind of `_centred`, in a step of `equivalent.learn`
_EXPECTING_LOOKS = 1.4  # of the kind of `_expected`, in `Scaling.expected` and its way back
_SPEC = QuantSpec(4, "symmetric", "channel", range="mse")


def product(speeds: Speeds, rows: float, columns: float, out: float) -> float:
    """Seconds of a double-precision product [columns, rows] @ [rows, out]."""
    narrow = max(1.0, min(columns, out))
    one = speeds.seconds(_gram, narrow, at=(8, 64, 384), exponent=2)
    return one * rows * columns * out / (_TALL * narrow**2)


def reconstruction(
    speeds: Speeds, rows: int, columns: int, out: int, *, metric: bool, taps: int = 1
) -> float:
    """Seconds of gptq's codes and of what makes its operands: the layer's inputs and outputs at `rows` positions."""
    looked = speeds.seconds(_centred, rows * columns, at=(2**12, 2**17, 2**22), exponent=1)
    sizes = part_sizes(columns, taps)
    solved = sum(_solution(speeds, rows, size, out, metric=metric) for size in sizes)
    if len(sizes) > 1:  # what lacks becomes each part's target, and is handed on
        solved += 2 * product(speeds, rows, columns, out) + _LOOKS * looked
        solved += sum(product(speeds, size, size, size) / 3 for size in sizes)
    return (
        _LOOKS * looked + product(speeds, rows, columns, out) + solved + weight_range(speeds, out * columns)
    )


def _solution(speeds: Speeds, rows: int, columns: int, out: int, *, metric: bool) -> float:
    """Seconds of a Gram and of handing errors on by it."""
    blocks = ROW_BLOCKS if metric else 1
    height = -(-out // blocks)
    stretch = speeds.seconds(_by_columns, height, at=(4, 32, 256), exponent=1)
    stepwise = blocks * (stretch * columns / COLUMNS + product(speeds, columns / 2, height, columns))
    handed = product(speeds, out / 2, out, columns) if metric else 0.0
    solved = _elimination_of(speeds, columns) + (_elimination_of(speeds, out) if metric else 0.0)
    return product(speeds, rows, columns, columns) + stepwise + handed + solved


def learned_codes(
    speeds: Speeds, steps: int, columns: int, out: int, *, metric: bool, taps: int = 1
) -> float:
    """Seconds of so many steps of `adaround`: what Adam and settling do with each weight, and a product with the
    Gram and one with the metric, where there is one, in single precision. What no cache holds takes twice as long.
    """
    if not steps:
        return 0.0
    sizes = part_sizes(columns, taps)
    moved = speeds.seconds(_settling, out * columns, at=(2**10, 2**15, 2**20, 2**23), exponent=1)
    return steps * (moved + sum(product(speeds, out, size, size + metric * out) for size in sizes) / 2)


def nbytes(rows: int, columns: int, out: int, taps: int = 1) -> int:
    """The most that a local problem computes with: its inputs as deployed, and a part's operands in double precision."""
    widest = max(part_sizes(columns, taps))
    operands = rows * widest + _OUTPUTS * rows * out + _GRAMS * widest**2 + _WEIGHTS * out * widest
    return 4 * rows * columns + 8 * operands + 8 * out * columns


def learned_scale(speeds: Speeds, steps: int, batch: int, columns: int, out: int) -> float:
    """Seconds of so many steps of `equivalent.learn`: a batch and the weight are rounded, forward and back."""
    looked = speeds.seconds(_centred, (batch + out) * columns, at=(2**12, 2**17, 2**22), exponent=1)
    return steps * (_LEARNING_LOOKS * looked + 3 * product(speeds, batch, columns, out))


def surrogate_scale(speeds: Speeds, looks: int, rows: int, columns: int, out: int, *, taps: int = 1) -> float:
    """Seconds of so many looks at the expected error of a scale, with gradients, and of the outputs that it is seen in."""
    seen = product(speeds, rows, columns + out, out) / 2  # in single precision
    looked = speeds.seconds(_expected, out * columns / taps, at=(2**12, 2**17, 2**22), exponent=1)
    return seen + _EXPECTING_LOOKS * looks * looked


def weight_range(speeds: Speeds, size: int) -> float:
    """Seconds of `search_range` over a weight of so many numbers."""
    return speeds.seconds(_searched, size, at=(2**8, 2**13, 2**17), exponent=1)


def fitted_range(speeds: Speeds, size: int, groups: int) -> float:
    """Seconds of `search` over so many sampled numbers, in so many timestep groups."""
    counted = speeds.seconds(_histogram, size, at=(2**10, 2**16, 2**22), exponent=1)
    return counted + groups * speeds.seconds(_range_search, 1, at=(1,), exponent=0)


def rounding(speeds: Speeds, size: float) -> float:
    """Seconds of rounding so many numbers to codes and back."""
    return speeds.seconds(_rounded, size, at=(2**12, 2**17, 2**22), exponent=1)


def means(speeds: Speeds, size: float) -> float:
    """Seconds of the means of rows of so many numbers in all, in double precision."""
    return speeds.seconds(_averaged, size, at=(2**12, 2**17, 2**22), exponent=1)


def votes(speeds: Speeds, size: float, largest: int) -> float:
    """Seconds of `step_errors` over so many numbers, for steps down to 1/2^largest."""
    return speeds.seconds(_voting(largest), size, at=(2**12, 2**20), exponent=1)


def _elimination_of(speeds: Speeds, size: int) -> float:
    return speeds.seconds(_elimination, size, at=(16, 128, 512, 1024), exponent=3)


def _noise(*shape: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device)


def _gram(size: int, device: torch.device) -> Callable[[], object]:
    x = _noise(_TALL, size, device=device)
    return lambda: x.T @ x


def _centred(size: int, device: torch.device) -> Callable[[], object]:
    x = _noise(64, size // 64, device=device, dtype=torch.float32)
    mean, share = x[0].double(), x[:, :1].double()
    return lambda: (x.double() - mean) * share


def _rounded(size: int, device: torch.device) -> Callable[[], object]:
    x = _noise(size // 64, 64, device=device, dtype=torch.float32)
    params = params_from_range(x.amin().view(1, 1), x.amax().view(1, 1), QuantSpec(8), 1)
    scale, zero_point, ends = params.scale, params.zero_point, (params.qmin, params.qmax)
    return lambda: dequantize(quantize(x, scale, zero_point, None, 1, *ends), scale, zero_point, None, 1)


def _averaged(size: int, device: torch.device) -> Callable[[], object]:
    x = _noise(4, size // 256, 64, device=device, dtype=torch.float32)
    return lambda: x.double().mean(1)


def _elimination(size: int, device: torch.device) -> Callable[[], object]:
    x = _noise(size, size, device=device)
    gram = damped(x.T @ x, 0.1)
    return lambda: elimination(gram)


def _by_columns(rows: int, device: torch.device) -> Callable[[], object]:
    target = _noise(rows, COLUMNS, device=device)
    factor = torch.eye(COLUMNS, dtype=torch.float64, device=device)
    grid = Grid.of(search_range(target, _SPEC), rows)
    return lambda: by_columns(target, factor, grid)


def _settling(size: int, device: torch.device) -> Callable[[], object]:
    alpha = _noise(size, device=device, dtype=torch.float32)
    adam = torch.optim.Adam([alpha], foreach=False)

    def step() -> None:
        sigmoid = torch.sigmoid(alpha)
        side = 2 * sigmoid - 1
        alpha.grad = side.sign() * side.abs().pow(7.5) * sigmoid * (1 - sigmoid)
        adam.step()

    return step


def _expected(size: int, device: torch.device) -> Callable[[], object]:
    """As `Scaling.expected`: steps of a weight from its extremes times a scale, and the way back."""
    high = _noise(64, size // 64, device=device, dtype=torch.float32).abs()
    low, logarithm = -high, torch.zeros(size // 64, device=device, requires_grad=True)
    adam = torch.optim.Adam([logarithm])

    def step() -> None:
        with torch.enable_grad():
            gamma = logarithm.exp()
            ends = (
                (low * gamma).clamp(max=0).amin(1, keepdim=True),
                (high * gamma).clamp(min=0).amax(1, keepdim=True),
            )
            steps, _ = grid_between(*ends, _SPEC)
            (logarithm.grad,) = torch.autograd.grad(steps.square().sum() / gamma.square().sum(), [logarithm])
        adam.step()

    return step


def _searched(size: int, device: torch.device) -> Callable[[], object]:
    weight = _noise(math.isqrt(size), math.isqrt(size), device=device, dtype=torch.float32)
    return lambda: search_range(weight, _SPEC)


def _histogram(size: int, device: torch.device) -> Callable[[], object]:
    sample, ends = _sample(size, device)
    return lambda: sample.histogram(*ends)


def _range_search(size: int, device: torch.device) -> Callable[[], object]:
    sample, ends = _sample(64 * size, device)
    return lambda: search(ends, sample, QuantSpec(8))


def _sample(size: int, device: torch.device) -> tuple[Sample, tuple[Tensor, Tensor]]:
    x = _noise(size // 64, 64, device=device, dtype=torch.float32)
    group = torch.zeros(len(x), dtype=torch.int64, device=device)
    return Sample(x, group, x.new_ones(64)), (x.amin().view(1), x.amax().view(1))


@cache
def _voting(largest: int) -> Prepare:
    def prepare(size: int, device: torch.device) -> Callable[[], object]:
        x = _noise(4, 16, size // 64, device=device, dtype=torch.float32)
        params = params_from_range(x.amin().view(1, 1), x.amax().view(1, 1), QuantSpec(8), 1)
        scale, zero_point = (each[0].expand(4) for each in (params.scale, params.zero_point))
        return lambda: step_errors(x, scale, zero_point, (params.qmin, params.qmax), 1, largest)

    return prepare
