"""What a policy says about one tensor: float, or bits and the rest, part of it left to the default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Final, Literal

from dmqfx.numbers.quant import Grid, Per, RangeMethod
from dmqfx.policy.mark import Mark

__all__ = ["BUILT_IN", "FLOAT", "Default", "PartialSpec", "Setting"]

FLOAT: Final = "float"


@dataclass(frozen=True)
class PartialSpec:
    """What a policy says about a tensor; None is unsaid.

    Units: bits 2..8 for weights, 4..8 for inputs; groups is a number of equal parts of the training
    timesteps, or the ascending boundaries between them.
    """

    bits: int | None = None
    grid: Grid | None = None
    per: Per | None = None
    range: RangeMethod | None = None
    groups: int | tuple[float, ...] | None = None
    mark: Mark = field(default=Mark(), compare=False, repr=False)

    def over(self, other: PartialSpec) -> PartialSpec:
        """This spec, with what it leaves unsaid taken from another."""
        said = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(other, **said)

    def boundaries(self, train_timesteps: int) -> tuple[float, ...]:
        """The timesteps at which the next group begins after; () is the static case.

        Example:
            >>> PartialSpec(groups=4).boundaries(1000)
            (250.0, 500.0, 750.0)
        """
        if isinstance(self.groups, tuple):
            return self.groups
        parts = self.groups or 1
        return tuple(train_timesteps * part / parts for part in range(1, parts))


Setting = PartialSpec | Literal["float"]

BUILT_IN: Final[Mapping[str, PartialSpec]] = MappingProxyType(
    {
        "weight": PartialSpec(grid="symmetric", per="channel", range="minmax", groups=1),
        "input": PartialSpec(grid="affine", per="tensor", range="minmax", groups=1),
    }
)
"""What holds where neither a rule nor the default says anything; bits have no such value."""


@dataclass(frozen=True)
class Default:
    """What holds for convolutions and linear layers that no rule touches."""

    weight: Setting
    input: Setting

    def complete(self, arg: str, setting: Setting) -> Setting:
        """A rule's setting for `weight` or `input`, completed from the default and then from BUILT_IN."""
        if setting == FLOAT:
            return FLOAT
        mine = self.weight if arg == "weight" else self.input
        base = BUILT_IN[arg] if mine == FLOAT else mine.over(BUILT_IN[arg])
        return setting.over(base)
