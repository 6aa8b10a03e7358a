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
HONEST = sorted({(mutant.pass_name, mutant.meets, mutant.policy) for mutant in MUTANTS})


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.pass_name}: {mutant.name}")
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
