"""Which of a pass's applications is at fault: found by giving the pass less and less fuel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Culprit", "find_culprit"]


@dataclass(frozen=True)
class Culprit:
    """The number of the first application (from 1) after which the program is wrong; the runs that took.

    Number 0: the program is wrong before any application, so the pass changes what it does not journal.
    """

    number: int
    runs: int


def find_culprit(wrong_after: Callable[[int], bool], count: int) -> Culprit:
    """Bisect the fuel: fuel n applies the first n of the `count` applications that are wrong together.

    Example:
        >>> find_culprit(lambda fuel: fuel >= 21, 33)
        Culprit(number=21, runs=6)
    """
    right, wrong, runs = 0, count, 1
    if count == 0 or wrong_after(0):
        return Culprit(0, runs)
    while wrong - right > 1:
        middle = (right + wrong) // 2
        runs += 1
        if wrong_after(middle):
            wrong = middle
        else:
            right = middle
    return Culprit(wrong, runs)
