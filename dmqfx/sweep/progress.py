"""The bar of a sweep: the layer, its loss, and the time left by what each turn is expected to take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tqdm import tqdm

from dmqfx.graph.address import Site
from dmqfx.numbers import speeds

__all__ = ["Progress"]

_FORMAT: Final = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Progress:
    """A bar over turns that take different times.

    Units: seconds by turn, as estimated.
    """

    def __init__(self, title: str, seconds: Sequence[float], *, shown: bool) -> None:
        self._seconds = [max(each, 1e-6) for each in seconds]
        self._number, self._before = 0, ""
        self._started = speeds.clock()
        # Turns are as many as there are layers: every one may be drawn, however long the ones before it took.
        self._bar = tqdm(
            total=sum(self._seconds), desc=title, bar_format=_FORMAT, smoothing=0, miniters=0, mininterval=0,
            disable=not shown,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return speeds.clock() - self._started

    def begin(self, site: Site) -> None:
        """A turn begins; the loss of the one before stays in sight."""
        self._bar.set_postfix_str(f"{self._number + 1}/{len(self._seconds)} {site.at}{self._before}")

    def end(self, loss: float | None) -> None:
        """The turn is over, with the loss that a pass reported."""
        self._before = "" if loss is None else f", loss before {loss:.2g}"
        self._bar.update(self._seconds[self._number])
        self._number += 1
