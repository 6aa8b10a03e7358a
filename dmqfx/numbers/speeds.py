"""How long this machine takes for an operation: timed at a few sizes, a power law between and beyond them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch

__all__ = ["Prepare", "Speeds", "clock", "finish", "row_time"]

Prepare: TypeAlias = Callable[[int, torch.device], Callable[[], object]]
"""Makes the operands of an operation of some size; what it returns is what is timed."""

clock = time.perf_counter
_REPEATS, _ENOUGH = 3, 0.03  # the best of so many; one that took so many seconds is not repeated
_LONG, _FEW = (
    5.0,
    2,
)  # seconds in which building kernels is nothing; rows that stand for more where they take as long


class Speeds:
    """Times operations of this machine, each one once, when it is first asked for.

    Example:
        >>> speeds = Speeds(torch.device("cpu"))
        >>> def prepare(size, device):
        ...     x = torch.ones(size, device=device)
        ...     return lambda: x.exp()
        >>> one = speeds.seconds(prepare, 2**20, at=(2**10, 2**16), exponent=1)
        >>> abs(speeds.seconds(prepare, 2**21, at=(2**10, 2**16), exponent=1) / one - 2) < 1e-6
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._timed: dict[tuple[Prepare, int], float] = {}

    def seconds(self, prepare: Prepare, size: float, *, at: Sequence[int], exponent: float) -> float:
        """Seconds of an operation of some size, from those that it takes at the ascending sizes `at`.

        Between two of them the time is a power of the size; above the last it grows with the exponent; below
        the first it is the first's.
        """
        below, above = at[0], at[-1]
        if size >= above:
            return self._at(prepare, above) * math.pow(size / above, exponent)
        if size <= below:
            return self._at(prepare, below)
        k = next(k for k, end in enumerate(at) if size <= end)
        low, high = self._at(prepare, at[k - 1]), self._at(prepare, at[k])
        share = math.log(size / at[k - 1]) / math.log(at[k] / at[k - 1])
        return math.pow(low, 1 - share) * math.pow(high, share)

    def _at(self, prepare: Prepare, size: int) -> float:
        if (prepare, size) not in self._timed:
            self._timed[prepare, size] = self._best(prepare(size, self._device))
        return self._timed[prepare, size]

    def _best(self, run: Callable[[], object]) -> float:
        best = math.inf
        for _ in range(_REPEATS):
            started = clock()
            run()
            finish(self._device)
            best = min(best, max(clock() - started, 1e-9))
            if best > _ENOUGH:
                break
        return best


def finish(device: torch.device) -> None:
    """Wait for what was begun on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _second_time(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that work takes the second time: the first one builds kernels, which is little of what takes long."""
    took = 0.0
    for _ in range(2):
        started = clock()
        work()
        finish(device)
        took = clock() - started
        if took > _LONG:
            break
    return took


def row_time(device: torch.device, work: Callable[[int], object], rows: int) -> float:
    """Seconds of one of the rows that work is done on at a time; two stand for all where they take long."""
    few = min(_FEW, rows)
    took = _second_time(device, partial(work, few))
    if took < _LONG and few < rows:
        few, took = rows, _second_time(device, partial(work, rows))
    return took / few
