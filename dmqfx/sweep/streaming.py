"""Batches one after the other, with words about the time: how long all will take, and how long they took."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor

from dmqfx.numbers import speeds
from dmqfx.sweep.chunks import Chunk
from dmqfx.sweep.estimate import duration, tell

__all__ = ["streamed"]

_Batch = TypeVar("_Batch", Chunk, Mapping[str, Tensor])
_log = logging.getLogger(__name__)


def streamed(batches: Iterable[_Batch], total: int, what: str) -> Iterator[_Batch]:
    """The batches, `total` rows in all; when the first is done with, what they will take is told from it."""
    started, expected = speeds.clock(), 0.0
    for batch in batches:
        yield batch
        if not expected:
            expected = (speeds.clock() - started) * total / _rows(batch)
            _log.info("%s: %d rows, about %s", what, total, duration(expected))
    tell(what, speeds.clock() - started, expected)


def _rows(batch: Chunk | Mapping[str, Tensor]) -> int:
    return len(batch.timestep if isinstance(batch, Chunk) else batch["timestep"])
