"""Residual blocks: found by shape, learned together, never worse than they were, the same for the same seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import context, program_before
from sweeping import bits, chain, recorded, swept
from sweeping import context as sweep_context
from torch import Tensor

import dmqfx
from dmqfx import emoji
from dmqfx.errors import CalibrationError, VerifyError
from dmqfx.frontend.capture import capture
from dmqfx.graph.blocks import Block, blocks, units
from dmqfx.graph.journal import Journal
from dmqfx.graph.modules import is_fixed, label
from dmqfx.graph.pipeline import run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.graph.table import Bias, Codes, Planned, Sensitivity, Table
from dmqfx.numbers.adaround import Annealing, Cells
from dmqfx.numbers.packing import unpack
from dmqfx.numbers.weighting import TimestepWeights
from dmqfx.passes.reconstruct_blocks import ReconstructBlocks
from dmqfx.sweep.blockwalk import Arrival, walk
from dmqfx.sweep.chunks import chunked
from dmqfx.sweep.reconstruct import Weigh, reconstructed

QUICK = {"rows": 12, "batch": 4, "iterations": 30, "rate": 0.1}


@cache
def before() -> Program:
    return program_before("reconstruct-blocks", "shifts")


@cache
def after() -> Program:
    return run_step(create("reconstruct-blocks", QUICK), before(), context("shifts"))


def codes(program: Program) -> dict[str, Tensor]:
    found = {}
    for site, entry in program.table.of(Codes).items():
        planned = program.table.get(site, Planned)
        assert planned is not None
        assert planned.spec is not None
        signed = entry.qparams.qmin < 0
        found[str(site)] = unpack(entry.packed, planned.spec.bits, signed, entry.shape).double()
    return found


def test_blocks_are_found_between_a_tensor_and_the_addition_that_takes_it_back() -> None:
    found = blocks(before())
    assert [str(block.at) for block in found] == [
        "down/add#1",
        "mid/add",
        "mid/add#1",
        "up.0/add#1",
        "up.1/add#1",
    ]
    inside = {label(node) for node in found[3].inside}
    assert {"up.0.conv1/conv2d", "up.0.conv2/conv2d", "up.0.conv_shortcut/conv2d"} <= inside
    assert "up.0.conv_shortcut/conv2d~split-skips.1" in inside
    assert "up.0.time_emb_proj/linear" not in inside
    for block in found:
        assert block.read_outside is None
        assert not set(block.inputs) & set(block.inside)


def test_residual_blocks_of_one_module_in_a_row_are_one_unit() -> None:
    apart, found = blocks(before()), units(before())
    assert [str(each.at) for each in found] == ["down/add#1", "mid/add#1", "up.0/add#1", "up.1/add#1"]
    joined = found[1]
    assert joined.inside == (*apart[1].inside, *apart[2].inside)
    assert joined.arms == apart[2].arms
    assert apart[1].out not in joined.inputs
    assert not set(joined.inputs) & set(joined.inside)
    reads = {read for node in joined.inside for read in node.all_input_nodes if not is_fixed(read)}
    assert set(joined.inputs) == reads - set(joined.inside)


def test_a_transformer_block_is_one_unit_and_a_resnet_block_another() -> None:
    program = capture(emoji.load_unet())
    found = [str(each.at) for each in units(program)]
    assert "mid_block.attentions.0.transformer_blocks.0/add#2" in found
    assert "mid_block.resnets.0/add#1" in found
    assert not any(
        each.endswith(("transformer_blocks.0/add", "transformer_blocks.0/add#1")) for each in found
    )
    layers, own = (
        {label(node) for each in of(program) for node in each.inside if node in set(program.calls("linear"))}
        for of in (units, blocks)
    )
    projections = {name.split(".")[-1] for name in layers - own}
    assert own < layers
    assert projections == {"to_k/linear", "to_v/linear", "time_emb_proj/linear"}


def test_a_unit_has_what_it_alone_reads_of_the_timestep_and_the_prompt() -> None:
    for unit in units(before()):
        inside = set(unit.inside)
        assert unit.read_outside is None
        assert [node for node in before().graph.nodes if node in inside] == list(unit.inside)
        reads = {read for node in unit.inside for read in node.all_input_nodes if not is_fixed(read)}
        assert set(unit.inputs) == reads - inside
    inside = {label(node) for unit in units(before()) for node in unit.inside}
    assert {"down.time_emb_proj/linear", "up.0.time_emb_proj/linear"} <= inside
    assert not {"time_embedding.linear_2/linear", "downsample/conv2d"} & inside


def test_a_chain_has_no_block() -> None:
    assert blocks(chain()) == []


def test_layers_in_no_block_are_refused_with_the_reason() -> None:
    refused = {str(r.at): r.reason for r in after().log[-1].refused}
    assert refused["downsample/conv2d"] == "it is in no residual block; where: all learns it too"
    assert refused["conv_in/conv2d"] == "it has no codes"
    assert "up.0.conv1/conv2d" not in refused


@cache
def everywhere() -> Program:
    return run_step(create("reconstruct-blocks", {**QUICK, "where": "all"}), before(), context("shifts"))


def wanted(program: Program, where: Literal["blocks", "all"]) -> list[Block]:
    return ReconstructBlocks(where=where)._wanted(program, context("shifts"))


def alone(program: Program) -> list[str]:
    """The layers with codes that are in no unit."""
    inside = {label(node) for unit in units(program) for node in unit.inside}
    return [at for site in codes(program) if (at := site.split(":")[0]) not in inside]


def test_layers_in_no_block_learn_by_themselves_when_they_are_asked_to() -> None:
    old, new, record = codes(before()), codes(everywhere()), everywhere().log[-1]
    assert "downsample/conv2d" in alone(before())
    assert any(not torch.equal(old[f"{at}:weight"], new[f"{at}:weight"]) for at in alone(before()))
    tried = [each for each in record.refused if each.reason != "it has no codes"]
    told = {str(each.at) for each in (*record.applied, *tried)}
    assert told == {*alone(before()), *(str(unit.at) for unit in units(before()))}


def test_blocks_and_layers_learn_in_the_order_of_the_network() -> None:
    """So that a layer behind a block reads what the block has learned, as published."""
    found = wanted(before(), "all")
    place = {node: k for k, node in enumerate(before().graph.nodes)}
    assert found == sorted(found, key=lambda block: place[block.out])
    assert [str(each.at) for each in found if not each.arms] == alone(before())
    assert [str(each.at) for each in found if each.arms] == [str(each.at) for each in units(before())]
    assert [each.at for each in wanted(before(), "blocks")] == [each.at for each in found if each.arms]


def test_layers_of_a_block_that_cannot_be_learned_as_one_learn_by_themselves() -> None:
    plain = chain(4, residual=True, peeked=True)
    program = swept(plain, sweep_context(recorded(plain, 4)))
    found = {where: [str(each.at) for each in wanted(program, where)] for where in ("blocks", "all")}
    assert found["blocks"] == ["block2/add", "block3/add"]
    assert found["all"] == ["conv0/conv2d", "conv1/conv2d", "time/linear", "block2/add", "block3/add"]


def test_codes_move_by_at_most_one_and_towards_the_weight() -> None:
    old, new = codes(before()), codes(after())
    moved = {site: new[site] - old[site] for site in old}
    assert any(bool(each.any()) for each in moved.values())
    assert all(float(each.abs().max()) <= 1 for each in moved.values())
    for site, entry in before().table.of(Codes).items():
        params = entry.qparams
        shape = [-1, *[1] * (len(entry.shape) - 1)]
        exact = before().constant_at(site).double() / params.scale.view(shape) + params.zero_point.view(shape)
        step = moved[str(site)]
        assert bool(((exact - old[str(site)]) * step >= 0).all())


def test_layers_outside_keep_their_codes() -> None:
    old, new = codes(before()), codes(after())
    assert torch.equal(old["downsample/conv2d:weight"], new["downsample/conv2d:weight"])


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_what_is_taken_has_less_loss_on_all_rows(seed: int, asymmetric: float, biases: bool) -> None:
    """The losses that the pass decides by are those of the two tables, measured anew."""
    data, found = context("shifts").calibration, blocks(before())[:1]
    assert data is not None
    chunks = list(chunked(data, before(), 4))

    def visit(table: Table, block: Block, arrivals: list[Arrival]) -> Table:
        def learn(start: Table, iterations: int) -> tuple[float, float, Mapping[object, object]]:
            result = reconstructed(
                before(), start, block, arrivals, Annealing(iterations, rate=0.1), asymmetric=asymmetric,
                biases=biases, generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            return result.before, result.after, result.entries

        first, last, entries = learn(table, 20)
        again, _, _ = learn(table.put_all(entries), 1)  # type: ignore[arg-type]  # sites and entries
        assert again == pytest.approx(last, rel=1e-4)
        assert first > 0
        return table

    walk(before(), chunks, found, visit, memory=2**30)


def test_learning_makes_the_loss_of_blocks_less() -> None:
    told = [a.what for a in after().log[-1].applied]
    assert len(told) >= 3
    assert all(float(each.split()[0]) <= 1 for each in told)
    assert min(float(each.split()[0]) for each in told) < 0.95


def test_an_absolute_loss_of_blocks_does_not_depend_on_the_unit_of_what_the_output_feels() -> None:
    """measure-sensitivity sums over rows and positions: with more of them the same metric is larger."""
    how, table = {**QUICK, "loss": "absolute", "settling": 0.01}, before().table
    larger = {
        site: replace(felt, metric=felt.metric * 4096)
        for site, felt in table.of(Sensitivity).items()
        if felt.metric is not None
    }
    assert larger
    step = create("reconstruct-blocks", how)
    few = run_step(step, before(), context("shifts"))
    many = run_step(step, before().with_table(table.put_all(larger)), context("shifts"))
    assert few.log[-1].applied
    assert all(torch.equal(few.table.of(Codes)[s].packed, e.packed) for s, e in many.table.of(Codes).items())


def test_a_block_that_learns_nothing_keeps_its_codes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that are all moved where learning began to move them are worse than the nearest ones."""
    monkeypatch.setattr(
        Cells,
        "settled",
        lambda cells, alpha: torch.where(cells.movable, 2 * cells.lower + 1 - cells.start, cells.start),
    )
    spoiled = run_step(create("reconstruct-blocks", {**QUICK, "biases": False}), before(), context("shifts"))
    assert {s: e.packed.tolist() for s, e in spoiled.table.of(Codes).items()} == {
        s: e.packed.tolist() for s, e in before().table.of(Codes).items()
    }
    assert any("the codes are kept" in r.reason for r in spoiled.log[-1].refused)
    assert spoiled.log[-1].applied == ()


def test_the_same_seed_gives_the_same_bits_and_little_memory_does_too() -> None:
    step = create("reconstruct-blocks", QUICK)
    tight = replace(context("shifts"), memory=20_000)
    assert bits(run_step(step, before(), tight).table) == bits(after().table)
    other = run_step(step, before(), replace(context("shifts"), seed=1))
    assert bits(other.table) != bits(after().table)


def test_biases_stay_where_they_are_not_to_be_learned() -> None:
    step = create("reconstruct-blocks", {**QUICK, "biases": False})
    assert run_step(step, before(), context("shifts")).table.of(Bias) == before().table.of(Bias)
    assert after().table.of(Bias)


def learned_with(**options: object) -> dict[str, bytes]:
    return bits(
        run_step(create("reconstruct-blocks", {**QUICK, **options}), before(), context("shifts")).table
    )


def test_timesteps_that_count_alike_are_as_ever_and_uneven_ones_lead_to_other_codes() -> None:
    as_ever = bits(after().table)
    assert learned_with(weighting="focal", strength=0.0) == as_ever  # all rows weigh 1
    assert learned_with(weighting="focal", groups=3) != as_ever


def test_rows_weigh_what_the_timestep_weights_say_of_the_losses_before() -> None:
    """The losses that learning is judged by, by hand: the mean of each row's, by the weight of its group."""
    data, groups = context("shifts").calibration, 3
    assert data is not None
    step, told = ReconstructBlocks(weighting="focal", strength=2.0, groups=groups), list[float]()

    def visit(table: Table, block: Block, arrivals: list[Arrival]) -> Table:
        weights, seen = TimestepWeights("focal", groups, 2.0), list[tuple[Tensor, Tensor]]()

        def result(weigh: Weigh) -> float:
            return reconstructed(
                before(), table, block, arrivals, Annealing(1), asymmetric=0.0, biases=False,
                generator=torch.Generator().manual_seed(0), weigh=weigh,
            ).before  # fmt: skip

        def alike(losses: Tensor, timestep: Tensor) -> Tensor:
            seen.append((losses, timestep))
            return torch.ones_like(losses)

        uniform = result(alike)
        ((losses, timestep),) = seen
        group = (timestep * groups / 1000).long()
        wanted = weights(losses, group)
        assert len(wanted.unique()) == groups
        assert torch.equal(timestep, torch.cat([arrival.timestep for arrival in arrivals]))
        ratio = float((wanted * losses).mean() / losses.mean())
        assert result(step._weigh(context("shifts"))) == pytest.approx(uniform * ratio, rel=1e-4)
        told.append(ratio)
        return table

    walk(before(), list(chunked(data, before(), 4)), blocks(before()), visit, memory=2**30)
    assert len(told) == len(blocks(before()))


def test_fuel_bounds_the_blocks() -> None:
    few = replace(context("shifts"), journal=Journal(fuel=2))
    create("reconstruct-blocks", QUICK).run(before(), few)
    assert tuple(few.journal.applied) == after().log[-1].applied[:2]


def test_honest_codes_pass_verification_and_swapped_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    step = create("reconstruct-blocks", QUICK)
    assert dmqfx.verify(before(), step, ctx=context("shifts")).error == 0
    honest = Cells.settled
    monkeypatch.setattr(Cells, "settled", lambda cells, alpha: honest(cells, alpha).roll(1, 0))
    monkeypatch.setattr("dmqfx.passes.reconstruct_blocks.better", lambda found: True)
    with pytest.raises(VerifyError, match="Codes of"):
        dmqfx.verify(before(), step, ctx=context("shifts"))


def test_without_calibration_it_says_what_is_missing() -> None:
    with pytest.raises(
        CalibrationError, match="reconstruct-blocks needs calibration data; pass calibration="
    ):
        run_step(create("reconstruct-blocks"), before(), replace(context("shifts"), calibration=None))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rows", 0),
        ("batch", 0),
        ("iterations", 0),
        ("rate", 0),
        ("warmup", 2),
        ("beta_end", 1),
        ("settling", -1),
        ("strength", -1),
        ("groups", 0),
    ],
)
def test_options_out_of_bounds_are_refused(option: str, value: float) -> None:
    with pytest.raises(Exception, match=f"{option} must be"):
        create("reconstruct-blocks", {option: value})
