"""Attention in codes: the kernels' bits are those of plain torch, near attention in float."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import here
from torch import Tensor
from torch.nn import functional as F

from dmqfx.checking.judges import distance
from dmqfx.runtime.attention import qattention
from dmqfx.runtime.kernels.attend import attend
from dmqfx.runtime.kernels.native import library
from dmqfx.runtime.operators import OPS

Operands = tuple[Tensor, Tensor, Tensor]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """[B, heads, T, E] in another order of memory, with the same numbers."""
    match layout:
        case "tokens":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "channels":
            return x.mT.contiguous().mT
        case "wider":
            return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return x


def draw(data: st.DataObject) -> Operands:
    """Operands of any sizes, sizes that no block divides among them, and numbers that make codes go to their ends."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    sizes = data.draw(st.sampled_from(((9, 70), (30, 300), (3, 600), (70, 5))))
    batch, heads = data.draw(st.sampled_from((1, 2, 7))), data.draw(st.integers(1, 3))
    queries, keys = (data.draw(st.integers(1, size)) for size in sizes)
    width = data.draw(st.sampled_from((1, 3, 4, 15, 16, 17, 24, 40, 64, 100, 160)))
    q, k, v = (torch.randn(batch, heads, n, width, generator=generator) for n in (queries, keys, keys))
    match data.draw(
        st.sampled_from(("normal", "signs", "uneven", "constant", "far", "flat", "tiny", "opposite"))
    ):
        case "signs":
            q, k, v = q.sign(), k.sign(), v.sign()
        case "uneven":
            k = k * torch.randn(width, generator=generator).mul(4).exp()
            q = q / torch.randn(width, generator=generator).mul(4).exp()
        case "constant":
            q[:, :, ::2], k, v = 0, torch.ones_like(k), torch.full_like(v, 3.5)
        case "far":
            k, v = k + 1000, v - 50
        case "flat":
            q = q * 1e-6
        case "tiny":
            k, v = k * 1e-37, v * 1e-36
            q[:, :, ::2] = 1e-38
        case "opposite":  # every score is far below 0
            q, k = q.abs() + 1, -1 - k.abs()
    q = q * 10 ** data.draw(st.floats(-2, 1.5))
    layout = data.draw(st.sampled_from(("heads", "tokens", "channels", "wider")))
    return laid_out(q, layout), laid_out(k, layout), laid_out(v, layout)


@given(st.data())
def test_attention_has_the_bits_of_the_reference(data: st.DataObject) -> None:
    operands, bits = draw(data), data.draw(st.integers(2, 8))
    scale = data.draw(st.sampled_from((None, 0.0, 0.25, 1.0)))
    expected = qattention(*operands, scale, bits)
    for instruction_set in here():
        found = attend(*operands, scale, bits, instruction_set)
        assert torch.equal(found, expected), instruction_set
        assert found.transpose(1, 2).is_contiguous()
        assert expected.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("bits", "most"), [(8, 0.022), (7, 0.035), (4, 0.3)])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_attention_in_codes_is_near_attention_in_float(bits: int, most: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 40, generator=generator) for n in (64, 600, 600))
    q, k, v = q * spread, k + 5 * torch.randn(40, generator=generator), v + 2
    exact = F.scaled_dot_product_attention(*(each.double() for each in (q, k, v)))
    error = distance(attend(q, k, v, bits=bits).double() - 2, exact - 2)
    assert error < most * max(1, spread / 1.5)
    assert error > 1e-3  # these are codes


def test_channels_of_unlike_size_keep_their_share() -> None:
    """One scale for all channels of keys would leave nothing of most of them."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, 32, generator=generator) for n in (50, 200, 200))
    q[..., :2] /= 30
    k[..., :2] *= 30
    exact = F.scaled_dot_product_attention(q, k, v)
    step = k.abs().max() / 127
    blunt = F.scaled_dot_product_attention(q, (k / step).round() * step, v)
    assert distance(attend(q, k, v), exact) < distance(blunt, exact) / 3


@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_the_number_of_threads_changes_nothing_even_where_it_exceeds_the_work(count: int) -> None:
    many, few = (tuple(torch.randn(2, 3, n, 24) for n in sizes) for sizes in ((200, 150, 150), (20, 50, 50)))
    expected, threads = [qattention(*many), qattention(*few)], torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        for instruction_set in here():
            found = [attend(*operands, None, 8, instruction_set) for operands in (many, few)]
            assert all(map(torch.equal, found, expected)), instruction_set
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_callers_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    operands = tuple(torch.randn(1, 2, n, 40) for n in (30, 70, 70))
    expected, before = attend(*operands), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = attend(*operands)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_operands_may_share_memory_and_begin_anywhere() -> None:
    whole = torch.randn(2 * 3 * 50 * 20 + 1)[1:].view(2, 3, 50, 20)
    one = torch.randn(1, 1, 50, 20).expand(2, 3, 50, 20)
    for operands in (
        (whole, one, whole),
        (one, whole, one),
        (whole[:, :, 1:, 1:17], *[whole[:, :, 3:, 1:17]] * 2),
    ):
        expected = qattention(*(each.clone() for each in operands))
        for instruction_set in here():
            assert torch.equal(attend(*operands, None, 8, instruction_set), expected)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8), (1, 1, 1, 1, 1)])
def test_attention_of_nothing(shape: tuple[int, ...]) -> None:
    batch, heads, queries, keys, width = shape
    q, k, v = (torch.randn(batch, heads, n, width) for n in (queries, keys, keys))
    for found in (attend(q, k, v), qattention(q, k, v)):
        assert found.shape == q.shape
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_is_not_hidden(which: int, odd: float) -> None:
    """A row of queries spoils its own result, a key its head, a value its channel, as far as they reach in float."""
    operands = [torch.randn(2, 2, n, 20) for n in (30, 40, 40)]
    operands[which][1, 0, 7, 3] = odd
    spoiled = (slice(7, 8), slice(None), slice(None))[which], (slice(None), slice(None), slice(3, 4))[which]
    for found in (qattention(*operands), *(attend(*operands, None, 8, each) for each in here())):
        bad = ~found.isfinite()
        expected = torch.zeros_like(bad)
        expected[1, 0][spoiled] = True
        assert torch.equal(bad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_plain_torch(dtype: torch.dtype) -> None:
    operands = tuple(torch.randn(1, 2, n, 16).to(dtype) for n in (5, 9, 9))
    found = attend(*operands)
    assert found.dtype == dtype
    assert distance(found, attend(*(each.float() for each in operands))) < 1e-2


@pytest.mark.parametrize("function", [attend, qattention])
def test_what_does_not_fit_is_refused_by_name(function: object) -> None:
    assert callable(function)
    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 4, 8)
    for wrong in ((q, k, k[..., :7]), (q, k[..., :7], k[..., :7]), (q, k[:1], k[:1]), (q[0], k[0], k[0])):
        with pytest.raises(ValueError, match=r"attention of \[.*\]: need \[B, heads, T, E\]"):
            function(*wrong)
    with pytest.raises(ValueError, match="codes of 9 bits"):
        function(q, k, k, None, 9)
    with pytest.raises(ValueError, match="scale -1: need 2 to 8, and none below 0"):
        function(q, k, k, -1.0)


def test_wide_heads_are_exact_too() -> None:
    q, k, v = (torch.randn(1, 1, n, 1024).sign() for n in (4, 5, 5))
    assert torch.equal(attend(q, k, v), qattention(q, k, v))


@pytest.mark.parametrize("operator", [OPS.qattention, OPS.kernel_attention])
def test_the_operators_pass_the_checks_of_torch(operator: torch._ops.OpOverloadPacket) -> None:
    operands = tuple(torch.randn(2, 5, n, 8) for n in (3, 6, 6))
    results = torch.library.opcheck(operator.default, (*operands, None, 7))
    assert set(results.values()) == {"SUCCESS"}


def test_no_kernel_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = tuple(torch.randn(1, 2, n, 8) for n in (3, 6, 6))
    native = attend(*operands)
    assert library() is not None
    monkeypatch.setattr(sys.modules[attend.__module__], "library", lambda: None)
    assert torch.equal(attend(*operands), native)
