"""Split skips and voted shifts on the bundled trained UNet, once, from recorded rows to integers."""

from __future__ import annotations

import pytest
import torch
from planting import options
from torch import Tensor

from dmqfx import emoji
from dmqfx.calibration.calibration import Calibration
from dmqfx.checking.judges import SameCodes
from dmqfx.evaluation import emoji_calibration
from dmqfx.frontend.capture import capture
from dmqfx.graph import registry
from dmqfx.graph.address import Site
from dmqfx.graph.pipeline import PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.graph.table import Codes, Range, Shift, SkipArm, SkipConcat, Table
from dmqfx.numbers.quant import QParams
from dmqfx.policy.policy import Policy
from dmqfx.sweep.chunks import chunked
from dmqfx.sweep.deploy import deployed_input
from dmqfx.sweep.turn import Turn
from dmqfx.sweep.values import Pair
from dmqfx.sweep.walk import Walk

pytestmark = pytest.mark.slow  # the toy goes through the same steps in fast tests

STEPS = "canonicalize flag-skips split-skips plan-sites fit-ranges vote-shifts round-weights".split()


@pytest.fixture(scope="module")
def data() -> Calibration:
    return emoji_calibration(count=1, steps=10, seed=0, progress=False)


@pytest.fixture(scope="module")
def ctx(data: Calibration) -> PassContext:
    return PassContext(Policy.load("w4a6-quick", ["default.input.groups=5"]), data)


@pytest.fixture(scope="module")
def planned(ctx: PassContext) -> Program:
    """The UNet with everything known that insert-qdq wants."""
    return registry.pipeline((name, options(name)) for name in STEPS).run(capture(emoji.load_unet()), ctx)


def test_every_long_skip_is_split_and_most_arms_have_channels_with_finer_steps(planned: Program) -> None:
    arms = planned.table.of(SkipArm)
    assert len(arms) == 2 * len(planned.table.of(SkipConcat)) == 12
    assert len({entry.concat for entry in arms.values()}) == 6
    for site in arms:
        assert planned.table.get(site, Range) is not None
        assert planned.table.get(Site(site.at, "weight"), Codes) is not None
    shifts = planned.table.of(Shift)
    assert set(shifts) <= set(arms)
    assert len(shifts) >= 9
    assert {int(each) for shift in shifts.values() for each in shift.exponent.unique()} == {0, 1, 2, 3}


def test_finer_steps_make_what_arrives_at_an_arm_more_exact(planned: Program, data: Calibration) -> None:
    noise: dict[Site, Tensor] = {}

    def visit(turn: Turn) -> Table:
        for reader in turn.readers:
            shift, params = turn.table.get(reader.site, Shift), turn.table.get(reader.site, QParams)
            if shift is None or params is None:
                continue
            errors = torch.zeros(2, dtype=torch.float64)
            for batch in turn.batches:
                for k, steps in enumerate((None, shift)):
                    got = deployed_input(batch.quantized, params, None, steps, batch.timestep, turn.axis)
                    errors[k] += (got - batch.quantized).double().square().sum()
            noise[reader.site] = errors
        return turn.table

    Walk(planned, chunked(data, planned, 5), memory=2**30, total=len(data)).run(visit)
    assert set(noise) == set(planned.table.of(Shift))
    saved = [10 * float((before / after).log10()) for before, after in noise.values()]
    assert min(saved) > 0
    assert max(saved) > 2  # dB


def test_the_compiled_unet_computes_what_the_sweep_did_and_its_integers_agree(
    planned: Program, ctx: PassContext, data: Calibration
) -> None:
    few = data.select(4, torch.Generator().manual_seed(0))
    (inputs,) = few.batches(4, planned.inputs)
    walk = Walk(planned, chunked(few, planned, 4), memory=2**30, total=4)
    outputs: list[Pair] = []
    walk.run(lambda turn: turn.table, outputs)
    real, expected = outputs[0].real, outputs[0].quantized
    compiled = run_step(create("insert-qdq"), planned, ctx)
    simulated = run_step(create("lower-simulate"), compiled, ctx)(**inputs)
    assert isinstance(simulated, Tensor)
    assert relative(simulated, expected) < 1e-5
    assert 0.01 < relative(simulated, real) < 0.5
    agreement = SameCodes(compiled, [inputs]).judge(run_step(create("lower-reference"), compiled, ctx))
    assert not agreement.wrong, agreement.what


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
