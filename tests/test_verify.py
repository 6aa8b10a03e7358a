"""The verifier: what it measures, what it says of a bug, and that its own arithmetic is right."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from handmade import program_of
from hypothesis import given
from hypothesis import strategies as st
from models import MODELS
from mutants import MUTANTS
from planting import ORDER, POLICIES, bare, context, program_before
from torch import Tensor, fx
from toys import SPEC, toy

import dmqfx
from dmqfx.checking import faked
from dmqfx.checking.culprit import find_culprit
from dmqfx.checking.headroom import _change
from dmqfx.checking.judges import CLOSE, TIE, Close, Equal, SameCodes, distance
from dmqfx.checking.probes import at_edges, draw, outputs, sizes, strong
from dmqfx.checking.seen import Seen
from dmqfx.checking.shrink import shrunk
from dmqfx.checking.verify import checking, error_after, verify
from dmqfx.errors import NotAProgramError, PipelineError, RewriteError, VerifyError
from dmqfx.frontend.capture import capture
from dmqfx.graph.facts import QDQ, Fact
from dmqfx.graph.inputs import Input
from dmqfx.graph.modules import clone
from dmqfx.graph.pattern import Outcome, RewritePass, Rule, p, rule
from dmqfx.graph.pipeline import Pass, PassContext, Pipeline, Preserves, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import passes
from dmqfx.graph.rewrite import Rewriter
from dmqfx.graph.table import Codes, Planned, Range
from dmqfx.numbers import packing, quant
from dmqfx.numbers.quant import QParams, QuantSpec
from dmqfx.policy.policy import Expect
from dmqfx.runtime.operators import timestep_group

aten = torch.ops.aten
BY_NAME = {(mutant.pass_name, mutant.name): mutant for mutant in MUTANTS}
THOUSANDTH = BY_NAME["apply-scaling", "one channel is off by a thousandth"]
FORGOTTEN = BY_NAME["absorb-scaling", "the bias is forgotten"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def fresh(program: Program) -> Program:
    """The program of a model that was never trained: unit gains and zero biases."""
    weak = {
        name: torch.full_like(weight, float(name.endswith("weight")))
        for name, weight in program.weights().items()
        if name.endswith("bias") or "norm" in name
    }
    return replace(program, gm=clone(program.gm, {**program.weights(), **weak}))


# --- verdicts


def test_an_exact_pass_drifts_by_rounding_alone() -> None:
    verdict = verify(program_before("apply-scaling"), passes()["apply-scaling"](), context())
    assert 0 < verdict.error < 1e-14
    assert (verdict.step, verdict.preserves, verdict.limit) == ("apply-scaling", Preserves.EXACT, 1e-10)


def test_without_a_twin_the_limit_is_that_of_the_programs_own_dtype() -> None:
    verdict = verify(program_before("apply-scaling"), passes()["apply-scaling"](), context(), float64=False)
    assert 1e-14 < verdict.error < verdict.limit == 1e-5


def test_the_error_of_a_lossy_pass_is_its_noise() -> None:
    verdict = verify(program_before("insert-qdq"), passes()["insert-qdq"](), context())
    assert 10 < verdict.sqnr_db < 40
    assert verdict.limit == math.inf


def test_the_plan_is_held_to_without_a_twin_too() -> None:
    program, step = program_before("insert-qdq"), passes()["insert-qdq"]
    assert verify(program, step(), context(), float64=False).sqnr_db > 10
    late = BY_NAME["insert-qdq", "an edge comes half a timestep late"].make()
    with pytest.raises(VerifyError, match=r"what arrives at .*, in float32: .*, limit 1e-05") as caught:
        verify(program, late, context(), float64=False)
    again = error_after(program, late, context(), float64=False)
    assert again == pytest.approx(caught.value.error)


def test_a_policy_sets_the_floor_of_the_signal() -> None:
    program, step = program_before("insert-qdq"), passes()["insert-qdq"]()
    for floor, found in ((5.0, False), (80.0, True)):
        policy = replace(POLICIES["layers"], expect=Expect(sqnr_db=floor))
        ctx = replace(context(), policy=policy)
        if not found:
            assert verify(program, step, ctx).limit == pytest.approx(10 ** (-floor / 20))
            continue
        with pytest.raises(VerifyError, match=r"insert-qdq.*noise over signal"):
            verify(program, step, ctx)


def test_a_pipeline_that_is_checked_logs_the_drift_of_each_pass() -> None:
    steps = tuple(passes()[name]() for name in ORDER[:8])
    after = Pipeline(steps).run(toy(), context(), observe=checking())
    drifts = [record.drift for record in after.log]
    assert drifts[:7] == [0.0] * 7
    assert drifts[7] is not None
    assert 0 < drifts[7] < 1e-14
    assert "drift" in str(after.log[7])


def test_a_pipeline_that_is_checked_stops_at_a_bug() -> None:
    steps = (*(passes()[name]() for name in ORDER[:7]), THOUSANDTH.make(), passes()["absorb-scaling"]())
    with pytest.raises(VerifyError, match="apply-scaling, rule 'scale' at upsample/conv2d"):
        Pipeline(steps).run(toy(), context(), observe=checking())


def test_a_half_precision_program_is_held_to_what_its_dtype_can_do() -> None:
    half = program_before("apply-scaling").astype(torch.bfloat16)
    assert verify(half, passes()["apply-scaling"](), replace(context(), calibration=None)).error < 1e-14
    with pytest.raises(VerifyError, match="upsample/conv2d"):
        verify(half, THOUSANDTH.make(), replace(context(), calibration=None))


@pytest.mark.parametrize("groups", [3, (-0.7, 0.1, 333.3333)])
def test_edges_that_float32_cannot_hold_are_no_fault_of_a_pass(groups: int | tuple[float, ...]) -> None:
    default = POLICIES["layers"].default
    policy = replace(
        POLICIES["layers"], default=replace(default, input=replace(default.input, groups=groups))
    )
    names = "canonicalize plan-sites insert-observers freeze-observers round-weights insert-qdq".split()
    steps = tuple(bare(name) for name in names)
    after = Pipeline(steps).run(toy(), replace(context(), policy=policy), observe=checking())
    assert QDQ in after.facts


def test_a_range_of_nothing_but_zeros_may_be_scaled() -> None:
    """At timestep 0 every sine is 0, and a group that saw no other timestep has only that to tell."""
    default = POLICIES["layers"].default
    everywhere = replace(default, input=replace(default.input, groups=13))
    ctx = replace(context(), policy=replace(POLICIES["layers"], default=everywhere))
    after = Pipeline(tuple(passes()[name]() for name in ORDER[:7])).run(toy(), ctx)
    assert verify(after, passes()["apply-scaling"](), ctx).error < 1e-14


# --- what an error says


def test_an_error_names_everything_and_can_be_seen_again() -> None:
    program, step = THOUSANDTH.program(), THOUSANDTH.make()
    with pytest.raises(VerifyError) as caught:
        verify(program, step, context())
    error = caught.value
    assert (error.step, error.rule, error.address) == ("apply-scaling", "scale", "upsample/conv2d")
    assert error.limit == 1e-10
    assert error.fuel is not None
    expected = (
        r"apply-scaling, rule 'scale' at upsample/conv2d: relative L2 error of sample, probe 2 \(1x3x10x6\), "
        r"in float64: [\d.e-]+, limit 1e-10\n"
        r"  application \d+ of \d+ \(read by 1\), found in \d runs of the pass\n"
        r"  see it again: from dmqfx.checking.verify import error_after; "
        rf"error_after\(program, step, ctx, fuel={error.fuel}, float64=True\)"
    )
    assert re.fullmatch(expected, str(error))
    assert error_after(program, step, context(), fuel=error.fuel) > error.limit
    assert error_after(program, step, context(), fuel=error.fuel - 1) < 1e-14


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count))))
def test_bisection_finds_the_first_wrong_application_in_few_runs(case: tuple[int, int]) -> None:
    count, first = case
    found = find_culprit(lambda fuel: fuel >= first, count)
    assert found.number == first
    assert found.runs <= 1 + math.ceil(math.log2(count))


@pytest.mark.parametrize(
    "name",
    [
        ("apply-scaling", "one channel is off by a thousandth"),
        ("canonicalize", "the arms of a concatenation are swapped"),
        ("insert-qdq", "an edge comes half a timestep late"),
        ("apply-scaling", "the ranges stay as they were"),
        ("lower-reference", "the zero point of the last group is off by one"),
        ("round-weights", "steps are a hundredth too wide"),
    ],
)
def test_every_kind_of_error_says_how_to_see_it_again(name: tuple[str, str]) -> None:
    mutant = BY_NAME[name]
    program, step, ctx = mutant.program(), mutant.make(), context(mutant.policy)
    with pytest.raises(VerifyError) as caught:
        verify(program, step, ctx)
    line = str(caught.value).partition("see it again: ")[2]
    named = {"dmqfx": dmqfx, "program": program, "step": step, "ctx": ctx}
    if line.startswith("dmqfx.verify"):
        with pytest.raises(VerifyError):
            eval(line, named)
        return
    statement, _, expression = line.partition("; ")
    exec(statement, named)
    assert eval(expression, named) == pytest.approx(caught.value.error)
    assert caught.value.error > caught.value.limit


def test_what_is_wrong_without_fuel_is_no_applications_fault() -> None:
    assert find_culprit(lambda fuel: True, 33).number == 0
    swap = BY_NAME["canonicalize", "the arms of a concatenation are swapped"]
    with pytest.raises(VerifyError, match="the pass changes more than it records") as caught:
        verify(swap.program(), swap.make(), context())
    assert caught.value.fuel == 0


# --- what is no program or no pass


def test_a_model_is_no_program_and_the_error_says_how_to_get_one() -> None:
    with pytest.raises(
        NotAProgramError, match=r"verify is for a Program .*, not a UNet.*pass dmqfx\.capture"
    ):
        verify(MODELS["unconditional"](), passes()["canonicalize"]())


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (passes()["canonicalize"], r"the class Canonicalize, not a pass; .*: create\('canonicalize'\)"),
        ("canonicalize", r"the name 'canonicalize', not a pass; .*: create\('canonicalize'\)"),
        (Program, r"the class Program, not a pass; .*: create\(name\)"),
        (None, r"None, not a pass; .*: create\(name\)"),
    ],
)
def test_what_is_no_pass_is_refused_with_what_to_pass(step: object, told: str) -> None:
    with pytest.raises(PipelineError, match=f"the step is {told}"):
        verify(toy(), step)
    with pytest.raises(PipelineError, match=f"step 1 is {told}"):
        Pipeline((step,)).run(toy(), PassContext())


# --- bugs that need a good eye


def test_a_forgotten_bias_shows_in_a_model_that_has_none_yet() -> None:
    program = fresh(FORGOTTEN.program())
    without = replace(context(), calibration=None)
    inputs = draw(program, generator())[0]
    wrong = FORGOTTEN.make().run(program, without)
    assert (
        distance(outputs(wrong, inputs)[0], outputs(program, inputs)[0]) < 1e-5
    )  # these probes do not see it
    with pytest.raises(VerifyError, match=r"rule 'absorb' at mid\.to_q"):
        verify(program, FORGOTTEN.make(), without)
    assert verify(program, passes()["absorb-scaling"](), without).error < 1e-14


@rule(p.conv2d(input=p.any("x")))
def cut_off(rw: Rewriter, root: fx.Node, x: fx.Node) -> Outcome:
    """conv(x)  ->  conv of the rows of x that there are at the example size, the rest zeros."""
    if root.meta["address"].path != "conv_in" or x.op != "placeholder":
        return None
    kept = rw.call(aten.slice.Tensor, near=root, self=x, dim=2, start=0, end=SPEC.sizes["H"])
    nothing = rw.call(aten.zeros_like.default, near=root, self=x)
    whole = rw.call(
        aten.slice_scatter.default, near=root, self=nothing, src=kept, dim=2, start=0, end=SPEC.sizes["H"]
    )
    return rw.like(root, input=whole)


@dataclass(frozen=True)
class CutOff(RewritePass):
    """Right at the example size and at every smaller one."""

    preserves: ClassVar[Preserves] = Preserves.BITWISE
    rules: ClassVar[tuple[Rule, ...]] = (cut_off,)


def test_what_is_wrong_beyond_the_example_size_is_found() -> None:
    with pytest.raises(VerifyError, match=r"rule 'cut_off' at conv_in/conv2d: .* probe 2 \(1x3x10x6\)"):
        verify(toy(), CutOff(), PassContext())


@dataclass(frozen=True)
class ScaleInPlace(Pass):
    """Doubles a weight that it shares with the program that it was given."""

    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, program: Program, ctx: PassContext) -> Program:
        after = program.fork()
        with torch.no_grad():
            after.weights()["mid.to_q.weight"].mul_(2.0)
        return after


def test_a_pass_that_writes_into_its_programs_weights_is_found() -> None:
    program = toy().astype(torch.float32)
    with pytest.raises(VerifyError):
        verify(program, ScaleInPlace(), PassContext())


@dataclass(frozen=True)
class ReorderInPlace(Pass):
    """Changes the order of a hidden layer's channels in both layers around it: nothing but memory tells."""

    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, program: Program, ctx: PassContext) -> Program:
        after = program.fork()
        for name, axis in (("linear_1.weight", 0), ("linear_1.bias", 0), ("linear_2.weight", 1)):
            weight = after.weights()[f"time_embedding.{name}"]
            with torch.no_grad():
                weight.copy_(weight.index_select(axis, torch.arange(12).roll(4)))
        return after


def test_a_pass_that_reorders_its_programs_weights_is_found_though_the_output_stays() -> None:
    program = toy().astype(torch.float64)
    inputs = draw(program, generator())[0]
    before = outputs(program, inputs)[0]
    with pytest.raises(VerifyError, match="reorder-in-place: changed the program that it was given"):
        verify(program, ReorderInPlace(), PassContext())
    torch.testing.assert_close(outputs(program, inputs)[0], before)
    with pytest.raises(RewriteError, match=r"wrote into time_embedding\.linear_1\.weight"):
        run_step(ReorderInPlace(), program, PassContext())


@dataclass(frozen=True)
class Damage(Pass):
    """Gives back what it was given, and has changed it by a way that `of` names."""

    preserves: ClassVar[Preserves] = Preserves.BITWISE
    of: str = "data"

    def run(self, program: Program, ctx: PassContext) -> Program:
        weight, ranges = program.weights()["conv_in.weight"], program.table.of(Range)
        match self.of:
            case "data":
                weight.data.mul_(1.001)
            case "array":
                array = weight.numpy()
                array *= 1.001
            case "table":
                for found in ranges.values():
                    found.low.mul_(2)
            case "codes":
                for codes in program.table.of(Codes).values():
                    codes.qparams.scale.mul_(2)
        return program.fork()


DAMAGE = (
    ("data", "flag-skips", r"conv_in\.weight"),
    ("array", "flag-skips", r"conv_in\.weight"),
    ("table", "pair-layers", r"Range of .*:input, low and \d+ more"),
    ("codes", "insert-qdq", r"Codes of .*:weight, qparams, scale and \d+ more"),
)


@pytest.mark.parametrize(("way", "meets", "told"), DAMAGE)
def test_a_checked_pipeline_finds_damage_to_what_a_pass_was_given(way: str, meets: str, told: str) -> None:
    def copied() -> Program:
        return program_before(meets).astype(torch.float32)  # tensors of its own

    with pytest.raises(VerifyError, match=rf"damage: changed the program that it was given \({told}"):
        Pipeline((Damage(way),)).run(copied(), context(), observe=checking())
    with pytest.raises(VerifyError):
        verify(copied(), Damage(way), context())
    Pipeline((Damage("nothing"),)).run(copied(), context(), observe=checking())


def test_damage_to_the_table_that_torch_counts_is_found_unchecked_too() -> None:
    program = program_before("pair-layers").astype(torch.float32)
    with pytest.raises(RewriteError, match=r"damage wrote into Range of .*:input, low, which it shares"):
        run_step(Damage("table"), program, context())


@dataclass(frozen=True)
class EditInPlace(Pass):
    """Does the right thing to the wrong graph: the one that it was given."""

    preserves: ClassVar[Preserves] = Preserves.BITWISE

    def run(self, program: Program, ctx: PassContext) -> Program:
        after = program.fork()
        for node in list(program.graph.nodes):
            if node.op == "call_function" and node.meta["address"].op == "dropout":
                node.replace_all_uses_with(node.all_input_nodes[0])
        program.gm.recompile()
        return after


def test_a_pass_that_edits_the_graph_it_was_given_is_found() -> None:
    with pytest.raises(VerifyError, match=r"edit-in-place: changed the program .* \(its graph\)"):
        verify(toy().fork(), EditInPlace(), PassContext())
    with pytest.raises(VerifyError, match=r"edit-in-place: changed the program .* \(its graph\)"):
        Pipeline((EditInPlace(),)).run(toy().fork(), PassContext(), observe=checking())


@dataclass(frozen=True)
class Overflow(Pass):
    """Lossy beyond measure."""

    preserves: ClassVar[Preserves] = Preserves.LOSSY

    def run(self, program: Program, ctx: PassContext) -> Program:
        rw = Rewriter(program, self.name(), ctx.journal)
        last = next(n for n in rw.graph.nodes if str(n.meta.get("address")) == "conv_out/conv2d")
        if ctx.journal.apply(last.meta["address"], "overflow"):
            with rw.before(last):
                rw.replace(last, rw.like(last, bias=torch.full((3,), math.inf, dtype=program.dtype)))
        return rw.finish()


def test_a_lossy_pass_may_lose_much_but_not_become_infinite() -> None:
    with pytest.raises(
        VerifyError, match="overflow, rule 'overflow' at conv_out/conv2d: an output that is not finite"
    ):
        verify(toy(), Overflow(), PassContext())


@dataclass(frozen=True)
class LieAboutQdq(Pass):
    """Provides a fact that does not hold."""

    provides: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.BITWISE

    def run(self, program: Program, ctx: PassContext) -> Program:
        return program.fork()


def test_a_fact_that_does_not_hold_is_refused() -> None:
    with pytest.raises(RewriteError, match="after lie-about-qdq the fact 'qdq'"):
        verify(program_before("insert-qdq"), LieAboutQdq(), context())


@dataclass(frozen=True)
class RefuseDoubles(Pass):
    """A kernel that exists in float32 alone."""

    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, program: Program, ctx: PassContext) -> Program:
        if program.dtype == torch.float64:
            raise RuntimeError("not implemented for 'Double'")
        return program.fork()


def test_a_pass_that_cannot_run_on_a_twin_is_checked_without_one() -> None:
    with pytest.raises(
        VerifyError, match=r"float64 twin \(not implemented for 'Double'\)\n  verify\(..., float64=False\)"
    ):
        verify(toy(), RefuseDoubles(), PassContext())
    assert verify(toy(), RefuseDoubles(), PassContext(), float64=False).error == 0


# --- probes


def test_probes_differ_in_batch_in_height_and_width_and_in_timesteps() -> None:
    first, second = draw(toy(), generator())
    assert first["sample"].shape == (3, 3, 8, 12)
    assert second["sample"].shape == (1, 3, 10, 6)
    assert len(set(first["timestep"].tolist())) == 3


def test_the_last_probe_has_no_residuals() -> None:
    residual = Input("mid_residual", ("B", 8, "H/2", "W/2"), "residual")
    spec = replace(SPEC, inputs=(*SPEC.inputs, residual))
    first, second = (probe["mid_residual"] for probe in draw(replace(toy(), inputs=spec), generator()))
    assert first.shape == (3, 8, 4, 6)
    assert first.abs().min() > 0
    assert second.shape == (1, 1, 1, 1)
    assert not second.any()


@pytest.mark.parametrize("multiple", [1, 2, 8, 32])
@pytest.mark.parametrize("side", [2, 3, 18, 64])
def test_probes_have_sizes_that_the_model_takes_and_one_goes_beyond_the_example(
    multiple: int, side: int
) -> None:
    spec = replace(SPEC, sizes={"B": 2, "H": side, "W": side, "T": 77}, multiple_of=multiple)
    for each in sizes(spec):
        assert each["H"] % multiple == each["W"] % multiple == 0
        assert each["H"] != each["W"]
    assert sizes(spec)[1]["H"] > side
    assert sizes(spec)[1]["T"] > 77
    assert multiple > 1 or (sizes(spec)[1]["H"] % 2, sizes(spec)[1]["W"] % 2) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_probes_at_edges_reach_every_group_from_both_ends(dtype: torch.dtype) -> None:
    program = program_before("insert-qdq").astype(dtype)
    edges = next(
        p.spec.boundaries for p in program.table.of(Planned).values() if p.spec and p.spec.boundaries
    )
    (probe,) = at_edges(program, generator())
    groups = faked.group_of(probe["timestep"], edges)
    assert groups.tolist() == [1, 0, 2, 1, 3, 2]
    moved = tuple(edge + 1e-3 for edge in edges)
    assert faked.group_of(probe["timestep"], moved).tolist() == [0, 0, 1, 1, 2, 2]
    assert at_edges(toy(), generator()) == []


def test_only_weights_that_are_all_alike_are_made_random() -> None:
    assert strong(toy(), generator()) is toy()
    weak = fresh(toy())
    made = strong(weak, generator())
    for name, weight in made.weights().items():
        if name.endswith("bias") or "norm" in name:
            assert weight.unique().numel() > 1
        else:
            assert weight.data_ptr() == toy().weights()[name].data_ptr()
    assert weak.weights()["norm_out.bias"].abs().max() == 0


# --- the second opinion


@given(st.lists(st.floats(1, 999), min_size=1, max_size=6, unique=True), st.data())
def test_both_opinions_agree_on_groups(edges: list[float], data: st.DataObject) -> None:
    edges = sorted(torch.tensor(edges).unique().tolist())
    times = data.draw(st.lists(st.one_of(st.sampled_from(edges), st.floats(0, 1000, width=32)), min_size=1))
    timestep = torch.tensor(times, dtype=torch.float32)
    assert torch.equal(faked.group_of(timestep, tuple(edges)), timestep_group(timestep, torch.tensor(edges)))


@pytest.mark.parametrize("grid", ["affine", "symmetric"])
@pytest.mark.parametrize("axis", [None, 1, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_both_opinions_agree_on_rounding(grid: quant.Grid, axis: int | None, bits: int) -> None:
    x = torch.randn(3, 5, 6, 5, dtype=torch.float64)
    low = -torch.rand(4, 5, dtype=torch.float64) - 0.1
    spec = QuantSpec(bits, grid, "tensor" if axis is None else "channel", boundaries=(1.0, 2.0, 3.0))
    params = quant.params_from_range(low, -2 * low, spec, axis or 1)
    group = torch.tensor([0, 3, 1])
    torch.testing.assert_close(
        faked.fake(x, params, group), quant.fake_quantize(x, params, group), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_both_opinions_agree_on_packing(bits: int, signed: bool) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = torch.randint(low, high, (3, 5), generator=generator()).to(torch.int8 if signed else torch.uint8)
    params = QParams(torch.ones(1, 3), torch.zeros(1, 3), low, high - 1, 0)
    entry = Codes(packing.pack(codes, bits), (3, 5), params)
    assert torch.equal(faked.unpacked(entry, bits), codes.double())


def test_a_tie_may_go_either_way_and_nothing_else_may() -> None:
    before = torch.tensor([0.5, 0.5 + 1e-12, 0.5 + 1e-6, 100.5, 100.49, 3.0], dtype=torch.float64)
    assert faked.near_tie(before, 1e-9).tolist() == [True, True, False, True, False, False]


# --- judges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_that_move_without_a_tie_are_found(dtype: torch.dtype) -> None:
    program = program_before("lower-reference").astype(dtype)
    judge = SameCodes(program, draw(program, generator()))
    assert not judge.judge(program).wrong
    bias = {n: w + 0.01 if n == "mid.norm1.bias" else w for n, w in program.weights().items()}
    found = judge.judge(replace(program, gm=clone(program.gm, bias)))
    assert found.wrong
    assert "other codes at mid.to_" in found.what
    assert 0 < found.error <= 1


def test_rounding_errors_are_no_fault_of_the_codes() -> None:
    program = program_before("lower-reference").astype(torch.float64)
    judge = SameCodes(program, draw(program, generator()))
    nudged = {n: w * (1 + 1e-13) if n == "mid.norm1.weight" else w for n, w in program.weights().items()}
    assert not judge.judge(replace(program, gm=clone(program.gm, nudged))).wrong


def rounding(nudge: float, dtype: torch.dtype) -> Program:
    """Codes of sample + nudge in steps of one, as numbers."""
    graph = fx.Graph()
    call, sample, _ = graph.call_function, graph.placeholder("sample"), graph.placeholder("timestep")
    constants = {"nudge": torch.tensor(nudge), "one": torch.ones(1, 1), "none": torch.zeros(1, 1)}
    held = {name: graph.get_attr(name) for name in constants}
    x = call(aten.add.Tensor, (sample, held["nudge"]))
    grid = (held["one"], held["none"])
    codes = call(torch.ops.dmqfx.quantize.default, (x, *grid, None, 1, 0, 255))
    graph.output(call(torch.ops.dmqfx.dequantize.default, (codes, *grid)))
    return program_of(graph, constants).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "side", "allowed"),
    [(torch.float32, 4, 8), (torch.float32, 200, 16), (torch.float64, 4, 1), (torch.float64, 600, 1)],
)
def test_more_ties_than_chance_has_are_an_error(dtype: torch.dtype, side: int, allowed: int) -> None:
    """One code in 10,000 of float32 and in a million of float64, and a few in any case; each of them is a tie."""
    for ties, wrong in ((allowed, False), (allowed + 1, True)):
        sample = torch.ones(1, 4, side, side, dtype=dtype)
        sample.view(-1)[:ties] = 2.5  # to even: 2, or 3 with a nudge
        judge = SameCodes(rounding(0.0, dtype), [{"sample": sample, "timestep": torch.zeros(1)}])
        found = judge.judge(rounding(1e-5 if dtype == torch.float32 else 1e-10, dtype))
        assert judge.ties == [(ties, 4 * side * side)]
        assert found.wrong == wrong
        assert (found.what.startswith("share of codes that differ"), found.error > 0) == (wrong, wrong)


@pytest.mark.parametrize(("judge", "least"), [(Equal, 1e-7), (Close, 1e-3)])
def test_a_judge_of_outputs_sees_a_difference_above_its_limit(
    judge: Callable[..., Equal], least: float
) -> None:
    looked = judge(toy(), draw(toy(), generator()))
    assert not looked.judge(toy()).wrong
    moved = {n: w * (1 + least) if n == "conv_out.weight" else w for n, w in toy().weights().items()}
    assert looked.judge(replace(toy(), gm=clone(toy().gm, moved))).wrong


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([3.0, 4.0], [0.0, 0.0], 5.0),
        ([1.0, 1.0], [1.0, 2.0], 1 / math.sqrt(5)),
        ([1.0, math.nan], [1.0, 2.0], math.inf),
        ([1.0, 2.0], [1.0, math.inf], math.inf),
    ],
)
def test_distance_is_relative_and_never_hides_what_is_not_finite(
    a: list[float], b: list[float], expected: float
) -> None:
    assert distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)
    assert distance(torch.zeros(2), torch.zeros(3)) == math.inf


# --- what the page says


def test_the_page_tells_the_limits_and_the_number_of_bugs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "verification.md").read_text()
    assert f"{len(MUTANTS)} planted bugs" in page
    told = {torch.float64: "1e-10", torch.float32: "1e-05", torch.float16: "0.01", torch.bfloat16: "0.05"}
    assert {dtype: f"{limit:g}" for dtype, limit in CLOSE.items()} == told
    for limit in told.values():
        assert f" {limit} " in page
    assert {torch.float64: 1e-9, torch.float32: 1e-4} == TIE
    assert "1e-9 (float64) or 1e-4 (float32)" in page


# --- shrunk models


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_shrunk_model_has_few_and_random_parameters(name: str) -> None:
    model = MODELS[name]()
    small = shrunk(model)
    assert type(small) is type(model)
    assert max(small.config.block_out_channels) <= max(32, *model.config.block_out_channels)
    for parameter in small.parameters():
        assert parameter.numel() < 8 or parameter.unique().numel() > 1


def test_a_shrunk_model_has_the_addresses_and_inputs_of_the_whole() -> None:
    model = MODELS["classes"](block_out_channels=(64,), norm_num_groups=32)
    whole, small = capture(model), capture(shrunk(model))
    assert [n.meta["address"] for n in small.calls()] == [n.meta["address"] for n in whole.calls()]
    assert [i.name for i in small.inputs.inputs] == [i.name for i in whole.inputs.inputs]


# --- ranges


@given(
    st.integers(0, 99), st.sampled_from([1e-9, 1e-7, 1e-3, 1.0]), st.sampled_from(["", "low", "high", "mean"])
)
def test_a_range_that_follows_its_tensor_has_the_room_it_had_however_narrow_a_channel_is(
    seed: int, width: float, damaged: str
) -> None:
    """The first channel has hardly any width, whose digits are lost in its ends; values that come later are far off."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    x[:32, 0] = 0.7 + width * torch.rand(32, generator=generator, dtype=torch.float64)
    gamma = 0.5 + torch.rand(5, generator=generator, dtype=torch.float64)
    group = torch.zeros(64, dtype=torch.int64)

    def range_of(x: Tensor) -> Range:
        part = x[:32]
        mean, variance = part.mean(0)[None], part.var(0, correction=0)[None]
        return Range(part.amin(0)[None], part.amax(0)[None], mean, variance, torch.tensor([32]), 1)

    was = range_of(x)
    now = replace(
        was,
        low=was.low / gamma,
        high=was.high / gamma,
        mean=was.mean / gamma,
        variance=was.variance / gamma**2,
    )
    if damaged:
        now = replace(now, **{damaged: getattr(now, damaged) + 0.01})
    seen = [Seen.of(each, group, 1, 1) for each in (x, x / gamma)]
    room = _change(was, seen[0], now, seen[1])
    assert room > 1e-3 if damaged else room < 1e-10
