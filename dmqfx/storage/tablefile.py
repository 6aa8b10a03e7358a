"""What is known about a program as JSON and back: its facts, its table and its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dmqfx.errors import StoreError
from dmqfx.graph import facts
from dmqfx.graph.address import Site
from dmqfx.graph.facts import Fact
from dmqfx.graph.journal import PassRecord
from dmqfx.graph.program import Program
from dmqfx.graph.table import Range, Sensitivity, Table
from dmqfx.numbers.packing import raw
from dmqfx.storage.codec import Json, decode, encode

__all__ = ["read_table", "write_table"]


def write_table(program: Program, tensors: dict[str, Tensor]) -> dict[str, Json]:
    """Facts, table and log; tensors of entries are added to `tensors`, unless an equal one is there.

    Ranges and sensitivities are left out: what calibration saw is much larger than what came of it, which is
    in the graph.
    So are the fact that they are there, and the seconds that passes took: the same model gives the same file.

    Raises: StoreError for an entry of an unknown kind.
    """
    index: dict[tuple[torch.dtype, torch.Size], list[str]] = {}
    for name, tensor in tensors.items():
        index.setdefault((tensor.dtype, tensor.shape), []).append(name)

    def tag(value: object) -> Json:
        if not isinstance(value, Tensor):
            return None
        tensor = value.detach().cpu()
        alike = index.setdefault((tensor.dtype, tensor.shape), [])
        name = next((name for name in alike if _same_bits(tensors[name], tensor)), None)
        if name is None:
            name = f"table.{sum(map(len, index.values()))}"
            alike.append(name)
            tensors[name] = tensor
        return {"tensor": name}

    rows: list[Json] = [
        [str(site), encode(entry, tag)]
        for site, entry in program.table
        if not isinstance(entry, (Range, Sensitivity))
    ]
    return {
        "facts": [[fact.name, fact.meaning] for fact in sorted(program.facts - {facts.CALIBRATED}, key=str)],
        "table": rows,
        "log": [encode(replace(record, seconds=0.0)) for record in program.log],
    }


def read_table(program: Program, document: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> Program:
    """The program with a written table, facts and log.

    Raises: StoreError for whatever `write_table` does not write.
    """

    def read(word: str, content: Json) -> object:
        if word != "tensor" or content not in tensors:
            raise StoreError(f"there is no {word} {content!r}")
        return tensors[str(content)]

    pairs_of = (
        row if isinstance(row, list) and len(row) == 2 else ("", None) for row in _list(document, "table")
    )
    rows = ((Site.parse(str(site)), decode(entry, read)) for site, entry in pairs_of)
    table = Table.of_rows(rows)  # type: ignore[arg-type]  # entries are what was written
    log = [decode(record) for record in _list(document, "log")]
    if not all(isinstance(record, PassRecord) for record in log):
        raise StoreError("the log holds more than records of passes")
    known = {fact.name: fact for name in facts.__all__ if isinstance(fact := getattr(facts, name), Fact)}
    pairs = [pair for pair in _list(document, "facts") if isinstance(pair, list) and len(pair) == 2]
    held = frozenset(known.get(str(name), Fact(str(name), str(meaning))) for name, meaning in pairs)
    return replace(program, table=table, facts=held, log=tuple(r for r in log if isinstance(r, PassRecord)))


def _list(document: Mapping[str, Json], key: str) -> list[Json]:
    found = document.get(key)
    if not isinstance(found, list):
        raise StoreError(f"there is no list {key!r}")
    return found


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return torch.equal(raw(a), raw(b))
