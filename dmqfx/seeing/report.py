"""The report of a compilation: bits asked and got, who refused and why, how near the result is to float."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from dmqfx.errors import StoreError
from dmqfx.graph.address import Address
from dmqfx.seeing.selection import find

if TYPE_CHECKING:
    from dmqfx.calibration.calibration import Calibration
    from dmqfx.graph.program import Program
    from dmqfx.policy.policy import Expect

__all__ = ["LayerReport", "PassReport", "Refused", "Report", "SiteReport"]

SCHEMA: Final = "dmqfx.report/1"


@dataclass(frozen=True)
class SiteReport:
    """One tensor of a layer: bits asked and got (None is float), the rule that decided, and who refused.

    `notes` say which arm of a skip it is, and what shifts it has.
    """

    argument: str
    asked_bits: int | None
    got_bits: int | None
    asked: str = "float"
    rule: str = ""
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def as_asked(self) -> bool:
        """Whether the site got what the policy asked for."""
        return self.asked_bits == self.got_bits and not self.reasons


@dataclass(frozen=True)
class LayerReport:
    """One convolution, linear layer or attention.

    Units: sqnr_db of the layer's output against the same layer of the float program, each in its own network,
    so it holds what earlier layers lost; inf is bit-equal, None not measured; timestep_db the same at each
    measured timestep. Bytes of the layer's constants; macs per sample at the example sizes, and their share of all.
    """

    address: str
    sites: tuple[SiteReport, ...]
    sqnr_db: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    macs: int = 0
    macs_share: float = 0.0
    timestep_db: Mapping[float, float] = field(default_factory=dict)

    def site(self, argument: str) -> SiteReport | None:
        """The site of an argument, or None if the layer has no such one."""
        return next((site for site in self.sites if site.argument == argument), None)

    def got(self, argument: str) -> int | None:
        """The bits that an argument has; None for float, or no such argument."""
        site = self.site(argument)
        return site.got_bits if site is not None else None


@dataclass(frozen=True)
class Refused:
    """A rewrite that a pass considered and did not make."""

    address: str
    rule: str
    reason: str


@dataclass(frozen=True)
class PassReport:
    """What one pass did."""

    name: str
    preserves: str
    applied: int
    refused: tuple[Refused, ...]
    seconds: float
    drift: float | None = None


@dataclass(frozen=True)
class Report:
    """What was asked, what was got, and what it cost.

    Units: output_db holds for every measured timestep 10 log10(|y|^2 / |y - y_q|^2) over its rows, where y is
    the float UNet's output and y_q the quantized one's; empty where nothing was measured. Bytes are those of
    all constants.
    Example:
        >>> layer = LayerReport("conv_in/conv2d", (SiteReport("weight", 4, 4, "4 bit", "default"),))
        >>> report = Report("UNet2DModel", (layer,), {981.0: 12.5, 1.0: float("inf")}, 2, 4000, 1000, ())
        >>> print(report.summary())
        UNet2DModel: 4 kB -> 1 kB, 4x smaller
        bits    1 of 1 sites as asked
                only weights are quantized: memory only, no speed claim
        loss    output SQNR 12.5 dB in the mean of 2 timesteps, worst 12.5 dB at t = 981 (2 rows)
        >>> Report.from_json(report.to_json()) == report
        True
    """

    root: str
    layers: tuple[LayerReport, ...]
    output_db: Mapping[float, float]
    rows: int
    bytes_before: int
    bytes_after: int
    passes: tuple[PassReport, ...]

    @classmethod
    def measure(
        cls,
        before: Program,
        after: Program,
        calibration: Calibration | None,
        *,
        rows: int = 16,
        progress: bool = False,
    ) -> Report:
        """Compare a quantized program with the float program that it comes from.

        `before` is best the last program before the lossy pass: in an earlier one, a layer that has absorbed
        an equivalent scale since gives other numbers on purpose, and its SQNR is left out.

        Units: both run on `rows` rows spread over the timesteps, at least one for each; 0 measures nothing.
        """
        from dmqfx.seeing.measurement import measure  # it makes reports, so it comes later

        return measure(before, after, calibration, rows=rows, progress=progress)

    @property
    def mean_db(self) -> float | None:
        """The output's SQNR in dB, averaged over the timesteps; None where nothing was measured.

        Bit-equal timesteps are left out, unless all are: they would hide the others.
        """
        lossy = [db for db in self.output_db.values() if db != math.inf]
        if not lossy:
            return math.inf if self.output_db else None
        return sum(lossy) / len(lossy)

    @property
    def worst(self) -> tuple[float, float] | None:
        """(timestep, SQNR in dB) of the worst timestep; None where nothing was measured."""
        return min(self.output_db.items(), key=lambda each: badness(each[1]), default=None)

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """The sites of all layers."""
        return tuple(site for layer in self.layers for site in layer.sites)

    @property
    def asked(self) -> int:
        """How many sites were asked to be quantized, refused ones included."""
        return sum(1 for site in self.sites if site.asked_bits is not None or site.reasons)

    @property
    def got(self) -> int:
        """How many sites are quantized as asked."""
        return sum(1 for site in self.sites if site.asked_bits is not None and site.as_asked)

    @property
    def idle(self) -> str:
        """Why not one site is quantized, in words; "" if one is."""
        if any(site.got_bits is not None for site in self.sites):
            return ""
        if not self.asked:
            rules = ", ".join(dict.fromkeys(site.rule for site in self.sites if site.rule))
            kept = f" by {rules}" if rules else ""
            return (
                f"all {len(self.sites)} sites are kept float{kept}; say float in its default if that is meant"
            )
        reasons = (reason for site in self.sites for reason in site.reasons)
        return f"none of the {self.asked} sites got any: {next(reasons, 'no pass says why')}"

    @property
    def memory_only(self) -> bool:
        """Whether weights are quantized and nothing else is: smaller, and not faster."""
        return {site.argument for site in self.sites if site.got_bits is not None} == {"weight"}

    def layer(self, address: str) -> LayerReport:
        """The report of one layer.

        Raises: AddressError with the three nearest.
        """
        known = {Address.parse(layer.address): layer for layer in self.layers}
        return known[find(known, address)]

    def misses(self, expect: Expect) -> list[str]:
        """What is expected and not reached, in words."""
        if expect.sqnr_db is None:
            return []
        wanted = f"{expect.sqnr_db:g} dB are wanted"
        if self.mean_db is None:
            return [f"nothing was measured, and {wanted}"]
        reached = self.mean_db >= expect.sqnr_db
        return [] if reached else [f"the output has {self.mean_db:.1f} dB SQNR, {wanted}"]

    def summary(self) -> str:
        """Size, bits and loss, in a few lines."""
        from dmqfx.seeing.reporttable import summary  # knows Report, so it comes later

        return summary(self)

    def table(self, *, worst_first: bool = False, limit: int | None = None) -> str:
        """A line for each layer, in execution order or the worst SQNR first; refusals below it."""
        from dmqfx.seeing.reporttable import table

        return table(self, worst_first=worst_first, limit=limit)

    def to_data(self) -> dict[str, object]:
        """What to_json writes, as dicts and lists; inf and nan are words."""
        plain = {**asdict(self), "output_db": list(self.output_db.items())}
        return {"schema": SCHEMA} | {key: _spelled(value) for key, value in plain.items()}

    def to_json(self) -> str:
        """JSON with its version."""
        return json.dumps(self.to_data(), allow_nan=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Inverse of to_json.

        Raises: StoreError if the text is no report, or one of another version.
        """
        try:
            found = json.loads(text)
            if found.pop("schema", None) != SCHEMA:
                raise StoreError(f"this is no report that this version reads ({SCHEMA})")
            layers = tuple(_layer(each) for each in found.pop("layers"))
            passes = tuple(_pass(each) for each in found.pop("passes"))
            output = {float(time): float(db) for time, db in found.pop("output_db")}
            return cls(**found, layers=layers, passes=passes, output_db=output)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"this is not a whole report: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        from dmqfx.seeing.reporttable import refusals, timesteps

        parts = (self.summary(), timesteps(self), self.table(worst_first=True, limit=12), refusals(self))
        return "\n\n".join(part for part in parts if part)


def badness(db: float | None) -> float:
    """A sorting key: what is not finite is worst, what was not measured comes last."""
    if db is None:
        return math.inf
    return -math.inf if math.isnan(db) else db


def _layer(found: dict[str, Any]) -> LayerReport:
    sites = tuple(map(_site, found.pop("sites")))
    times = {float(time): float(db) for time, db in found.get("timestep_db", {}).items()}
    return LayerReport(
        **{**found, "sites": sites, "sqnr_db": _number(found["sqnr_db"]), "timestep_db": times}
    )


def _site(found: dict[str, Any]) -> SiteReport:
    words = {key: tuple(found.get(key, ())) for key in ("reasons", "notes")}
    return SiteReport(**{**found, **words})


def _pass(found: dict[str, Any]) -> PassReport:
    refused = tuple(Refused(**each) for each in found.pop("refused"))
    return PassReport(**{**found, "refused": refused, "drift": _number(found["drift"])})


def _number(value: float | str | None) -> float | None:
    return None if value is None else float(value)


def _spelled(value: object) -> object:
    """The same with inf and nan as words, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _spelled(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
