"""A budget of time: who gets how much of it, and how many rows and iterations that has room for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Final, TypeVar

from dmqfx.graph.pipeline import Pass
from dmqfx.numbers import speeds

__all__ = ["Budget", "bytes_of", "fitting", "scaled", "seconds_of"]

FACTORS: Final = (4.0, 2.0, 1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""What a policy's own numbers may be multiplied by; more than 1 for iterations alone."""
OVERNIGHT: Final = 8 * 3600.0
_UNITS: Final = {"s": 1.0, "min": 60.0, "h": 3600.0}
_SIZES: Final = {"MB": 2**20, "GB": 2**30}
_Step = TypeVar("_Step")


def seconds_of(budget: str | float) -> float:
    """A budget in seconds: a number of seconds, or words such as 90s, 5min, 1.5h, overnight.

    Raises: ValueError for other words, or nothing.
    Example:
        >>> seconds_of("5min"), seconds_of("1.5h"), seconds_of("overnight"), seconds_of(90)
        (300.0, 5400.0, 28800.0, 90.0)
    """
    if budget == "overnight":
        return OVERNIGHT
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", str(budget).replace(" ", ""))
    seconds = float(found[1]) * _UNITS[found[2]] if found else budget
    if isinstance(seconds, str) or not 0 < seconds < float("inf"):
        raise ValueError(f"a budget is a time such as 90s, 5min, 1h or overnight, not {budget!r}")
    return float(seconds)


def bytes_of(memory: str | int) -> int:
    """A memory budget in bytes: a number of bytes, or words such as 800MB, 6GB, 1.5 GB.

    Raises: ValueError for other words, or nothing.
    Example:
        >>> bytes_of("6GB") == 6 * 2**30, bytes_of("512 MB") == 2**29, bytes_of(4096)
        (True, True, 4096)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB)", str(memory).replace(" ", ""))
    size = int(min(float(found[1]) * _SIZES[found[2]], 2.0**63)) if found else memory
    if not isinstance(size, int) or not 1 <= size < 2**63:
        raise ValueError(f"a memory budget is a size such as 800MB or 6GB, not {memory!r}")
    return size


@dataclass(eq=False)
class Budget:
    """Time for all that looks at calibration rows: passes get equal shares, and share what those before them left over.

    It is used up as passes run, like the fuel of a journal: a context with one is for one run of a pipeline.

    Units: seconds of the whole, counted since `begun`; `share` is what those have that run now, in seconds; `coming`
    counts the passes that have had none yet.
    """

    seconds: float
    coming: int = 1
    begun: float = field(default_factory=lambda: speeds.clock())
    share: float = field(init=False)

    def __post_init__(self) -> None:
        self.share = self.seconds

    @staticmethod
    def over(seconds: float, steps: Iterable[Pass]) -> Budget:
        """One that begins now, for the passes of a pipeline."""
        return Budget(seconds, sum(map(_partakes, steps)))

    def allot(self, steps: Iterable[Pass]) -> None:
        """Give passes that run together their shares of what is left."""
        if own := sum(map(_partakes, steps)):
            left = max(0.0, self.seconds - (speeds.clock() - self.begun))
            self.share = left * own / max(own, self.coming)
            self.coming = max(0, self.coming - own)


def _partakes(step: Pass) -> bool:
    return step.needs_calibration and bool(_numbers(step))


def _numbers(step: object) -> frozenset[str]:
    """The fields of a pass that a budget multiplies."""
    assert is_dataclass(step)
    own = frozenset(field.name for field in fields(step)) & {"rows", "iterations"}
    return own & getattr(step, "budgeted", own)


def scaled(step: _Step, factor: float) -> _Step:
    """A pass with its `iterations` times a factor and its `rows` times what of it is below 1.

    A pass that more iterations do no good says so: `longest` is the most that they may be multiplied by.
    """
    factors = {"iterations": min(factor, getattr(step, "longest", factor)), "rows": min(1.0, factor)}
    own = _numbers(step)
    numbers = {name: (getattr(step, name), by) for name, by in factors.items() if name in own}
    changed = {name: max(min(1, number), round(number * by)) for name, (number, by) in numbers.items()}
    return replace(step, **changed) if changed else step  # type: ignore[type-var]  # what has fields is a dataclass


def fitting(seconds: Callable[[float], float], budget: float) -> float:
    """The greatest factor that a budget has room for, or the least that there is.

    Units: budget, and what `seconds` gives for a factor, in seconds.
    """
    return next((factor for factor in FACTORS if seconds(factor) <= budget), FACTORS[-1])
