"""The bar of a sweep, as it is seen on a terminal."""

from __future__ import annotations

import re

import pytest

from dmqfx.graph.address import Site
from dmqfx.sweep.progress import Progress

SECONDS = [5.0, *[1.0] * 7]


def test_every_turn_is_seen_with_its_layer_the_time_left_and_the_loss_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Short turns behind a long one, too."""
    with Progress("round-weights", SECONDS, shown=True) as bar:
        for k in range(len(SECONDS)):
            bar.begin(Site.parse(f"conv{k}/conv2d:input"))
            bar.end(None if k == 3 else 0.1 * (k + 1))
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    for k in range(len(SECONDS)):
        own = [line for line in lines if f"{k + 1}/8 conv{k}/conv2d" in line]
        assert all(re.search(r"round-weights: +\d+%.*\d\d:\d\d<", line) for line in own)
        told = f", loss before {0.1 * k:.2g}"
        assert any(told in line for line in own) is (k not in (0, 4))
    assert any(line.startswith("round-weights: 100%") for line in lines)


def test_a_bar_that_is_not_shown_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("round-weights", SECONDS, shown=False) as bar:
        bar.begin(Site.parse("conv/conv2d:input"))
        bar.end(0.5)
    assert capsys.readouterr().err == ""
