"""How much memory work takes, forward and back: counted where the answer is known, and kept to where there is little."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import context, program_before
from torch.utils.checkpoint import checkpoint

from dmqfx.graph.program import Program
from dmqfx.sweep.chunks import Chunk, chunked
from dmqfx.sweep.endtoend import Objective, Steps, practise
from dmqfx.sweep.network import Network, Room
from dmqfx.sweep.wayback import Peak

EACH = 4 * 1000


@given(widths=st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_what_lives_at_once_is_counted_and_what_is_gone_is_not(widths: list[int]) -> None:
    with Peak() as peak:
        for width in widths:
            made = torch.ones(width, 1000)
            del made
    assert peak.nbytes == EACH * max(widths)
    with Peak() as peak:
        kept = [torch.ones(width, 1000) for width in widths]
    assert peak.nbytes == EACH * sum(widths)
    with Peak() as peak:
        for each in kept:
            each.view(-1)[1:].add_(1)
    assert peak.nbytes == 0


def test_the_way_back_counts_and_what_is_computed_again_counts_less() -> None:
    weights = [torch.randn(100, 100).requires_grad_() for _ in range(8)]
    layer, slopes = 4 * 5000 * 100, sum(each.nbytes for each in weights)

    def through(x: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
        for weight in own:
            x = (x @ weight).tanh()
        return x

    with Peak() as whole:
        through(torch.ones(5000, 100), *weights).sum().backward()  # type: ignore[no-untyped-call]  # torch has no types for it
    assert 8 * layer + slopes <= whole.nbytes <= 13 * layer + slopes
    for each in weights:
        each.grad = None
    with Peak() as spared:
        x = torch.ones(5000, 100, requires_grad=True)
        for k in range(0, 8, 2):
            x = checkpoint(through, x, *weights[k : k + 2], use_reentrant=False)
        x.sum().backward()  # type: ignore[no-untyped-call]  # torch has no types for it
    assert 5 * layer + slopes <= spared.nbytes < whole.nbytes


@pytest.mark.parametrize(
    "share", [pytest.param(0.9, marks=pytest.mark.slow), pytest.param(0.5, marks=pytest.mark.slow), 0.3]
)
def test_rows_and_what_they_keep_give_way_until_a_step_of_learning_fits(share: float) -> None:
    program, chunk = _batch()
    network = Network(program)
    steps = Steps(program, program.table, network.nodes)
    learn = partial(practise, network, steps)
    rows = len(chunk.timestep)
    generous = network.tried(Room(sparing=False, rows=rows, nbytes=0), chunk, 2**40, learn)
    assert (generous.sparing, generous.rows) == (False, rows)
    memory = int(share * generous.nbytes)
    tight = network.tried(Room(sparing=False, rows=rows, nbytes=0), chunk, memory, learn)
    assert tight.sparing
    assert network.sparing
    assert tight.nbytes <= memory
    for room in (generous, tight):
        network.sparing = room.sparing
        with Peak() as peak:
            learn(chunk.part(slice(room.rows)))
        assert peak.nbytes == pytest.approx(room.nbytes, rel=0.05)
    least = network.tried(Room(sparing=False, rows=rows, nbytes=0), chunk, 1, learn)
    assert (least.sparing, least.rows) == (True, 1)
    assert least.nbytes > 1  # what one row takes is told, though it is too much


def _batch() -> tuple[Program, Chunk]:
    program = program_before("learn-steps", "shifts")
    data = context("shifts").calibration
    assert data is not None
    return program, next(chunked(data, program, 4))


@pytest.mark.parametrize("portion", [1, 3, 4])
def test_no_look_is_at_more_rows_than_there_is_room_for(
    portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, chunk = _batch()
    network = Network(program)
    steps = Steps(program, program.table, network.nodes)
    seen, honest = list[int](), Network.__call__

    def counted(self: Network, part: Chunk, *more: Any) -> torch.Tensor:
        seen.append(len(part.timestep))
        return honest(self, part, *more)

    monkeypatch.setattr(Network, "__call__", counted)
    objective = Objective(network, [chunk], torch.tensor([500.0]), portion)
    objective.begin(steps)
    assert max(seen) == portion
    assert sum(seen) == 2 * len(chunk.timestep)
    whole = Objective(network, [chunk], torch.tensor([500.0]), 99)
    whole.begin(steps)
    assert torch.allclose(objective.wanted[0], whole.wanted[0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(objective.weight, whole.weight, rtol=1e-3)
