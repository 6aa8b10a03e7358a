"""Graphs lose their in-place operators and keep their meaning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dmqfx.errors import CaptureError
from dmqfx.frontend.inplace import remove_inplace


def plain(function: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    gm = make_fx(function)(torch.ones(4))
    remove_inplace(gm.graph, lambda _: "somewhere")
    gm.recompile()
    return gm


def later_reads_see_the_change(x: Tensor) -> Tensor:
    y = x + 1
    y.mul_(3)
    y.sub_(x)
    return y * y


def an_earlier_read_does_not_see_it(x: Tensor) -> Tensor:
    y = x + 1
    before = y * 5
    y.mul_(3)
    return before + y


def a_detached_constant(x: Tensor) -> Tensor:
    return (x * 2).detach_() + 1


def an_earlier_view_that_is_read_no_more(x: Tensor) -> Tensor:
    y = x + 1
    total = y.view(2, 2).sum()
    y.div_(total)
    return y


@pytest.mark.parametrize(
    "function",
    [
        later_reads_see_the_change,
        an_earlier_read_does_not_see_it,
        a_detached_constant,
        an_earlier_view_that_is_read_no_more,
    ],
)
def test_a_graph_means_the_same_without_in_place_operators(function: Callable[[Tensor], Tensor]) -> None:
    gm = plain(function)
    calls = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert not any(target._schema.is_mutable for target in calls)
    x = torch.randn(4)
    assert torch.equal(gm(x.clone()), function(x.clone()))


def changes_its_input(x: Tensor) -> Tensor:
    return x.mul_(2)


def changes_through_a_view(x: Tensor) -> Tensor:
    y = x + 1
    y.view(2, 2).mul_(3)
    return y


def changes_what_a_view_shows(x: Tensor) -> Tensor:
    y = x + 1
    view = y.view(2, 2).view(4)
    y.mul_(3)
    return view


@pytest.mark.parametrize("function", [changes_its_input, changes_through_a_view, changes_what_a_view_shows])
def test_a_change_that_something_else_sees_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match="memory that something else reads") as caught:
        plain(function)
    assert caught.value.address == "somewhere"
    assert caught.value.operator == "aten.mul_.Tensor"
