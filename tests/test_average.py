"""Attention in float by the native kernel: the same bits from every instruction set, about as exact as torch's."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_attend import draw
from test_kernels import here
from torch.nn import functional as F

from dmqfx.checking.judges import distance
from dmqfx.runtime.kernels.attend import average
from dmqfx.runtime.operators import OPS


@given(st.data())
def test_every_instruction_set_gives_the_same_bits_about_as_near_the_exact_result_as_torch(
    data: st.DataObject,
) -> None:
    operands = draw(data)
    scale = data.draw(st.sampled_from((None, 0.0, 0.25, 1.0)))
    found = [average(*operands, scale, instruction_set) for instruction_set in here()]
    assert all(torch.equal(each, found[0]) for each in found)
    assert found[0].transpose(1, 2).is_contiguous()
    exact = F.scaled_dot_product_attention(*(each.double() for each in operands), scale=scale)
    theirs = distance(F.scaled_dot_product_attention(*operands, scale=scale), exact)
    assert distance(found[0], exact) < 20 * theirs + 2e-6  # sums of up to 160 products one by one


@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_the_number_of_threads_changes_nothing_even_where_it_exceeds_the_work(count: int) -> None:
    many, few = (tuple(torch.randn(2, 3, n, 24) for n in sizes) for sizes in ((200, 50, 50), (20, 9, 9)))
    expected, threads = [average(*many), average(*few)], torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        for instruction_set in here():
            found = [average(*operands, None, instruction_set) for operands in (many, few)]
            assert all(map(torch.equal, found, expected)), instruction_set
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8), (1, 1, 1, 1, 1)])
def test_attention_of_nothing(shape: tuple[int, ...]) -> None:
    batch, heads, queries, keys, width = shape
    q, k, v = (torch.randn(batch, heads, n, width) for n in (queries, keys, keys))
    torch.testing.assert_close(average(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_is_not_hidden(which: int, odd: float) -> None:
    """A row of queries spoils its own result, a key its head, a value its channel; what comes behind is as it was."""
    operands = [torch.randn(2, 2, n, 20) for n in (40, 30, 30)]
    operands[which][0, 1, 7, 3] = odd
    spoiled = (slice(7, 8), slice(None), slice(None))[which], (slice(None), slice(None), slice(3, 4))[which]
    for instruction_set in here():
        bad = ~average(*operands, None, instruction_set).isfinite()
        expected = torch.zeros_like(bad)
        expected[0, 1][spoiled] = True
        assert torch.equal(bad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype) -> None:
    operands = tuple(torch.randn(1, 2, n, 16).to(dtype) for n in (5, 9, 9))
    assert torch.equal(average(*operands), F.scaled_dot_product_attention(*operands))


@pytest.mark.parametrize("scale", [-1.0, math.inf, 1e300])
def test_other_scales_shapes_and_many_keys_are_left_to_torch(scale: float) -> None:
    q, k, v = (torch.randn(1, 2, n, 16) for n in (5, 9, 9))
    many = torch.randn(1, 2, 600, 16)
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
    torch.testing.assert_close(average(q, k, v, scale), expected, rtol=0, atol=0, equal_nan=True)
    for operands in ((q[0], k[0], v[0]), (q, many, many), (q, k, v[..., :8])):
        assert torch.equal(average(*operands), F.scaled_dot_product_attention(*operands))


def test_the_operator_passes_the_checks_of_torch() -> None:
    operands = tuple(torch.randn(2, 5, n, 8) for n in (3, 6, 6))
    assert set(torch.library.opcheck(OPS.kernel_sdpa.default, operands).values()) == {"SUCCESS"}


def test_no_kernel_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = tuple(torch.randn(1, 2, n, 8) for n in (3, 6, 6))
    monkeypatch.setattr(sys.modules[average.__module__], "library", lambda: None)
    assert torch.equal(average(*operands), F.scaled_dot_product_attention(*operands))
