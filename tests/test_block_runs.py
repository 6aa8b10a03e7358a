"""What learning blocks shares with a sweep: words about time and memory, a budget, a run directory, other processes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import context, program_before
from sweeping import bits, changed
from torch import Tensor

from dmqfx.errors import CalibrationError
from dmqfx.graph.blocks import Block, units
from dmqfx.graph.pipeline import PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.graph.table import Entry, Table
from dmqfx.numbers import speeds
from dmqfx.numbers.adaround import Annealing
from dmqfx.passes import reconstruct_blocks
from dmqfx.sweep.blocktrial import BlockTrial
from dmqfx.sweep.blockwalk import Arrival, BlockWalk
from dmqfx.sweep.budget import Budget
from dmqfx.sweep.chunks import chunked
from dmqfx.sweep.run import Written, packed, unpacked

QUICK = {"rows": 8, "batch": 4, "iterations": 12, "rate": 0.1}
ORDER = ["down/add#1", "mid/add#1", "up.0/add#1", "up.1/add#1"]


def before() -> Program:
    return program_before("reconstruct-blocks", "shifts")


def ready(folder: Path | None = None, **changes: Any) -> PassContext:
    return replace(context("shifts"), run_dir=folder, **changes)


def learned(ctx: PassContext, **options: object) -> Program:
    return run_step(create("reconstruct-blocks", {**QUICK, **options}), before(), ctx)


@contextmanager
def watched(stop: str = "") -> Iterator[list[str]]:
    """The blocks that are learned in earnest; one of them may be the last, as if a user had had enough."""
    learn, seen = reconstruct_blocks.reconstructed, list[str]()

    def watch(
        program: Program, table: Table, block: Block, arrivals: Sequence[Arrival], how: Annealing, **more: Any
    ) -> object:
        if how.iterations == QUICK["iterations"]:  # the trial learns for less
            if str(block.at) == stop:
                raise KeyboardInterrupt
            seen.append(str(block.at))
        return learn(program, table, block, arrivals, how, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct_blocks, "reconstructed", watch)
        yield seen


@pytest.mark.parametrize(
    ("at", "where"),
    [
        pytest.param(ORDER[0], "blocks", marks=pytest.mark.slow),
        (ORDER[2], "blocks"),
        ("downsample/conv2d", "all"),
    ],
)
def test_a_finished_block_is_not_learned_again_and_the_bits_are_those_of_a_whole_run(
    tmp_path: Path, at: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    with watched() as order, caplog.at_level(logging.INFO, "dmqfx"):
        whole = learned(ready(), where=where)
    assert [each for each in order if each in ORDER] == ORDER
    assert (order == ORDER) == (where == "blocks")
    what = "blocks" if where == "blocks" else "blocks and layers"
    assert f"reconstruct-blocks over {len(order)} {what}, 8 calibration rows" in caplog.text
    with watched(stop=at) as seen, pytest.raises(KeyboardInterrupt):
        learned(ready(tmp_path), where=where)
    assert seen == order[: order.index(at)]
    with watched() as seen:
        after = learned(ready(tmp_path), where=where)
    assert seen == order[order.index(at) :]
    assert bits(after.table) == bits(whole.table)
    assert (after.log[-1].applied, after.log[-1].refused) == (whole.log[-1].applied, whole.log[-1].refused)


def test_a_finished_run_is_read_and_other_options_are_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = learned(ready(tmp_path))
    with watched() as seen:
        learned(ready(tmp_path), settling=2.0)
    assert seen == ORDER
    assert "had other passes; it is not used" in caplog.text

    def never(walk: BlockWalk, visit: object) -> None:
        raise AssertionError("the graph was walked")

    monkeypatch.setattr(BlockWalk, "run", never)
    second = learned(ready(tmp_path))
    assert bits(second.table) == bits(first.table)
    assert second.log[-1].applied == first.log[-1].applied


def test_time_and_memory_are_told_before_and_the_time_after(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dmqfx"):
        learned(ready())
    (before_,) = [record for record in caplog.records if hasattr(record, "memory")]
    (after,) = [record for record in caplog.records if hasattr(record, "took")]
    assert before_.getMessage().startswith("reconstruct-blocks over 4 blocks, 8 calibration rows, about ")
    assert before_.created <= after.created
    assert before_.memory > 0
    assert after.what == "reconstruct-blocks"
    assert after.took > 0
    assert after.estimated > 0


def test_a_budget_takes_rows_and_iterations_and_the_record_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dmqfx"):
        little = learned(ready(tmp_path, budget=Budget(1e-3)), iterations=32)
    assert "rows=1, batch=4, iterations=2," in little.log[-1].note
    assert "more than its share of the budget of 0.0 s, 0.0 s, and the least there is" in caplog.text
    again = learned(ready(tmp_path, budget=Budget(1e-3)), iterations=32)
    assert again.log[-1].note == little.log[-1].note
    assert bits(again.table) == bits(little.table)
    much = learned(ready(budget=Budget(3600.0)), iterations=2)
    assert "rows=8, batch=4, iterations=8," in much.log[-1].note


class Clock:
    """A clock that stands still unless it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_trial_tells_steps_looks_and_the_rest_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, practised = Clock(), list[str]()
    monkeypatch.setattr(speeds, "clock", clock)

    def practice(
        program: Program, table: Table, block: Block, arrivals: Sequence[Arrival], iterations: int
    ) -> None:
        practised.append(str(block.at))
        clock.now += 5 + 2 * len(arrivals) + 3 * iterations

    data = ready().calibration
    assert data is not None
    chunk = next(chunked(data, before(), 4))
    trial = BlockTrial.of(before(), chunk, units(before()), practice)
    assert trial.seconds(rows=4, iterations=10) == pytest.approx([5 + 2 + 3 * 10] * 4)
    assert trial.seconds(rows=16, iterations=100) == pytest.approx([5 + 2 * 4 + 3 * 100] * 4)
    assert trial.seconds(rows=2, iterations=10) == pytest.approx([5 + 1 + 3 * 5] * 4)
    assert trial.seconds(rows=4, iterations=10, finished=3) == pytest.approx([0.0] * 3 + [37.0])
    assert set(practised) <= set(ORDER)


def test_more_rows_take_more_memory_and_what_has_no_room_goes_to_disk() -> None:
    data = ready().calibration
    assert data is not None
    chunk = next(chunked(data, before(), 4))
    trial = BlockTrial.of(before(), chunk, units(before()), lambda *given: None)
    roomy, tight = trial.estimate(64, 1, 2**30), trial.estimate(64, 1, trial.beside(64) + 1000)
    assert roomy.disk == 0
    assert tight.memory == trial.beside(64) + 1000
    assert tight.memory + tight.disk == roomy.memory
    assert trial.estimate(128, 1, 2**30).memory > roomy.memory
    assert roomy.memory > 16 * trial.kept


def test_a_memory_budget_that_is_too_small_is_said(caplog: pytest.LogCaptureFixture) -> None:
    learned(ready(memory=1000))
    assert "more than the memory budget of 1 kB: learning a block takes as much" in caplog.text


# --- what is not finite


def spoiled(name: str, change: Callable[[Tensor], Tensor]) -> Program:
    return changed(before(), **{name.replace(".", "__"): change})


def test_a_weight_that_is_not_finite_is_named() -> None:
    def broken(weight: Tensor) -> Tensor:
        weight[0] = float("nan")
        return weight

    name = next(name for name in before().weights() if name.endswith("mid.proj.weight"))
    with pytest.raises(CalibrationError, match=r"mid\.proj.* holds nan"):
        run_step(create("reconstruct-blocks", QUICK), spoiled(name, broken), ready())


def test_a_value_that_overflows_is_named_with_its_operation_and_the_recorded_row() -> None:
    data = ready().calibration
    assert data is not None
    at = len(data) - 2
    (group,) = data.groups
    column = group.columns["sample"]
    values = column.values.clone()
    values[column.index[at]] = 3e38
    columns = {**group.columns, "sample": replace(column, values=values)}
    spoilt = replace(data, groups=(replace(group, columns=columns),))
    with pytest.raises(CalibrationError, match=rf"/\S+: the .* is not finite for calibration row {at} \("):
        learned(ready(calibration=spoilt), rows=len(data))


# --- several processes


def test_what_a_turn_wrote_arrives_as_it_was_sent() -> None:
    entries: list[tuple[Any, Entry]] = list(before().table)[:40]
    written = Written(tuple(entries), ((entries[0][0], "Codes"),), ((),), ((),))
    got = unpacked(packed(written), torch.device("cpu"))
    assert bits(Table().put_all(dict(got.entries))) == bits(Table().put_all(dict(entries)))
    assert got.dropped == written.dropped
    assert [site for site, _ in got.entries] == [site for site, _ in entries]


def test_the_bar_tells_the_loss_of_each_block(capsys: pytest.CaptureFixture[str]) -> None:
    learned(ready(progress=True))
    told = re.findall(r"(\d)/4 (\S+), loss before ([0-9.e-]+)", capsys.readouterr().err)
    assert {(number, at) for number, at, _ in told} == {(str(k), ORDER[k - 1]) for k in (2, 3, 4)}
    assert all(float(loss) > 0 for _, _, loss in told)
