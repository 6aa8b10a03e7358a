"""What the output feels of a layer: predicted from gradients, held against what a change really does."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from planting import context, program_before
from torch import Tensor, fx

import dmqfx
from dmqfx.errors import CalibrationError, VerifyError
from dmqfx.graph import ops
from dmqfx.graph.address import Address, Site
from dmqfx.graph.pipeline import run_step
from dmqfx.graph.registry import create, pipeline
from dmqfx.graph.table import Planned, Sensitivity
from dmqfx.passes import round_weights

AT = Address.parse("up.0.conv1/conv2d")


def measured(**options: object) -> dict[Site, Sensitivity]:
    program = program_before("measure-sensitivity", "shifts")
    after = run_step(create("measure-sensitivity", options), program, context("shifts"))
    return after.table.of(Sensitivity)


class _Moved(fx.Interpreter):
    """Runs a program with something added to one layer's output."""

    def __init__(self, module: fx.GraphModule, change: Tensor) -> None:
        super().__init__(module)
        self.change = change

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        return value + self.change if n.meta.get("address") == AT else value  # type: ignore[operator]


def test_channels_that_the_metric_calls_deaf_move_the_output_less_than_loud_ones() -> None:
    program = program_before("measure-sensitivity", "shifts")
    metric = measured()[Site(AT, "out")].metric
    assert metric is not None
    values, directions = torch.linalg.eigh(metric.double())
    batch = next(iter(context("shifts").calibration.batches(8, program.inputs)))  # type: ignore[union-attr]
    inputs = [batch[i.name] for i in program.inputs.inputs]
    shape = program.node(AT).meta["val"].shape
    drawn = torch.randn((1, 1, *shape[2:]), generator=torch.Generator().manual_seed(0)) * 1e-3

    def moved(direction: Tensor) -> float:
        change = drawn * direction.float().view(1, -1, 1, 1)
        with torch.no_grad():
            return float((_Moved(program.gm, change).run(*inputs) - program.gm(*inputs)).norm())

    deaf, loud = moved(directions[:, 0]), moved(directions[:, -1])
    assert float(values[-1]) > 4 * float(values[0]) >= 0
    assert loud > 1.5 * deaf


def test_every_planned_layer_has_one_and_weights_are_1_in_the_mean() -> None:
    program = program_before("measure-sensitivity", "shifts")
    found = measured(groups=4)
    assert {site.at for site in found} == {
        site.at
        for site, plan in program.table.of(Planned).items()
        if site.arg == "weight" and plan.spec is not None
    }
    for entry in found.values():
        assert entry.boundaries == (250.0, 500.0, 750.0)
        assert float(entry.weight.mean()) == pytest.approx(1, rel=0.5)


def test_a_row_takes_the_weight_of_the_group_that_its_timestep_opens() -> None:
    entry = Sensitivity(torch.tensor([1.0, 2.0, 3.0]), None, (10.0, 20.0))
    assert entry.of(torch.tensor([0.0, 9.9, 10.0, 19.0, 20.0, 999.0])).tolist() == [1, 1, 2, 2, 3, 3]


def test_the_same_seed_measures_the_same() -> None:
    one, two = measured()[Site(AT, "out")], measured()[Site(AT, "out")]
    assert torch.equal(one.weight, two.weight)
    assert one.metric is not None
    assert two.metric is not None
    assert torch.equal(one.metric, two.metric)


def test_without_calibration_it_says_what_is_missing() -> None:
    program = program_before("measure-sensitivity", "shifts")
    with pytest.raises(
        CalibrationError, match="measure-sensitivity needs calibration data; pass calibration="
    ):
        run_step(create("measure-sensitivity"), program, replace(context("shifts"), calibration=None))


def test_rounding_that_minds_it_passes_verification_and_a_shuffled_weight_does_not() -> None:
    ctx = context("shifts")
    before = program_before("round-weights", "shifts")
    step = create("round-weights", {"method": "gptq", "rows": 256})
    assert dmqfx.verify(before, step, ctx=ctx).error == 0
    honest = round_weights.handed_on

    def shuffled(*given: object) -> Tensor:
        return honest(*given).roll(1, 0)  # type: ignore[arg-type]

    with patch.object(round_weights, "handed_on", shuffled), pytest.raises(VerifyError, match="Codes of"):
        dmqfx.verify(before, step, ctx=ctx)


def test_scales_are_absorbed_before_what_the_output_feels_is_measured() -> None:
    """Absorbing changes how large a producer's output is, and with it what an error there does."""
    program = program_before("absorb-scaling", "shifts")
    order = [("measure-sensitivity", {}), ("absorb-scaling", {})]
    ((at, told),) = pipeline(order).problems(program)
    assert at == 1
    assert "absorb-scaling, comes too late: 'measured'" in told
    assert told.endswith("move it before measure-sensitivity")
    assert not list(pipeline(order[::-1]).problems(program))


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_a_convolution_in_groups_says_that_it_is_rounded_to_nearest(method: str) -> None:
    program = program_before("round-weights", "shifts")
    step = create("round-weights", {"method": method, "rows": 32, "iterations": 2})
    record = run_step(step, program, context("shifts")).log[-1]
    told = {str(each.at): (each.rule, each.reason) for each in record.refused}
    grouped = {
        str(node.meta["address"]) for node in program.calls("conv2d") if ops.args(node)["groups"] != 1
    } & {str(each.at) for each in record.applied}
    assert grouped
    assert set(told) == grouped
    for rule, reason in told.values():
        assert rule == method
        assert "a convolution in 2 groups" in reason
        assert reason.endswith("rounded to nearest")
    nearest = run_step(create("round-weights"), program, context("shifts")).log[-1]
    assert nearest.refused == ()
