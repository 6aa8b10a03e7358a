"""Norms in float by the native kernel, and the pass that has kernels compute what stayed float."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import context, edited, program_before, run_step
from test_kernels import here
from torch import Tensor, fx
from torch.nn import functional as F

from dmqfx.checking.verify import verify
from dmqfx.errors import VerifyError
from dmqfx.graph import ops
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.graph.rewrite import Rewriter
from dmqfx.runtime import timing
from dmqfx.runtime.costs import Cost, keep
from dmqfx.runtime.kernels.norms import group_norm_silu
from dmqfx.runtime.operators import OPS


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@given(st.data())
def test_every_instruction_set_gives_the_same_bits_near_the_exact_result(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    groups, each = data.draw(st.integers(1, 9)), data.draw(st.sampled_from((1, 2, 3, 7, 32)))
    sizes = (
        data.draw(st.sampled_from((1, 2, 7))),
        groups * each,
        data.draw(st.integers(2, 20)),
        data.draw(st.integers(1, 9)),
    )
    x = torch.randn(sizes, generator=generator) * 10 ** data.draw(st.floats(-3, 4)) + data.draw(
        st.sampled_from((0, -3, 100))
    )
    drawn = torch.randn(2, groups * each, generator=generator)
    weight, bias = (row if data.draw(st.booleans()) else None for row in drawn)
    eps = data.draw(st.sampled_from((1e-6, 1e-5, 0.1)))
    found = [group_norm_silu(last(x), groups, weight, bias, eps, isa) for isa in here()]
    assert all(torch.equal(one, found[0]) for one in found)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    of64 = (None if row is None else row.double() for row in (weight, bias))
    exact = F.silu(F.group_norm(x.double(), groups, *of64, eps))
    # what a channel far from 0 loses when it is rounded to float32 is lost to both
    spread = x.double().reshape(sizes[0], groups, -1)
    lost = 1e-6 + 2e-7 * float((spread.abs().amax(-1) / (spread.var(-1, unbiased=False) + eps).sqrt()).max())
    assert float((found[0] - exact).abs().max()) <= lost * (1 + float(drawn.abs().max()))


def test_the_number_of_threads_changes_nothing() -> None:
    x, threads = last(torch.randn(5, 64, 20, 20)), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 64):
            torch.set_num_threads(count)
            found.append(group_norm_silu(x, 32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


def test_all_else_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8, 4, 4)
    for other in (x, last(x).double(), x[0].mT, last(x)[:0], last(x).half()):
        assert torch.equal(group_norm_silu(other, 4), F.silu(F.group_norm(other, 4)))
    with pytest.raises(RuntimeError, match="divisible"):
        group_norm_silu(last(x), 3)
    with pytest.raises(RuntimeError, match="weight"):
        group_norm_silu(last(x), 4, torch.ones(1))
    monkeypatch.setattr(sys.modules[group_norm_silu.__module__], "library", lambda: None)
    assert torch.equal(group_norm_silu(last(x), 4), F.silu(F.group_norm(last(x), 4)))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_group(odd: float) -> None:
    x = torch.randn(2, 8, 4, 4)
    x[1, 3, 2, 1] = odd
    for isa in here():
        bad = ~group_norm_silu(last(x), 4, None, None, 1e-5, isa).isfinite()
        expected = torch.zeros_like(bad)
        expected[1, 2:4] = True
        assert torch.equal(bad, expected)


@pytest.mark.parametrize("form", ["last", "first", "slice"])
def test_the_operator_passes_the_checks_of_torch(form: str) -> None:
    x = torch.randn(2, 12, 4, 4)
    x = last(x)[:, :8] if form == "slice" else last(x[:, :8]) if form == "last" else x[:, :8].contiguous()
    results = torch.library.opcheck(
        OPS.kernel_group_norm_silu.default, (x, 4, torch.randn(8), torch.randn(8), 1e-5)
    )
    assert set(results.values()) == {"SUCCESS"}


# --- the pass


def lowered(**changed: object) -> tuple[int, list[str]]:
    """Kernels that the pass makes of the toy's attention with other arguments, and why it makes none."""

    def change(rw: Rewriter, node: fx.Node) -> fx.Node:
        return rw.like(node, **changed)

    program = program_before("lower-float")
    if changed:
        program = run_step(
            edited("scaled_dot_product_attention", change)("fuse"), program_before("fuse"), context()
        )
    after = run_step(create("lower-float"), program, context())
    reasons = [each.reason for each in after.log[-1].refused if each.at.op != "silu"]
    return len(list(after.calls("kernel_sdpa"))), reasons


def test_attention_over_few_keys_becomes_native() -> None:
    assert lowered() == (1, [])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"is_causal": True}, "it is causal"),
        ({"dropout_p": 0.1}, "it drops 0.1 of the softmax at random"),
        ({"scale": -1.0}, "its scale -1 is below 0"),
    ],
)
def test_other_attention_stays_and_says_why(changed: dict[str, object], reason: str) -> None:
    assert lowered(**changed) == (0, [reason])


def test_more_keys_stay_and_so_does_all_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[type(create("lower-float")).__module__]
    monkeypatch.setattr(module, "MOST_KEYS", 1)
    made, reasons = lowered()
    assert (made, len(reasons)) == (0, 1)
    assert "keys, more than 1: torch's kernel is the faster over many" in reasons[0]
    monkeypatch.setattr(module, "absent", lambda: "there is no library")
    assert lowered() == (0, ["there is no library"])


def test_what_bench_found_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DMQFX_CACHE", str(tmp_path))
    kinds = [
        each for each in timing.kinds(program_before("lower-reference")) if each.name.startswith("attention")
    ]
    assert [each.name for each in kinds] == ["attention 2x4"]
    cost = kinds[0].measure(0.01)
    assert min(cost.native, cost.otherwise) > 0
    key = (kinds[0].name, kinds[0].size)
    keep({key: Cost(2.0, 1.0)})
    assert lowered() == (0, ["native 2 ms, by torch 1 ms (dmqfx bench)"])
    keep({key: Cost(1.0, 2.0)})
    monkeypatch.setattr(sys.modules[type(create("lower-float")).__module__], "MOST_KEYS", 1)
    assert lowered() == (1, [])


def test_a_program_in_float64_stays_with_torch() -> None:
    program = program_before("lower-float").astype(torch.float64)
    after = run_step(create("lower-float"), program, context())
    attention, *norms = (each.reason for each in after.log[-1].refused)
    assert attention.startswith("the kernel takes float32 and heads of up to 1024 channels, not float64 of")
    assert set(norms) == {"the kernel takes images in float32, not 4 dimensions in float64"}


def laid_out() -> Program:
    """The toy with norms of what lies channels last."""

    def lay(rw: Rewriter, node: fx.Node) -> fx.Node:
        how = {"self": ops.args(node)["input"], "memory_format": torch.channels_last}
        return rw.like(node, input=rw.call(torch.ops.aten.contiguous.default, near=node, **how))

    return run_step(edited("group_norm", lay)("fuse"), program_before("fuse"), context())


def test_norms_that_fuse_left_become_native_where_they_lie_channels_last() -> None:
    norms = {"up.1/silu", "up.1/silu#2", "/silu"}
    left = run_step(create("lower-float"), program_before("lower-float"), context())
    reasons = {str(each.at): each.reason for each in left.log[-1].refused}
    assert reasons == dict.fromkeys(norms, "what it norms does not lie channels last")
    assert verify(laid_out(), create("lower-float"), context()).error < 1e-5
    after = run_step(create("lower-float"), laid_out(), context())
    assert {str(node.meta["address"]) for node in after.calls("kernel_group_norm_silu")} == norms
    assert not list(after.calls("group_norm"))
    assert len(list(after.calls("silu"))) == 1  # that of a time embedding


@pytest.mark.parametrize(
    "edit",
    [
        lambda rw, node: rw.like(node, num_groups=1),
        lambda rw, node: rw.like(node, weight=ops.args(node)["bias"], bias=ops.args(node)["weight"]),
        lambda rw, node: rw.like(node, eps=0.1),
    ],
)
def test_a_bug_in_norms_is_found(edit: Callable[[Rewriter, fx.Node], fx.Node]) -> None:
    with pytest.raises(VerifyError, match=r"up\.1/silu"):
        verify(laid_out(), edited("kernel_group_norm_silu", edit)("lower-float"), context())
