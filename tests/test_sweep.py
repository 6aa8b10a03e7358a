"""What a sweep's result depends on, and what it does not: chunks, memory, threads, neighbours."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from sweeping import SWEEP, bits, chain, context, output_noise, planned, recorded, swept

from dmqfx.errors import CalibrationError
from dmqfx.graph.address import Site
from dmqfx.graph.facts import PLANNED, Fact
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry, Range
from dmqfx.sweep import joint
from dmqfx.sweep.rows import Rows
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Turn
from dmqfx.sweep.walk import Walk


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Walk]:
    """The walks that sweeps make, as they are made."""
    made: list[Walk] = []

    class Seen(Walk):
        def __init__(self, *arguments: object, **named: object) -> None:
            super().__init__(*arguments, **named)
            made.append(self)

    monkeypatch.setattr(joint, "Walk", Seen)
    return made


def program_of(name: str) -> Program:
    return chain() if name == "chain" else planned(name)


# --- memory


@pytest.mark.parametrize("name", ["toy", "chain"])
def test_the_memory_budget_changes_no_bit(name: str, walks: list[Walk]) -> None:
    program = program_of(name)
    ctx = context(recorded(program, 5, 3, sizes={"H": 24, "W": 16}))
    roomy = swept(program, ctx, rows_of(8))
    most, working = walks[0].values.peak, ctx.memory - walks[0].values.budget
    for share in (1.0, 0.6, 0.3):
        tight = swept(program, replace(ctx, memory=working + int(most * share)), rows_of(8))
        assert bits(tight.table) == bits(roomy.table)
        assert walks[-1].values.peak <= most * share
    assert [walk.values.on_disk > 0 for walk in walks] == [False, False, True, True]


def test_nothing_but_a_problems_rows_need_be_in_memory(walks: list[Walk]) -> None:
    """With room for the rows alone everything else goes by way of the disk."""
    program = chain()
    ctx = context(recorded(program, 9))
    roomy = swept(program, ctx, rows_of(9))
    working = ctx.memory - walks[0].values.budget
    with pytest.raises(
        CalibrationError, match=r"9 rows of conv0/conv2d:input take .* the memory budget are left"
    ):
        swept(program, replace(ctx, memory=working), rows_of(9))
    least = 9 * 8 * 9 * 4 * 2 * 2
    tight = swept(program, replace(ctx, memory=working + least), rows_of(9))
    assert bits(tight.table) == bits(roomy.table)
    assert walks[-1].values.peak <= least
    assert walks[-1].values.on_disk > 0


def rows_of(count: int) -> list[tuple[str, dict[str, object]]]:
    return [SWEEP[0], ("round-weights", {"method": "gptq", "rows": count})]


def test_a_budget_without_room_for_a_chunk_is_refused_with_the_least() -> None:
    program = chain(width=64)
    ctx = context(recorded(program, 4, sizes={"H": 64, "W": 64}))
    with pytest.raises(
        CalibrationError, match=r"of 1 MB has no room for 4 .* which take \d+ MB\n  mend"
    ) as error:
        swept(program, replace(ctx, memory=2**20))
    least = int(str(error.value).split(" which take ")[1].split()[0])
    swept(program, replace(ctx, memory=(least + 1) * 2**20), rows_of(4))


def test_a_value_is_let_go_when_nobody_reads_it_any_more(walks: list[Walk]) -> None:
    """In a chain one tensor waits for its turn, in both networks; before it the timestep's path."""
    program = chain()
    rows = 8 * 8 * 6 * 8 * 4
    swept(program, context(recorded(program, 8)), SWEEP[:1])
    assert walks[0].values.peak <= 2 * 2 * rows + 100 * 4


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
from sweeping import *
import torch
torch.set_num_threads(1)

def peak():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) // 1024

program = chain(6, 32)
data = recorded(program, 64, sizes={"H": 64, "W": 64})
ctx = context(data, memory=int(sys.argv[2]) * 2**20)
swept(program, replace(ctx, calibration=data.select(4, torch.Generator())))  # what is made once is there now
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = peak()
swept(program, ctx)
print(peak() - before)
"""


def grown(memory: int) -> int:
    """By how many MB a process grows that sweeps within so many."""
    arguments = [sys.executable, "-c", PEAK, str(Path(__file__).parent), str(memory)]
    given_back = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # what is freed is not kept by the allocator
    found = subprocess.run(arguments, capture_output=True, text=True, check=True, env=given_back)
    return int(found.stdout)


def test_a_process_stays_within_its_budget() -> None:
    """Two tensors of 32 MB, input and output of a layer, are alive at a time: 40 MB force some of it to disk.

    A tenth is for what is no tensor.
    """
    assert grown(1000) > 60
    assert grown(40) <= 44


# --- chunks


@pytest.mark.parametrize("name", ["toy", "unconditional"])
def test_chunks_of_other_sizes_change_the_order_of_sums_and_nothing_else(name: str) -> None:
    """As long as nothing is rounded, ranges are the same but for last digits."""
    program = program_of(name)
    data = recorded(program, 7, 4)
    one, other = (swept(program, context(data, chunk=size), (), Observe()).table for size in (3, 11))
    for site, seen in one.of(Range).items():
        again = other.of(Range)[site]
        for a, b in ((seen.low, again.low), (seen.high, again.high), (seen.mean, again.mean)):
            assert float((a - b).abs().max()) <= 1e-5 * float((seen.high - seen.low).max())
        assert torch.equal(seen.count, again.count)


@pytest.mark.parametrize("name", ["toy", "unconditional"])
def test_of_chunks_of_other_sizes_the_result_is_as_good(name: str) -> None:
    """A last digit decides about a number that stands between two codes, and so about all that follows: where
    the network is rounded no code is promised, but the quality is, within half a decibel.
    """
    program = program_of(name)
    data = recorded(program, 7, 4)
    noise = [output_noise(swept(program, context(data, chunk=size)), data) for size in (3, 11)]
    assert abs(20 * math.log10(noise[0] / noise[1])) < 0.5
    assert 0 < noise[0] < 0.5


@dataclass(frozen=True)
class Observe(SweepPass):
    """Writes ranges and rounds nothing."""

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})

    def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
        for reader in turn.readers:
            if reader.spec is not None:
                yield reader.site, turn.range(reader.spec.boundaries)


def test_the_rows_of_a_problem_do_not_depend_on_the_chunks() -> None:
    found = []
    for size in (1, 4, 9):
        seen: list[Rows] = []
        swept(chain(), context(recorded(chain(), 9), chunk=size), (), Sample(seen))
        found.append(seen[0])
    assert all(torch.equal(found[0].real, each.real) for each in found)
    assert all(torch.equal(found[0].sample, each.sample) for each in found)


@dataclass(frozen=True)
class Sample(SweepPass):
    """Keeps the rows that it is given for the first reader of every turn."""

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    seen: list[Rows]
    count: int = 20

    def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
        self.seen.append(turn.rows(turn.readers[0], self.count))
        return ()
