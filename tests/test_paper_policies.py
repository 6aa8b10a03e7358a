"""The published recipe: run whole, with few iterations and rows, and what it votes on."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from models import captured, relative
from sweeping import output
from toys import rows, toy

from dmqfx.compiler import quantize
from dmqfx.graph import registry
from dmqfx.graph.pipeline import PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.graph.sites import is_weight
from dmqfx.graph.table import Codes, Planned, Shift
from dmqfx.passes.vote_shifts import VoteShifts
from dmqfx.policy.policy import Policy

PAPER = ("dmq-paper-w4a8", "dmq-paper-w4a6")
SHORT = (
    "pipeline.learn-scaling.iterations=10",
    "pipeline.learn-scaling.batch=64",
    "pipeline.learn-scaling.rows=256",
    "pipeline.reconstruct-blocks.iterations=20",
    "pipeline.reconstruct-blocks.rate=0.03",
    "pipeline.reconstruct-blocks.batch=8",
    "pipeline.reconstruct-blocks.rows=24",
    "default.input.groups=4",
)


@cache
def quantized(name: str) -> Program:
    """The toy behind the pipeline, but for its length."""
    ctx = PassContext(Policy.load(name, SHORT, check_step=registry.problems_with), rows(24))
    return quantize(toy(), ctx)[1]


def sqnr(program: Program) -> float:
    """Units: dB, of the output on rows that were not calibrated on."""
    simulated = run_step(create("lower-simulate"), program, PassContext())
    (inputs,) = rows(8, seed=1).batches(8, program.inputs)
    error = relative(output(simulated(**inputs)), output(toy()(**inputs)))
    return float(-20 * torch.tensor(error).log10())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("dmq-paper-w4a8", 15.0), ("dmq-paper-w4a6", 13.0)])
def test_the_published_recipe_runs_and_its_output_is_far_better_than_none(name: str, least: float) -> None:
    found = quantized(name)
    assert {record.name for record in found.log} >= {step.name for step in Policy.load(name).pipeline}
    assert found.table.of(Codes)
    assert sqnr(found) > least


def test_votes_are_held_at_the_shortcuts_and_nowhere_else() -> None:
    shifted = {str(site) for site in quantized("dmq-paper-w4a6").table.of(Shift)}
    assert shifted
    assert all("conv_shortcut" in site for site in shifted)


@pytest.mark.parametrize("name", PAPER)
def test_both_arms_of_the_decoders_shortcuts_and_the_encoders_vote(name: str) -> None:
    policy = Policy.load(name)
    order = [(step.name, step.keywords()) for step in policy.pipeline]
    names = [step for step, _ in order]
    planned = registry.pipeline(order[: names.index("plan-sites") + 1]).run(
        captured("plain")[1], PassContext(policy)
    )
    step = create("vote-shifts", dict(order)["vote-shifts"])
    assert isinstance(step, VoteShifts)
    inputs = [s for s, plan in planned.table.of(Planned).items() if plan.spec and not is_weight(s)]
    chosen = {str(site) for site in inputs if step._chosen(planned, site)}
    assert chosen == {str(site) for site in inputs if "conv_shortcut" in str(site)}
    assert {site.split(".")[0] for site in chosen} == {"down_blocks", "up_blocks"}
    arms = {site for site in chosen if "~split-skips" in site}
    assert arms
    assert {site.replace("~split-skips.1", "") for site in arms} < chosen


@pytest.mark.parametrize("name", PAPER)
def test_the_constants_are_the_published_ones(name: str) -> None:
    """METHODS of the paper: 6,000 and 20,000 iterations, 20 groups, weight strength 20, votes of 85 %, shifts to 1/8."""
    policy = Policy.load(name)
    own = {step.name: step.keywords() for step in policy.pipeline}
    scales, codes = own["learn-scaling"], own["reconstruct-blocks"]
    wanted = {
        "method": "les",
        "start": "identity",
        "iterations": 6000,
        "rate": 0.001,
        "strength": 20,
        "groups": 20,
    }
    assert wanted.items() <= scales.items()
    assert scales["weighting"] == "published"
    learned = {
        "iterations": 20000,
        "batch": 32,
        "rate": 0.001,
        "warmup": 0.2,
        "beta_start": 20,
        "beta_end": 2,
        "settling": 0.01,
        "loss": "absolute",
        "asymmetric": 1,
        "where": "all",
    }
    assert learned.items() <= codes.items()
    assert own["round-weights"] == {"method": "nearest", "norm": 2.4}
    assert own["fit-ranges"] == {"momentum": 0.95, "batch": 16}
    assert own["vote-shifts"] == {"where": "all", "at": "**.conv_shortcut/*", "agree": 0.85, "largest": 3}
    bits = 8 if name.endswith("w4a8") else 6
    assert (policy.default.weight.bits, policy.default.input.bits) == (4, bits)
