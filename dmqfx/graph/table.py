"""The one home of what passes learn: an immutable, typed table from (site, kind of knowledge) to an entry."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from dmqfx.graph.address import Address, Site
from dmqfx.numbers.quant import QParams, QuantSpec, powers_of_two

__all__ = [
    "Bias",
    "ChannelScale",
    "Codes",
    "Entry",
    "LayerPair",
    "Planned",
    "Range",
    "Sensitivity",
    "Shift",
    "SkipArm",
    "SkipConcat",
    "Table",
]


@dataclass(frozen=True)
class Planned:
    """What the policy asks of a site: a spec, or None for float, and the name of the rule that decided."""

    spec: QuantSpec | None
    rule: str


@dataclass(frozen=True, eq=False)
class Range:
    """What calibration saw at a site, per timestep group and channel.

    Shapes: low, high [G, C] with C channels on `axis`; mean, variance [G, C] over all other dims; count [G] values
    per channel (0 = no row fell in the group, whose numbers were then taken from the nearest group that has rows).
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    variance: Tensor
    count: Tensor
    axis: int
    boundaries: tuple[float, ...] = ()


@dataclass(frozen=True)
class SkipConcat:
    """A decoder concatenation of the upward path and a long skip.

    Units: `deep` and `skip` are channel counts, in the order of the concat when `skip_last`. `deep_variance` and
    `skip_variance` are the variance over channels of the per-channel absolute maximum, divided by its squared mean;
    nan until calibration has been seen. `uneven` is told and drawn; no pass goes by it.
    """

    deep: int
    skip: int
    skip_last: bool = True
    deep_variance: float = float("nan")
    skip_variance: float = float("nan")
    uneven: bool = False


@dataclass(frozen=True)
class SkipArm:
    """The input of a convolution that reads one arm of what was a long skip's concatenation.

    `concat` names the concatenation; it may be gone, if nothing else read it. `uneven` is what flag-skips said.
    """

    arm: Literal["deep", "skip"]
    concat: Address
    uneven: bool = False


@dataclass(frozen=True)
class LayerPair:
    """Layers that read one tensor and therefore share one equivalent scale, and who could absorb it.

    `readers` are the input sites that share the scale; `producer` is the site (an operation's argument, e.g. a group
    norm's weight) into which 1/gamma can be folded exactly, or None with the `reason` why not.
    """

    readers: tuple[Site, ...]
    producer: Address | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class ChannelScale:
    """Equivalent scale of an input site: x / gamma goes in, W * gamma takes it back.

    Shapes: gamma [C], positive. Source: DMQ eq. for LES (gamma here, tau in the paper); SmoothQuant eq. 4.
    """

    gamma: Tensor


@dataclass(frozen=True, eq=False)
class Shift:
    """Power-of-two scaling of an input site: channel c has the step scale * 2^(exponent[g, c] - largest).

    So a channel with the largest exponent has the site's own step, and no channel a coarser one. In the graph
    the finest step, scale / 2^largest, is the scale, and an integer is shifted to the left by the exponent.

    Shapes: exponent uint8 [G, C], 0..largest, for the site's QParams [G, 1] and C channels.
    Source: DMQ, channel-wise power-of-two scaling (the published code's steps; the text has no fallback that is safe).
    """

    exponent: Tensor
    largest: int

    @property
    def factor(self) -> Tensor:
        """What the site's step is multiplied by, exactly: 1, 1/2, 1/4, ... in float32 [G, C]."""
        return powers_of_two(self.exponent).float().div(2**self.largest)


@dataclass(frozen=True, eq=False)
class Bias:
    """The bias of a layer that makes up for what quantization adds to its output's mean.

    Shapes: value [O].
    """

    value: Tensor


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How much the UNet's output feels an error e of a layer's output: the expectation of e' metric e.

    `metric` is None for layers too wide for one. `weight` is the layer's share by timestep group, 1 in the mean.

    Shapes: weight [G]; metric [O, O], positive semidefinite.
    """

    weight: Tensor
    metric: Tensor | None
    boundaries: tuple[float, ...] = ()

    def of(self, timestep: Tensor) -> Tensor:
        """The weight of each timestep's group.

        Shapes: timestep, result [N].
        """
        edges = torch.tensor(self.boundaries, device=timestep.device)
        return self.weight.to(timestep.device)[torch.bucketize(timestep.to(edges), edges, right=True)]


@dataclass(frozen=True, eq=False)
class Codes:
    """Integer codes of a weight and their meaning.

    `nearest` says that each is the one next to its weight, `adjacent` that it is one of the two beside it.

    Shapes: packed uint8 [ceil(numel * width / 8)] (width 4 for <= 4 bits, else 8); qparams.scale [1, O].
    """

    packed: Tensor
    shape: tuple[int, ...]
    qparams: QParams
    nearest: bool = True
    adjacent: bool = False


Entry: TypeAlias = (
    Planned
    | Range
    | SkipConcat
    | SkipArm
    | LayerPair
    | ChannelScale
    | Shift
    | Bias
    | Sensitivity
    | Codes
    | QParams
)
_Kind = TypeVar(
    "_Kind",
    Planned,
    Range,
    SkipConcat,
    SkipArm,
    LayerPair,
    ChannelScale,
    Shift,
    Bias,
    Sensitivity,
    Codes,
    QParams,
)


@dataclass(frozen=True, eq=False)
class Table:
    """Immutable map (Site, kind) -> entry; `put` and `drop` return new tables that share the entries.

    Example:
        >>> site = Site.parse("conv_in/conv2d:weight")
        >>> table = Table().put(site, Planned(None, "ends"))
        >>> table.get(site, Planned).rule, Table().get(site, Planned)
        ('ends', None)
    """

    _rows: Mapping[tuple[type, Site], Entry] = field(default_factory=lambda: MappingProxyType({}))

    @staticmethod
    def of_rows(rows: Iterable[tuple[Site, Entry]]) -> Table:
        """A table of many entries; of two of a kind at one site the last."""
        return Table(MappingProxyType({(type(entry), site): entry for site, entry in rows}))

    def get(self, site: Site, kind: type[_Kind]) -> _Kind | None:
        """The entry of this kind at the site, or None."""
        entry = self._rows.get((kind, site))
        return entry if isinstance(entry, kind) else None

    def of(self, kind: type[_Kind]) -> dict[Site, _Kind]:
        """All entries of a kind, in the order in which they were first put."""
        return {site: e for (k, site), e in self._rows.items() if k is kind and isinstance(e, kind)}

    def put(self, site: Site, entry: Entry) -> Table:
        """This table with one more (or one replaced) entry."""
        return Table(MappingProxyType({**self._rows, (type(entry), site): entry}))

    def put_all(self, entries: Mapping[Site, Entry]) -> Table:
        """This table with many entries added or replaced."""
        more = {(type(entry), site): entry for site, entry in entries.items()}
        return Table(MappingProxyType({**self._rows, **more}))

    def drop(self, site: Site, kind: type) -> Table:
        """This table without one entry, as a pass wants it that takes an operation or a decision away."""
        return Table(MappingProxyType({key: e for key, e in self._rows.items() if key != (kind, site)}))

    def drop_all(self, kind: type) -> Table:
        """This table without any entry of a kind."""
        return Table(MappingProxyType({key: e for key, e in self._rows.items() if key[0] is not kind}))

    def restricted(self, there: Collection[Address]) -> Table:
        """This table without the entries of operations that are not among these."""
        return Table(MappingProxyType({key: e for key, e in self._rows.items() if key[1].at in there}))

    def sites(self) -> list[Site]:
        """Every site that has an entry of any kind, once each."""
        return list(dict.fromkeys(site for _, site in self._rows))

    def at(self, site: Site) -> tuple[Entry, ...]:
        """All entries of one site."""
        return tuple(e for (_, s), e in self._rows.items() if s == site)

    def __iter__(self) -> Iterator[tuple[Site, Entry]]:
        return ((site, entry) for (_, site), entry in self._rows.items())

    def __len__(self) -> int:
        return len(self._rows)
