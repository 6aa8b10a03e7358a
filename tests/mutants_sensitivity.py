"""Planted bugs in what is measured of the layers' outputs."""

from __future__ import annotations

from dataclasses import replace

from planting import Mutant, planted, with_entry

from dmqfx.graph.table import Sensitivity

AT = "up.0.conv1/conv2d"


def of_the_input(entry: Sensitivity) -> Sensitivity:
    """The metric of fewer channels than the layer has."""
    assert entry.metric is not None
    return replace(entry, metric=entry.metric[:-1, :-1].contiguous())


def turned(entry: Sensitivity) -> Sensitivity:
    """Rows of the metric that have lost their columns."""
    assert entry.metric is not None
    return replace(entry, metric=entry.metric.roll(1, 0))


def gradient_not_squared(entry: Sensitivity) -> Sensitivity:
    return replace(entry, weight=entry.weight - entry.weight.mean())


MUTANTS: tuple[Mutant, ...] = (
    *planted(
        "measure-sensitivity",
        {
            "the metric is that of fewer channels": (with_entry(f"{AT}:out", Sensitivity, of_the_input), AT),
            "the metric's rows are those of the next channel": (
                with_entry(f"{AT}:out", Sensitivity, turned),
                AT,
            ),
            "weights are signed": (with_entry(f"{AT}:out", Sensitivity, gradient_not_squared), AT),
        },
        policy="shifts",
    ),
)
