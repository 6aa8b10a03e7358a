"""Several processes at one calibration, as torchrun starts them: each has a share of the rows, and all end with one result.

Everything here is a no-op in a process that is alone, or has no torch.distributed process group.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dmqfx.errors import CalibrationError, ProcessError

__all__ = [
    "agreed",
    "count",
    "from_first",
    "gathered",
    "is_first",
    "same",
    "share",
    "summed",
    "together",
    "torchrun",
]

_WELL, _FAILED = 0, 1
_PATIENCE = timedelta(hours=12)
"""For a process that computes longer than the others; one that has died is noticed at once."""


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def share(total: int, what: str) -> range:
    """Which of so many things in a row this process does; together the processes do each once, in order of rank.

    Raises: CalibrationError in every process if there is not one for each.
    """
    if total < count():
        raise CalibrationError(
            f"{count()} processes cannot share {total} {what}\n"
            "  mend: start fewer processes, or record more calibration rows"
        )
    return range(total * rank() // count(), total * (rank() + 1) // count())


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, bit for bit and in order of rank.

    Shapes: x [n, ...], where n may differ between processes; returns [sum of n, ...].
    Raises: ProcessError if another process failed.
    """
    if count() == 1:
        return x
    _check(_WELL)
    sizes = [int(size) for size in _all(torch.tensor([len(x)]))]
    raw = x.new_zeros((max(sizes), *x.shape[1:]))
    raw[: len(x)] = x
    parts = _all(raw.reshape(-1).view(torch.uint8))
    found = [part.view(x.dtype).view(raw.shape)[:size] for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(found).to(x.device)


def summed(x: Tensor) -> Tensor:
    """The sum over all processes, the same in each of them.

    Raises: ProcessError if another process failed.
    """
    if count() == 1:
        return x
    _check(_WELL)
    return _summed(x)


def agreed(number: float) -> float:
    """The first process's number.

    Raises: ProcessError if another process failed.
    """
    return float(gathered(torch.tensor([number], dtype=torch.float64))[0])


def from_first(raw: bytes) -> bytes:
    """The first process's bytes; what the others give is not looked at.

    Raises: ProcessError if another process failed.
    """
    if count() == 1:
        return raw
    empty = torch.empty(0, dtype=torch.uint8)
    own = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if is_first() and raw else empty
    return gathered(own).numpy().tobytes()


def same(what: str, digest: str) -> None:
    """Make sure that all processes have the same of something, given a digest of it.

    Raises: CalibrationError in every process if they have not.
    """
    own = torch.tensor(list(hashlib.sha256(digest.encode()).digest()), dtype=torch.uint8)
    every = gathered(own[None])
    if others := (every != every[0]).any(1).nonzero().flatten().tolist():
        raise CalibrationError(
            f"process {others[0]} does not have the {what} of process 0\n"
            "  mend: start all of them alike, with the same calibration folder, on machines of one kind"
        )


@contextmanager
def together() -> Iterator[None]:
    """What all processes do side by side. An error in one of them is an error in all: none waits for it in vain.

    Raises: ProcessError in the others.
    """
    try:
        yield
    except ProcessError:
        raise
    except BaseException:
        if count() > 1:
            _told_of_failure()
        raise
    if count() > 1:
        _check(_WELL)


@contextmanager
def torchrun() -> Iterator[None]:
    """A process group for the block, if torchrun started this process and there is none: gloo for CPU, NCCL for GPU."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield
        return
    dist.init_process_group(timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _told_of_failure() -> None:
    try:
        _check(_FAILED)
    except ProcessError:
        """The others know, or are gone; this process raises what it failed of."""


def _check(state: int) -> None:
    """Say how this process is doing, and hear of the others.

    Raises: ProcessError if one of them failed.
    """
    states = [int(each) for each in _all(torch.tensor([state]))]
    if _FAILED in states:
        raise ProcessError(
            f"process {states.index(_FAILED)} of {count()} failed; what it says is the reason of this one's end"
        )


def _all(x: Tensor) -> list[Tensor]:
    """A tensor of one shape from every process."""
    sent = x.contiguous().to(_carrier(x))
    found = [torch.empty_like(sent) for _ in range(count())]
    try:
        dist.all_gather(found, sent)
        return [each.cpu() if sent.dtype == torch.int64 else each for each in found]
    except RuntimeError as error:
        raise _lost(error) from error


def _summed(x: Tensor) -> Tensor:
    sent = x.detach().clone().to(_carrier(x))
    try:
        dist.all_reduce(sent)
    except RuntimeError as error:
        raise _lost(error) from error
    return sent.to(x.device)


def _carrier(x: Tensor) -> torch.device:
    """Where the process group can take a tensor from: where it is, or else the one place that it serves."""
    served = dist.get_backend_config()
    if f"{x.device.type}:" in served:
        return x.device
    return torch.device("cuda", torch.cuda.current_device()) if "cuda:" in served else torch.device("cpu")


def _lost(error: RuntimeError) -> ProcessError:
    return ProcessError(f"process {rank()} of {count()} lost another one: {str(error).splitlines()[0]}")
