"""Whether a program is still what it was: its graph, and every bit of its weights and of its table."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

from torch import Tensor

from dmqfx.errors import VerifyError
from dmqfx.graph.modules import label
from dmqfx.graph.program import Program
from dmqfx.numbers.packing import raw

__all__ = ["fingerprint", "refuse_changes", "tensors"]

Fingerprint = Mapping[str, object]
"""A number or text for each part of a program, by what people call the part."""


def fingerprint(program: Program) -> Fingerprint:
    """What changes if a graph, a weight or an entry of the table is edited in place, by whatever means.

    Reads every weight once: about a second for a gigabyte.
    """
    labels = tuple(label(node) for node in program.graph.nodes)
    graph = (str(program.graph), program.gm.code, labels)
    return {"its graph": graph} | {name: _checksum(tensor) for name, tensor in tensors(program)}


def refuse_changes(program: Program, before: Fingerprint, step: str) -> None:
    """Refuse a pass that changed the program that it was given.

    Raises: VerifyError naming what it changed.
    """
    now = fingerprint(program)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise VerifyError(
            f"changed the program that it was given ({changed[0]}{more}); work on a fork, through a Rewriter",
            step=step,
            mend="weights are shared with the model that was captured: load that anew",
        )


def tensors(program: Program) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a program has: the weights by name, those of the table by site and field."""
    yield from program.weights().items()
    for site, entry in program.table:
        yield from _within(f"{type(entry).__name__} of {site}", entry)


def _within(name: str, entry: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an entry, at any depth (Codes have QParams)."""
    if isinstance(entry, Tensor):
        yield name, entry
    elif is_dataclass(entry):
        for each in fields(entry):
            yield from _within(f"{name}, {each.name}", getattr(entry, each.name))


def _checksum(tensor: Tensor) -> int:
    """Of every bit: a sum would not see two channels that change places."""
    return zlib.crc32(raw(tensor).numpy())
