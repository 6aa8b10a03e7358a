"""No oracle without teeth: every planted bug is found and placed, and its honest twin passes."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
from mutants import MISCALLED, MUTANTS
from planting import Mutant, bare, context, program_before

from dmqfx.checking.verify import verify
from dmqfx.errors import RewriteError, VerifyError
from dmqfx.graph.pipeline import run_step
from dmqfx.graph.registry import GROUP

BUILT_IN = {point.name for point in entry_points(group=GROUP) if point.module.startswith("dmqfx.passes.")}
LONG = {
    "learn-steps": {
        "a channel loses its bias",
        "a layer loses its codes by steps",
        "a zero point moves with its step",
    },
    "reconstruct-blocks": {"a channel has no bias"},
    "fuse": {
        "a norm's weight and bias change places",
        "codes of results are cut off",
        "the bias is lost where something is added",
        "the layer norm is dropped",
        "upsampled codes are one pixel aside",
        "what is added to a convolution is lost",
    },
    "hoist-invariants": {"kept by shape"},
    "insert-qdq": {
        "a dequantize has a stale zero point",
        "an edge comes half a timestep late",
        "each head has the other's step",
        "one reader of three stays float",
        "signed codes are unpacked as unsigned",
        "the shift is that of the next channel",
        "the step of the last group is off by a thousandth",
        "the steps are twice as wide as they need be",
    },
    "lower-reference": {
        "the bias is added twice",
        "the codes of the weight count as unsigned",
        "the groups are lost",
        "the stride is lost",
        "the zero point of the input is ignored",
    },
    "lower-cpu": {
        "the last channel's scale counts for all",
        "the padding is lost",
        "the taps of a kernel are transposed",
        "the zero points are those of the next group",
    },
    "correct-bias": {"each channel gets the correction of the next", "the first row counts for all"},
    "fit-ranges": {"every searched grid has half its step", "steps are twice as wide as they need be"},
}
"""What fast bugs of the same pass are like."""
HONEST = sorted({(mutant.pass_name, mutant.meets, mutant.policy) for mutant in MUTANTS})


def asked(mutant: Mutant) -> object:
    marks = [pytest.mark.slow] * (mutant.name in LONG.get(mutant.pass_name, ()))
    return pytest.param(mutant, marks=marks, id=f"{mutant.pass_name}: {mutant.name}")


@pytest.mark.parametrize("mutant", map(asked, MUTANTS))
def test_a_planted_bug_is_found_and_placed(mutant: Mutant) -> None:
    with pytest.raises(VerifyError) as caught:
        verify(mutant.program(), mutant.make(), context(mutant.policy))
    assert caught.value.step == mutant.pass_name
    assert caught.value.address == mutant.at
    assert str(caught.value).startswith(mutant.pass_name)


@pytest.mark.parametrize("mutant", MISCALLED, ids=lambda mutant: mutant.name)
def test_other_inputs_are_refused_after_the_pass_by_name(mutant: Mutant) -> None:
    told = f"^{mutant.pass_name} changed the {mutant.at}"
    with pytest.raises(RewriteError, match=told):
        run_step(mutant.make(), mutant.program(), context(mutant.policy))
    with pytest.raises(RewriteError, match=told):
        verify(mutant.program(), mutant.make(), context(mutant.policy))


@pytest.mark.parametrize(("step", "meets", "policy"), HONEST, ids=str)
def test_the_honest_twin_passes(step: str, meets: str, policy: str) -> None:
    verdict = verify(program_before(meets, policy), bare(step), context(policy))
    assert verdict.step == step
    assert verdict.error <= verdict.limit


def test_every_built_in_pass_has_its_bugs() -> None:
    assert {mutant.pass_name for mutant in MUTANTS} == BUILT_IN
    assert len(MUTANTS) >= 24


def test_a_bug_has_one_name() -> None:
    names = [(mutant.pass_name, mutant.name) for mutant in MUTANTS]
    assert len(set(names)) == len(names)
    assert {(step, name) for step, long in LONG.items() for name in long} <= set(names)
