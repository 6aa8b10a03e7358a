"""What a sweep's result depends on, and what it does not: chunks, memory, threads, neighbours."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
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
from dmqfx.graph.table import Codes, Entry, Planned, Range, Table
from dmqfx.sweep import joint
from dmqfx.sweep.rows import Rows
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Reader, Turn
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


@pytest.mark.slow
def test_a_process_stays_within_its_budget() -> None:
    """Two tensors of 32 MB, input and output of a layer, are alive at a time: 40 MB force some of it to disk.

    A tenth is for what is no tensor.
    """
    assert grown(40) <= 44


@pytest.mark.slow
def test_a_process_with_room_takes_more() -> None:
    """The bound above can fail."""
    assert grown(1000) > 60


# --- chunks


@pytest.mark.parametrize("name", ["toy", pytest.param("unconditional", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("name", ["toy", pytest.param("unconditional", marks=pytest.mark.slow)])
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


# --- threads


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch has, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.slow
def test_the_same_threads_give_the_same_bits_and_others_change_the_order_of_sums(
    threads: Callable[[int], None],
) -> None:
    """Ranges of what is not rounded are the same but for last digits, and so are all but a few codes."""
    program, rounded, seen = planned("toy"), list[Table](), list[Table]()
    ctx = context(recorded(program, 2))
    for number in (1, 2, 1, 2):
        threads(number)
        rounded.append(swept(program, ctx, rows_of(8)).table)
        seen.append(swept(program, ctx, (), Observe()).table)
    for tables in (rounded, seen):
        assert bits(tables[0]) == bits(tables[2])
        assert bits(tables[1]) == bits(tables[3])
    for site, one in seen[0].of(Range).items():
        two = seen[1].of(Range)[site]
        for a, b in ((one.low, two.low), (one.high, two.high), (one.mean, two.mean)):
            assert float((a - b).abs().max()) <= 1e-6 * float((one.high - one.low).max())
    pairs = [
        (codes.packed, rounded[1].of(Codes)[site].packed) for site, codes in rounded[0].of(Codes).items()
    ]
    assert sum(int((a != b).sum()) for a, b in pairs) <= 0.01 * sum(len(a) for a, _ in pairs)


# --- rows of problems


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


# --- turns


@dataclass(frozen=True)
class Look(SweepPass):
    """Keeps the turns that it is shown, and what the table knew then of each reader."""

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    seen: list[tuple[Turn, list[int]]]

    def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
        known = [len(turn.table.at(reader.site)) for reader in turn.readers]
        self.seen.append((turn, known))
        turn.loss = 0.25
        return ()


def looked(
    program: Program, *before: tuple[str, dict[str, object]], rows: int = 4
) -> list[tuple[Turn, list[int]]]:
    seen: list[tuple[Turn, list[int]]] = []
    swept(program, context(recorded(program, rows)), before, Look(seen))
    return seen


def test_neighbours_share_one_walk_and_what_stands_between_them_parts_it(walks: list[Walk]) -> None:
    ctx = context(recorded(chain(), 4))
    swept(chain(), ctx, SWEEP, Look([]))
    assert len(walks) == 1
    swept(chain(), ctx, [SWEEP[0], ("pair-layers", {}), SWEEP[1]])
    assert len(walks) == 3


def test_every_planned_reader_has_one_turn_and_those_of_one_tensor_share_it() -> None:
    program = planned("conditional")
    sites = [[str(reader.site) for reader in turn.readers] for turn, _ in looked(program)]
    every = [site for turn in sites for site in turn]
    assert sorted(every) == sorted(set(every))
    wanted = {site for site, each in program.table.of(Planned).items() if each.spec and site.arg != "weight"}
    assert set(every) == {str(site) for site in wanted}
    context_readers = next(turn for turn in sites if any("attn2.to_k" in site for site in turn))
    assert len(context_readers) == sum("attn2.to_k" in site or "attn2.to_v" in site for site in every)


def test_a_pass_sees_what_its_neighbours_wrote_in_this_turn() -> None:
    before, after = looked(chain()), looked(chain(), SWEEP[0])
    assert [known for _, known in before] == [[1]] * 9  # the plan
    assert [known for _, known in after] == [[3]] * 9  # and the range and the parameters


def test_a_turn_has_the_tensor_of_both_networks() -> None:
    """The first layer's input is the same in both; the second's differs by what the first lost."""
    seen: list[list[bool]] = []

    @dataclass(frozen=True)
    class Compare(SweepPass):
        requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})

        def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
            seen.append([torch.equal(batch.real, batch.quantized) for batch in turn.batches])
            assert [batch.first for batch in turn.batches] == [0, 4]
            return ()

    swept(chain(), context(recorded(chain(), 6)), SWEEP, Compare())
    assert seen[0] == [True, True]
    assert not any(any(same) for same in seen[1:5])


def test_what_a_turn_draws_is_its_own() -> None:
    turns = [turn for turn, _ in looked(chain())]
    drawn = [tuple(torch.randint(1000, (4,), generator=turn.generator()).tolist()) for turn in turns]
    assert len(set(drawn)) == len(turns)
    again = [tuple(torch.randint(1000, (4,), generator=turn.generator()).tolist()) for turn in turns]
    assert drawn == again
    other = replace(turns[0], seed=1).generator()
    assert tuple(torch.randint(1000, (4,), generator=other).tolist()) != drawn[0]


@pytest.mark.parametrize("name", ["toy", pytest.param("unconditional", marks=pytest.mark.slow)])
def test_sampled_rows_give_the_layers_own_output(name: str) -> None:
    """rows @ weight is what the convolution or the linear layer computes at those positions."""
    program = program_of(name)
    seen: list[Rows] = []
    turns = []

    @dataclass(frozen=True)
    class Multiply(SweepPass):
        requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})

        def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
            for reader in turn.readers:
                if reader.weight is not None and reader.groups == 1:
                    rows, whole = (
                        turn.rows(reader, 10**6),
                        [outputs_of(turn, reader, b.real) for b in turn.batches],
                    )
                    product = rows.real @ turn.weight(reader).flatten(1).T
                    torch.testing.assert_close(product, torch.cat(whole), rtol=1e-4, atol=1e-4)
                    seen.append(rows)
                    turns.append(turn)
            return ()

    swept(program, context(recorded(program, 3)), (), Multiply())
    assert len(seen) > 5


def outputs_of(turn: Turn, reader: Reader, x: torch.Tensor) -> torch.Tensor:
    """All output positions of a layer without its bias, as rows."""
    weight, geometry = turn.weight(reader), reader.geometry
    if geometry.kernel is None:
        return torch.nn.functional.linear(x, weight).flatten(0, -2)
    found = torch.nn.functional.conv2d(x, weight, None, geometry.stride, geometry.padding, geometry.dilation)
    return found.flatten(2).movedim(1, 2).flatten(0, 1)


def test_every_calibration_row_has_the_same_share_of_a_problem_and_no_position_twice() -> None:
    found: list[Rows] = []
    swept(chain(), context(recorded(chain(), 5, 4)), (), Sample(found, 30))
    assert torch.equal(found[0].sample.bincount(), torch.full((9,), 4))
    assert len(found[0].real.unique(dim=0)) == 36
    few: list[Rows] = []
    swept(chain(), context(recorded(chain(), 5, 4)), (), Sample(few, 10**6))
    assert few[0].sample.bincount().tolist() == [6 * 8] * 5 + [8 * 10] * 4  # there are no more


def test_what_is_computed_from_constants_alone_is_no_value_of_a_row(walks: list[Walk]) -> None:
    """A scaled weight is a product of two constants: once for all chunks, and never on disk."""
    program = planned()
    ctx = context(recorded(program, 4))
    names = ("insert-observers", "freeze-observers", "pair-layers", "learn-scaling", "apply-scaling")
    scaled = swept(program, ctx, [(name, {}) for name in names])
    swept(scaled, ctx, SWEEP[:1], Look([]))
    schedule = walks[0].schedule
    read = {
        str(each.meta["address"])
        for part in schedule.segments
        for n in part.nodes
        for each in schedule.reads(n)
        if "address" in each.meta
    }
    products = {
        str(node.meta["address"])
        for node in scaled.calls("mul")
        if "~apply-scaling" in str(node.meta["address"])
    }
    assert len(products) > 5
    assert not read & products
    assert read


HOLES = """
from pathlib import Path
import torch
from dmqfx.machine import give_back_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
tensors = [torch.ones(2**14) for _ in range(6400)]
del tensors[::2]
before = resident()
give_back_memory()
print(before - resident())
"""


LARGE = """
from pathlib import Path
import torch
from dmqfx.machine import memory_given_back
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
def holes():
    tensors = [torch.ones(2**20) for _ in range(100)]
    before = resident()
    del tensors[::2]
    return before - resident()
with memory_given_back():
    gone = holes()
for _ in range(8):
    torch.ones(2**22)  # glibc learns that tensors of 16 MB come and go
print(holes(), gone)
"""


def test_large_tensors_go_back_as_soon_as_they_are_freed() -> None:
    """200 MB of freed tensors, each beside one that is in use; elsewhere they are kept for what comes."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    kept, gone = map(int, done.stdout.split())
    assert kept < 50
    assert gone > 150


def test_holes_between_tensors_go_back_to_the_system() -> None:
    """200 MB of freed tensors, each beside one that is in use."""
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150
