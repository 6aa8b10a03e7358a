"""What a sweep's result depends on, in digests: equal keys, equal results."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

import dmqfx
from dmqfx.calibration.calibration import Calibration
from dmqfx.graph.program import Program
from dmqfx.graph.table import Table
from dmqfx.storage.codec import Json, dump, encode
from dmqfx.storage.graphfile import write_graph
from dmqfx.storage.provenance import PACKAGES, fingerprint

__all__ = ["key_of", "of_table"]


def key_of(
    program: Program, data: Calibration | None, passes: Sequence[object], settings: Mapping[str, object]
) -> dict[str, str]:
    """Digests by what they are of, in words that fit "the run had other ...".

    The number of threads is left out: on another number of cores a run goes on, though sums may then differ
    in their last digits.
    """
    columns = {} if data is None else data.columns()
    return {
        "graph": _digest(dump(write_graph(program))),
        "weights": fingerprint(program.weights()),
        "plan": of_table(program.table),
        "calibration rows": fingerprint(columns),
        "passes": ", ".join(map(repr, passes)),
        "settings": ", ".join(f"{name} {value}" for name, value in settings.items()),
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "code": _of_code(passes),
    }


def of_table(table: Table) -> str:
    """A digest of all entries, bit for bit."""

    def tag(value: object) -> Json:
        return {"tensor": fingerprint({"": value})} if isinstance(value, Tensor) else None

    return _digest(dump({"table": [[str(site), encode(entry, tag)] for site, entry in table]}))


def _of_code(passes: Sequence[object]) -> str:
    """Of this package and of where the passes are written: numbers depend on both, whatever a version says."""
    modules = (sys.modules[type(step).__module__].__file__ for step in passes)
    files = {*Path(dmqfx.__file__).parent.rglob("*.py"), *(Path(file) for file in modules if file)}
    return _digest("".join(f"{file.name}\n{file.read_text(encoding='utf-8')}" for file in sorted(files)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
