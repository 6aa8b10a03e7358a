"""What holds of every program, every pass and every legal pipeline."""

from __future__ import annotations

from dataclasses import replace
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import MODELS, Model, eager, relative
from models import model as build_model
from planting import ORDER, POLICIES, bare, context, program_before
from strategies import exact_passes, pipelines, programs, unets
from strategies_policy import plans
from toys import rows as toy_rows
from toys import toy

from dmqfx.calibration.calibration import Calibration
from dmqfx.checking.judges import CLOSE, Close
from dmqfx.checking.probes import draw, outputs
from dmqfx.checking.tablecheck import broken_claims
from dmqfx.checking.verify import checking, verify
from dmqfx.compiler import quantize
from dmqfx.errors import PipelineError
from dmqfx.frontend.capture import capture
from dmqfx.graph.journal import Journal
from dmqfx.graph.pipeline import Pass, PassContext, Pipeline
from dmqfx.graph.program import Program
from dmqfx.graph.registry import passes
from dmqfx.policy.policy import Policy
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.storage.store import load

NAMES = [*ORDER, "lower-simulate", "lower-reference", "lower-cpu"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def run(name: str, fuel: int | None = None) -> tuple[Program, Program, Journal]:
    """A pass on the program that it meets in the pipeline: before, after, journal."""
    before, journal = program_before(name, "attention"), Journal(fuel=fuel)
    ctx = context("attention")
    after = bare(name).run(before, PassContext(ctx.policy, ctx.calibration, journal=journal))
    return before, after, journal


def rows(program: Program) -> list[tuple[object, ...]]:
    return [(str(site), type(entry).__name__, id(entry)) for site, entry in program.table]


# --- any legal order


@settings(max_examples=6)
@given(pipelines(), st.sampled_from(sorted(POLICIES)))
def test_any_legal_order_of_exact_passes_preserves_the_output(steps: tuple[Pass, ...], policy: str) -> None:
    before = toy().astype(torch.float64)
    judge = Close(before, draw(before, generator()))
    after = Pipeline(steps).run(before, context(policy))
    assert judge.judge(after).error <= CLOSE[torch.float64]
    assert list(broken_claims(after)) == []
    assert [record.name for record in after.log] == [step.name() for step in steps]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(exact_passes()), min_size=1, max_size=5))
def test_an_order_is_legal_or_refused_before_anything_runs(order: list[type[Pass]]) -> None:
    pipeline, known = Pipeline(tuple(cls() for cls in order)), set[object]()
    legal = True
    for cls in order:
        legal &= cls().needs <= known
        known = (known - cls.clears) | cls.provides
    if legal:
        pipeline.check(toy())
        return
    with pytest.raises(PipelineError, match=r"step \d+, [\w-]+, requires '\w+'"):
        pipeline.run(toy(), PassContext(), providers=exact_passes())


# --- any policy

PLACES = (
    "**",
    "conv_in/*",
    "mid.**",
    "mid.to_*/linear",
    "**.conv2/*",
    "up.**",
    "time_embedding.**",
    "re:.*proj.*",
)


@settings(max_examples=2, suppress_health_check=list(HealthCheck))
@given(plans(PLACES))
def test_any_policy_is_carried_out_with_every_pass_verified_and_comes_back_bit_by_bit(policy: Policy) -> None:
    ctx = PassContext(policy, toy_rows())
    after = Pipeline(tuple(map(bare, ORDER))).run(toy(), ctx, observe=checking())
    for lowering in ("lower-simulate", "lower-reference"):
        verify(after, passes()[lowering](), ctx)
    module = CompiledUNet(
        replace(after, inputs=replace(after.inputs, root="UNet2DModel")),
        config={"_class_name": "UNet2DModel", "in_channels": 4},
    )
    with TemporaryDirectory() as folder:
        module.save_pretrained(f"{folder}/saved")
        again = load(f"{folder}/saved").program
    for inputs in draw(after, generator()):
        assert all(map(torch.equal, outputs(again, inputs), outputs(after, inputs)))


# --- any program


@settings(max_examples=3)
@given(programs())
def test_canonicalize_is_idempotent(program: Program) -> None:
    step, ctx = passes()["canonicalize"](), PassContext()
    once = step.run(program, ctx)
    journal = Journal()
    twice = step.run(once, PassContext(journal=journal))
    assert journal.applied == []
    assert twice.gm.code == once.gm.code


@settings(max_examples=6)
@given(programs(), st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
def test_a_twin_computes_the_same_in_its_own_dtype(program: Program, dtype: torch.dtype) -> None:
    twin = program.astype(dtype)
    for inputs in draw(program, generator()):
        for a, b in zip(outputs(twin, _cast(inputs, dtype)), outputs(program, inputs), strict=True):
            assert a.dtype == dtype
            assert relative(a.float(), b) < 1e2 * torch.finfo(dtype).eps ** 0.9 + 1e-5


def _cast(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


# --- any pass


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_cannot_touch_the_program_it_was_given(name: str) -> None:
    before = program_before(name, "attention")
    code, entries = before.gm.code, rows(before)
    weights = {key: value.clone() for key, value in before.weights().items()}
    _, after, journal = run(name)
    assert journal.applied
    assert (after.gm.code, rows(after)) != (code, entries)
    assert (before.gm.code, rows(before)) == (code, entries)
    for key, value in before.weights().items():
        assert torch.equal(value, weights[key])


@pytest.mark.parametrize("name", NAMES)
def test_without_fuel_a_pass_changes_nothing(name: str) -> None:
    before, after, journal = run(name, 0)
    assert journal.applied == []
    assert rows(after) == rows(before)
    if name != "canonicalize":  # the spelling of arguments takes no fuel
        assert after.gm.code == before.gm.code


@pytest.mark.parametrize("name", NAMES)
def test_fuel_n_is_a_prefix_of_fuel_n_plus_1(name: str) -> None:
    everything = run(name)[2].applied
    for fuel in sorted({0, 1, len(everything) // 2, len(everything) - 1, len(everything)}):
        applied = run(name, fuel)[2].applied
        assert applied == everything[:fuel]


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_does_the_same_each_time(name: str) -> None:
    first, second = run(name), run(name)
    assert first[1].gm.code == second[1].gm.code
    assert (first[2].applied, first[2].refused) == (second[2].applied, second[2].refused)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_pass_refuses_it_says_why(name: str) -> None:
    _, _, journal = run(name)
    for refusal in journal.refused:
        assert refusal.reason
        assert refusal.at in program_before(name, "attention")


# --- any UNet


def compiled_and_verified(model: Model, policy: str, rows: int = 24) -> Program:
    """Every pass of a policy and both lowerings, each held to its promise on the model itself."""
    calibration = Calibration.synthesize(model, seed=0, progress=False).select(rows, generator())
    ctx = PassContext(Policy.load(policy), calibration)
    _, after = quantize(capture(model), ctx, verify=True)
    for lowering in ("lower-simulate", "lower-reference"):
        assert verify(after, passes()[lowering](), ctx).error < 1e-10
    return after


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_kind_of_unet_compiles_with_every_pass_verified(name: str) -> None:
    after = compiled_and_verified(build_model(name), "w4a8-quick")
    assert any(after.calls("quantize"))


@pytest.mark.slow
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(unets(), st.sampled_from(("w8a8", "w4a6-quick")))
def test_any_small_unet_compiles_with_every_pass_verified(model: Model, policy: str) -> None:
    program = capture(model)
    for inputs in draw(program, generator()):
        assert relative(outputs(program, inputs)[0], eager(model, inputs)[0]) < 1e-5
    compiled_and_verified(model, policy)
