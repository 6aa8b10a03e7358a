"""A UNet whose activations reach 1e10, with channels five hundred times as large as others."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from models import Model, model

import dmqfx
from dmqfx.calibration.calibration import Calibration
from dmqfx.policy.policy import Policy
from dmqfx.runtime.unet import CompiledUNet

LARGEST, RATIO = 1e10, 500.0
LES = (("method", "les"), ("iterations", 20), ("rows", 512))
BEFORE = ("canonicalize", "flag-skips", "split-skips", "plan-sites")


@cache
def wild() -> Model:
    """What conv_in writes goes into a skip as it is; the last upward convolution reads it unnormed, small channels as
    attentively as large ones.
    """
    unet = deepcopy(model("plain"))
    drawn = torch.randn(2, unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    channels = len(unet.conv_in.weight)
    sizes = torch.logspace(0, torch.tensor(RATIO).log10(), channels)[
        torch.randperm(channels, generator=torch.Generator().manual_seed(1))
    ]
    with torch.no_grad():
        seen = unet.conv_in(drawn).abs().amax((0, 2, 3))
        factor = sizes / sizes.max() * LARGEST / seen
        unet.conv_in.weight *= factor.view(-1, 1, 1, 1)
        unet.conv_in.bias *= factor
        reader = unet.up_blocks[-1].resnets[-1].conv_shortcut
        reader.weight[:, -channels:] *= (factor.max() / factor).view(-1, 1, 1) / RATIO**0.5
    return unet


@cache
def calls() -> Calibration:
    return Calibration.synthesize(wild(), steps=4, trajectories=4, progress=False)


@cache
def compiled(*steps: str) -> CompiledUNet:
    pipeline = [
        {"learn-scaling": dict(LES)} if step == "learn-scaling" else step for step in (*BEFORE, *steps)
    ]
    policy = {
        "schema": "dmqfx.policy/1",
        "name": "wild",
        "extends": "w4a6-quick",
        "default": {"input": {"groups": 4}},
        "pipeline": [*pipeline, {"round-weights": {"method": "nearest"}}, "insert-qdq"],
    }
    return dmqfx.compile(wild(), policy, calibration=calls(), progress=False, target="simulate")


def output(q: torch.nn.Module) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(2)
    x, words = torch.randn(2, 4, 8, 8, generator=drawn), torch.randn(2, 5, 16, generator=drawn)
    with torch.no_grad():
        found: torch.Tensor = q(x, 500, words).sample
    return found


def test_the_model_is_as_wild_as_it_is_said_to_be() -> None:
    x = torch.randn(4, wild().config.in_channels, 8, 8)
    peaks = wild().conv_in(x).detach().abs().amax((0, 2, 3))
    assert float(peaks.max()) > LARGEST / 3
    assert float(peaks.max() / peaks.min()) > RATIO / 5
    assert bool(torch.isfinite(output(wild())).all())


@pytest.mark.filterwarnings("ignore:.*random")
def test_it_compiles_to_something_finite_and_better_than_without_scales() -> None:
    plain = compiled("fit-ranges")
    scaled = compiled("pair-layers", "learn-scaling", "apply-scaling", "absorb-scaling", "fit-ranges")
    assert bool(torch.isfinite(output(plain)).all())
    assert bool(torch.isfinite(output(scaled)).all())
    assert scaled.report.mean_db > plain.report.mean_db + 1


SHORT = (
    "default.input.groups=4",
    "pipeline.learn-steps.iterations=20",
    "pipeline.round-weights.iterations=50",
)


@cache
def whole(*without: str) -> CompiledUNet:
    """By w4a6, in a hurry, some of its passes left out."""
    steps = [step for step in Policy.load("w4a6", SHORT).pipeline if step.name not in without]
    policy = {
        "schema": "dmqfx.policy/1",
        "name": "whole",
        "extends": "w4a6",
        "default": {"input": {"groups": 4}},
        "pipeline": [{step.name: step.keywords()} if step.keywords() else step.name for step in steps],
    }
    return dmqfx.compile(wild(), policy, calibration=calls(), progress=False, target="simulate")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*random")
def test_the_whole_method_is_finite_there_and_better_than_without_scales() -> None:
    plain = compiled("fit-ranges")
    assert bool(torch.isfinite(output(whole())).all())
    assert whole().report.mean_db > plain.report.mean_db + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*random")
def test_scales_are_worth_their_place_in_the_whole_method() -> None:
    unscaled = whole("pair-layers", "learn-scaling", "apply-scaling", "absorb-scaling")
    assert whole().report.mean_db > unscaled.report.mean_db + 1
