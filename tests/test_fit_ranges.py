"""fit-ranges: what each word for an input's range makes of the tensors of a real UNet."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from sweeping import chain, context, output_noise, planned, recorded, swept

from dmqfx.checking.verify import verify
from dmqfx.compiler import check_pipeline
from dmqfx.errors import DmqfxError, PolicyError
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.graph.sites import is_weight, operations
from dmqfx.graph.table import Planned
from dmqfx.numbers.quant import QParams, RangeMethod
from dmqfx.policy.policy import Policy, explain

MODEL = "plain"
STEPS = (
    ("measure-sensitivity", {"rows": 8}),
    ("fit-ranges", {"rows": 512}),
    ("round-weights", {"method": "nearest"}),
)


def asked(method: RangeMethod, bits: int = 4, of: Program | None = None) -> Program:
    """The planned UNet, or another program, with the inputs' ranges by another method."""
    program = planned(MODEL) if of is None else of
    plans = {
        site: replace(plan, spec=replace(plan.spec, range=method, bits=bits))
        for site, plan in program.table.of(Planned).items()
        if plan.spec is not None and not is_weight(site)
    }
    return program.with_table(program.table.put_all(plans))


@cache
def fitted(method: RangeMethod) -> Program:
    program = asked(method)
    return swept(program, context(recorded(program, 16)), STEPS)


def noise(method: RangeMethod) -> float:
    program = fitted(method)
    return output_noise(program, recorded(program, 16, seed=1))


@pytest.mark.parametrize("method", ["mse", "percentile", "ema"])
def test_no_step_is_wider_than_the_extremes_need(method: RangeMethod) -> None:
    widest, found = fitted("minmax").table.of(QParams), fitted(method).table.of(QParams)
    first = next(iter(found))  # later tensors differ with what was quantized before them
    assert found.keys() == widest.keys()
    assert bool((found[first].scale <= widest[first].scale * (1 + 1e-6)).all())
    assert any(not torch.equal(found[site].scale, widest[site].scale) for site in found)


def test_the_least_error_is_less_at_the_output_too() -> None:
    assert noise("mse") < 0.9 * noise("minmax")


def test_extremes_of_batches_are_averaged_where_it_is_asked_for() -> None:
    """One row in a batch is as ever; those of all rows of a group are the extremes, as of `minmax`."""
    data = recorded(chain(3), 16)

    def of(name: RangeMethod, **options: object) -> dict[str, torch.Tensor]:
        after = swept(asked(name, of=chain(3)), context(data), (("fit-ranges", options),))
        return {str(site): params.scale for site, params in after.table.of(QParams).items()}

    rows, single, four, all_, widest = (
        of("ema"), of("ema", batch=1), of("ema", batch=4), of("ema", batch=16), of("minmax"),
    )  # fmt: skip
    assert all(torch.equal(rows[at], single[at]) for at in rows)
    assert any(not torch.equal(four[at], rows[at]) for at in rows)
    first = next(iter(rows))  # later tensors differ with what was quantized before them
    assert torch.allclose(all_[first], widest[first])
    assert not torch.allclose(rows[first], widest[first])


@pytest.mark.parametrize("method", ["mse", "percentile", "ema"])
def test_the_verifier_agrees(method: RangeMethod) -> None:
    program = asked(method)
    verify(program, create("fit-ranges", {"rows": 256}), context(recorded(program, 8)))


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile", "ema"])
def test_a_timestep_group_without_rows_takes_what_was_found_for_the_nearest(method: RangeMethod) -> None:
    """The step, not extremes of which the search took a part only."""
    program = asked(method, 6, chain(4))
    data = recorded(program, 16)
    (group,) = data.groups
    early = replace(data, groups=(group.take((data.timesteps() >= 250).nonzero()[:, 0]),))
    found = swept(program, context(early), [("fit-ranges", {})]).table.of(QParams)
    grouped = [params for params in found.values() if len(params.scale) == 4]
    assert grouped
    for params in grouped:
        assert torch.equal(params.scale[0], params.scale[1])
        assert torch.equal(params.zero_point[0], params.zero_point[1])
        assert not torch.equal(params.scale[1], params.scale[2])


def test_a_pipeline_of_observers_is_refused_where_more_than_extremes_is_asked_for() -> None:
    policy = Policy.load(
        {
            "schema": "dmqfx.policy/1",
            "name": "x",
            "extends": "w4a8-quick",
            "default": {"input": {"range": "percentile"}},
        }
    )
    with pytest.raises(
        PolicyError, match=r"default\.input\.range: percentile is asked for; put fit-ranges into the pipeline"
    ):
        check_pipeline(policy)


@pytest.mark.parametrize(
    ("key", "spec", "told"),
    [
        ("weight", {"range": "ema"}, "unknown word 'ema'"),
        ("input", {"per": "channel", "range": "mse"}, "per channel takes its range from minmax"),
    ],
)
def test_what_no_range_can_be_is_refused(key: str, spec: dict[str, object], told: str) -> None:
    policy = {"schema": "dmqfx.policy/1", "name": "x", "extends": "w4a6", "default": {key: spec}}
    with pytest.raises(PolicyError, match=told):
        explain(Policy.load(policy), operations(planned(MODEL)))


@pytest.mark.parametrize(
    ("option", "value"),
    [("rows", 0), ("percent", 0.0), ("percent", 101.0), ("momentum", 1.0), ("momentum", -0.1), ("batch", 0)],
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(DmqfxError, match=f"{option} must be"):
        create("fit-ranges", {option: value})
