"""The journal: which rewrites a pass applied, which it refused and why, and how much fuel it had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from dmqfx.graph.address import Address, Site

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Application:
    """One rewrite that was made: where, by which rule, and what it did in words."""

    at: Address
    rule: str
    what: str = ""


@dataclass(frozen=True)
class Refusal:
    """One rewrite that was considered and not made, with its reason."""

    at: Address
    rule: str
    reason: str


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: the line in the log. The note says what it did in other ways than its options."""

    name: str
    preserves: str
    applied: tuple[Application, ...]
    refused: tuple[Refusal, ...]
    seconds: float
    drift: float | None = None
    note: str = ""

    def __str__(self) -> str:
        drift = "" if self.drift is None else f"  drift {self.drift:.1e}"
        counts = f"{len(self.applied):4d} applied  {len(self.refused):3d} refused"
        note = f"  {self.note}" if self.note else ""
        return f"{self.name:<18} {counts}  {self.seconds:6.1f} s{drift}{note}"


@dataclass
class Journal:
    """Collects applications and refusals while one pass runs; fuel bounds the number of applications."""

    fuel: int | None = None
    note: str = ""
    applied: list[Application] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    @property
    def exhausted(self) -> bool:
        """Whether the fuel is used up: no further application is allowed."""
        return self.fuel is not None and len(self.applied) >= self.fuel

    def apply(self, at: Address | Site, rule: str, what: str = "") -> bool:
        """Ask for one application; False means that the fuel is used up and nothing may be changed."""
        if self.exhausted:
            return False
        self.applied.append(Application(at.at if isinstance(at, Site) else at, rule, what))
        return True

    def refuse(self, at: Address | Site, rule: str, reason: str) -> None:
        """Record a refusal, once for each (address, rule, reason)."""
        refusal = Refusal(at.at if isinstance(at, Site) else at, rule, reason)
        if refusal not in self.refused:
            self.refused.append(refusal)

    def fuelled(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items while there is fuel."""
        for item in items:
            if self.exhausted:
                return
            yield item
