"""What the output feels of a layer: predicted from gradients, held against what a change really does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from planting import context, program_before
from torch import Tensor, fx
from torch.nn import functional as F

import dmqfx
from dmqfx.errors import CalibrationError, PassNotFoundError, VerifyError
from dmqfx.graph import ops
from dmqfx.graph.address import Address, Site
from dmqfx.graph.pipeline import run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create, pipeline
from dmqfx.graph.table import Planned, Sensitivity
from dmqfx.passes import round_weights
from dmqfx.sweep import sensitivitysweep
from dmqfx.sweep.budget import Budget
from dmqfx.sweep.chunks import Chunk, chunked
from dmqfx.sweep.network import Network
from dmqfx.sweep.sensitivity import Measurement, _energy, _Layer

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


def ran(**changed: Any) -> Program:
    """The toy with its sensitivities, the context changed."""
    program = program_before("measure-sensitivity", "shifts")
    ctx = replace(context("shifts"), **{"chunk": 4, **changed})
    return run_step(create("measure-sensitivity"), program, ctx)


def entries(program: Program) -> dict[Site, Sensitivity]:
    return program.table.of(Sensitivity)


def test_little_memory_changes_last_digits_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Blocks are computed again on the way back, and batches in parts, so that sums are of another order."""
    plenty = entries(ran())
    with caplog.at_level(logging.INFO, "dmqfx"):
        tight = entries(ran(memory=1))
    assert "one row, forward and back, takes as much" in caplog.text
    assert "no measure-sensitivity in the policy" in caplog.text
    for site, entry in plenty.items():
        other = tight[site]
        assert entry.metric is not None
        assert other.metric is not None
        assert float((entry.metric - other.metric).norm()) <= 1e-4 * float(entry.metric.norm())
        assert torch.allclose(entry.weight, other.weight, rtol=1e-4)


def test_sparing_keeps_less_for_the_way_back() -> None:
    program = program_before("measure-sensitivity", "shifts")
    network = Network(program)
    found = Measurement(network, program, (500.0,), torch.Generator().manual_seed(0))
    data = context("shifts").calibration
    assert data is not None
    whole, spared = network.kept(next(chunked(data, program, 1)), found.watched)
    assert 0 < spared < 0.8 * whole


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_looks_are_not_taken_again_and_the_bits_are_those_of_a_whole_run(
    tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivitysweep, "_OFTEN", 0.0)
    whole, made = entries(ran()), list[str]()

    def counted(name: str) -> Callable[[Measurement, Chunk], None]:
        honest = getattr(Measurement, name)

        def look(self: Measurement, chunk: Chunk) -> None:
            made.append(name)
            if len(made) == stop + 1:
                raise KeyboardInterrupt
            honest(self, chunk)

        return look

    for name in ("look", "look_again"):
        monkeypatch.setattr(Measurement, name, counted(name))
    with pytest.raises(KeyboardInterrupt):
        ran(run_dir=tmp_path)
    assert made.pop() == ("look_again" if stop >= 3 else "look")
    made *= 100  # the next one is not interrupted
    before = len(made)
    again = entries(ran(run_dir=tmp_path))
    assert len(made) - before == 6 - stop
    for site, entry in whole.items():
        assert torch.equal(entry.weight, again[site].weight)
        assert entry.metric is not None
        assert torch.equal(entry.metric, again[site].metric)  # type: ignore[arg-type]  # as the other


def test_a_run_that_goes_on_in_less_memory_counts_its_looks_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of fewer rows would be other looks: some rows would be seen twice, others never."""
    monkeypatch.setattr(sensitivitysweep, "_OFTEN", 0.0)
    whole, honest, made = entries(ran()), Measurement.look, list[int]()

    def interrupted(self: Measurement, chunk: Chunk) -> None:
        made.append(len(chunk.timestep))
        if len(made) == 2:
            raise KeyboardInterrupt
        honest(self, chunk)

    monkeypatch.setattr(Measurement, "look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ran(run_dir=tmp_path)
    again = entries(ran(run_dir=tmp_path, memory=1))
    assert made == [4, 4, 4, 4]  # the first, the one that was interrupted, and those that were left
    for site, entry in whole.items():
        assert torch.allclose(entry.weight, again[site].weight, rtol=1e-4)


def test_a_budget_takes_rows_and_the_record_says_so() -> None:
    assert "MeasureSensitivity(rows=5, groups=20)" in ran(budget=Budget(1e-3)).log[-1].note
    assert ran(budget=Budget(3600.0)).log[-1].note == ""


@pytest.mark.parametrize("option", ["rows", "groups"])
def test_nothing_to_measure_with_is_refused(option: str) -> None:
    with pytest.raises(PassNotFoundError, match=f"{option} must be at least 1, not 0"):
        create("measure-sensitivity", {option: 0})


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


def test_what_a_convolution_in_groups_reads_is_counted_by_group() -> None:
    """The noise of weights that are rounded at random, simulated, is what is expected."""
    program = program_before("round-weights", "shifts")
    node = next(node for node in program.calls("conv2d") if ops.args(node)["groups"] == 2)
    shape, named = ops.tensor(node, "weight").meta["val"].shape, ops.args(node)
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2 * shape[1], 8, 8, generator=drawn)
    x[:, : shape[1]] *= 8  # so that a group that gets the energy of another one shows
    step = torch.linspace(0.05, 0.2, shape[0])
    seen = torch.zeros(())
    slope: Tensor | None = None
    for _ in range(200):
        change = (torch.rand(shape, generator=drawn) - 0.5) * step.view(-1, 1, 1, 1)
        out = F.conv2d(x, change, None, named["stride"], named["padding"], named["dilation"], 2)  # type: ignore[arg-type]  # canonical
        slope = torch.randn(out.shape, generator=drawn) if slope is None else slope
        seen = seen + (out * slope).square().sum() / 200
    assert slope is not None
    layer = _Layer(node, step, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    layer.add_noise(slope.movedim(1, -1), _energy(node, x), torch.zeros(2, dtype=torch.int64))
    assert float(layer.noise) == pytest.approx(float(seen), rel=0.05)


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
    nearest = run_step(create("round-weights", {"method": "nearest"}), program, context("shifts")).log[-1]
    assert nearest.refused == ()
