"""Batches one after the other, with words about the time: how long all will take, and how long they took."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from dmqfx.numbers import speeds
from dmqfx.sweep.estimate import duration, tell

__all__ = ["streamed"]

_log = logging.getLogger(__name__)


def streamed(
    batches: Iterable[Mapping[str, Tensor]], total: int, what: str
) -> Iterator[Mapping[str, Tensor]]:
    """The batches, `total` rows in all; when the first is done with, what they will take is told from it."""
    started, expected = speeds.clock(), 0.0
    for batch in batches:
        yield batch
        if not expected:
            expected = (speeds.clock() - started) * total / len(batch["timestep"])
            _log.info("%s: %d rows, about %s", what, total, duration(expected))
    tell(what, speeds.clock() - started, expected)
