"""Biases that make up for the mean error of layers: what is left, what counts, what is refused."""

from __future__ import annotations

from dataclasses import replace

import torch
from planting import context, program_before
from sweeping import POLICY, chain, recorded, swept
from sweeping import context as sweep_context
from torch import Tensor

from dmqfx.checking.tablecheck import broken_claims
from dmqfx.graph import ops
from dmqfx.graph.address import Address, Site
from dmqfx.graph.journal import Journal
from dmqfx.graph.pipeline import PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create, pipeline
from dmqfx.graph.table import Bias, Codes, Planned, Table
from dmqfx.passes.correct_bias import _uniform, lacking
from dmqfx.sweep.chunks import chunked
from dmqfx.sweep.turn import Turn
from dmqfx.sweep.walk import Walk

BEFORE = (("fit-ranges", {}), ("round-weights", {"method": "nearest"}))
AFTER = (*BEFORE, ("correct-bias", {}))


def left(program: Program) -> dict[str, float]:
    """What the mean of each layer's output lacks, at most, in the network as its table says."""
    data, found = recorded(program, 9), dict[str, float]()

    def visit(turn: Turn) -> Table:
        for reader in turn.readers:
            found[str(reader.site.at)] = float(lacking(turn, reader).abs().max())
        return turn.table

    Walk(program, chunked(data, program, 4), memory=2**30, total=len(data)).run(visit)
    return found


def test_no_layer_lacks_anything_in_the_mean_on_the_rows_that_it_was_corrected_on() -> None:
    ctx = sweep_context(recorded(chain(), 9))
    plain, corrected = (left(swept(chain(), ctx, steps)) for steps in (BEFORE, AFTER))
    assert plain.keys() == corrected.keys()
    assert max(corrected.values()) < 1e-5
    assert min(plain.values()) > 1e-4


def test_timesteps_count_alike_however_many_rows_they_have() -> None:
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [10.0, 6.0]])
    assert _uniform(rows, torch.tensor([5.0, 5.0, 7.0])).tolist() == [6.0, 3.0]


def test_a_layer_without_a_bias_gets_one_that_insert_qdq_applies() -> None:
    before, ctx = program_before("correct-bias", "shifts"), context("shifts")
    bare = [site.at for site in before.table.of(Codes) if ops.args(before.node(site.at)).get("bias") is None]
    assert bare
    after = run_step(create("correct-bias"), before, ctx)
    whole = run_step(create("insert-qdq"), after, ctx)
    for at in bare:
        entry = after.table.get(Site(at, "bias"), Bias)
        assert entry is not None
        assert torch.equal(whole.constant_at(Site(at, "bias")), entry.value)


def test_a_layer_whose_weight_stays_float_is_refused_with_the_reason() -> None:
    plan = chain().table.get(Site(Address.parse("conv3/conv2d"), "weight"), Planned)
    assert plan is not None
    at = Site(Address.parse("conv3/conv2d"), "weight")
    program = chain().with_table(chain().table.put(at, replace(plan, spec=None)))
    after = swept(program, sweep_context(recorded(chain(), 9)), AFTER)
    (refusal,) = after.log[-1].refused
    assert (str(refusal.at), refusal.reason) == (
        "conv3/conv2d",
        "the weight stays float, and so does the layer's bias",
    )
    assert after.table.get(Site(at.at, "bias"), Bias) is None


def test_fuel_bounds_the_layers() -> None:
    before = program_before("correct-bias", "shifts")
    ctx = context("shifts")
    whole = run_step(create("correct-bias"), before, ctx)
    few = replace(ctx, journal=Journal(fuel=2))
    some = create("correct-bias").run(before, few)
    assert len(few.journal.applied) == 2
    assert tuple(few.journal.applied) == whole.log[-1].applied[:2]
    known = before.table.of(Bias)
    assert sum(entry is not known.get(site) for site, entry in some.table.of(Bias).items()) == 2


def test_rounding_again_to_the_nearest_takes_a_correction_back() -> None:
    ctx = sweep_context(recorded(chain(), 9))
    after = swept(chain(), ctx, (*AFTER, ("round-weights", {"method": "nearest"})))
    for site, entry in after.table.of(Bias).items():
        assert torch.equal(entry.value, after.constant_at(site))
    assert "corrected" not in map(str, after.facts)


def test_a_bias_in_the_graph_that_is_not_the_tables_is_found() -> None:
    ctx = replace(PassContext(POLICY), calibration=recorded(chain(), 9))
    program = pipeline([*AFTER, ("insert-qdq", {})]).run(chain(), ctx)
    site = Site(Address.parse("conv3/conv2d"), "bias")

    def spoil(value: Tensor) -> Program:
        return program.with_table(program.table.put(site, Bias(value)))

    assert list(broken_claims(program)) == []
    value = program.table.of(Bias)[site].value
    for wrong, told in ((value + 1e-3, "another bias"), (value[:-1], "the layer has 8 output channels")):
        (broken,) = broken_claims(spoil(wrong))
        assert broken.site == site
        assert told in broken.reason
