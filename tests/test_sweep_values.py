"""What is kept during a sweep stays inside its budget, comes back bit for bit, and leaves nothing behind."""

from __future__ import annotations

import io
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from dmqfx.errors import CalibrationError, StoreError
from dmqfx.sweep.scratch import Scratch
from dmqfx.sweep.values import Pair, Values

FLOATS = 256
BYTES = 4 * FLOATS


def nodes(count: int) -> list[fx.Node]:
    graph = fx.Graph()
    return [graph.placeholder(f"x{k}") for k in range(count)]


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (FLOATS,), generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


def alike(tensor: Tensor) -> Pair:
    return Pair(tensor, tensor)


def soonest_first(order: dict[fx.Node, int]) -> Callable[[fx.Node, int], tuple[int, int]]:
    return lambda node, chunk: (order[node], chunk)


def test_what_is_needed_last_is_set_aside_first() -> None:
    a, b, c = nodes(3)
    values = Values(2 * BYTES, soonest_first({a: 1, b: 3, c: 2}))
    kept = {node: numbers(k) for k, node in enumerate((a, b, c))}
    for node, tensor in kept.items():
        values.put(node, 0, alike(tensor))
    assert values.get(a, 0).real is kept[a]
    assert values.get(c, 0).real is kept[c]
    assert values.get(b, 0).real is not kept[b]
    assert same(values.get(b, 0).real, kept[b])


def test_of_one_value_the_last_chunk_goes_first() -> None:
    (a,) = nodes(1)
    values = Values(2 * BYTES, soonest_first({a: 0}))
    kept = [numbers(k) for k in range(4)]
    for k, tensor in enumerate(kept):
        values.put(a, k, alike(tensor))
    assert [values.get(a, k).real is kept[k] for k in range(4)] == [True, True, False, False]
    assert all(same(values.get(a, k).real, kept[k]) for k in range(4))


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]),
    change=st.sampled_from(
        ["as is", "channels last", "transposed", "cut", "expanded", "several", "with a number"]
    ),
)
def test_any_value_comes_back_from_disk_bit_for_bit(
    shape: list[int], dtype: torch.dtype, change: str
) -> None:
    tensor = (numbers(0, *shape) * 9).to(dtype)
    if change == "channels last" and tensor.dim() == 4:
        tensor = tensor.to(memory_format=torch.channels_last)
    elif change == "transposed":
        tensor = tensor.transpose(0, -1)
    elif change == "cut":
        tensor = tensor[:1]
    elif change == "expanded":
        tensor = tensor[None].expand(3, *tensor.shape)
    value: object = {"several": (tensor, tensor + 1), "with a number": (tensor, 7)}.get(change, tensor)
    (a,) = nodes(1)
    values = Values(0, soonest_first({a: 0}))
    values.put(a, 0, Pair(value, value))
    found = values.get(a, 0)
    assert found.same
    assert values.resident == 0
    for was, now in zip(Pair(value, value).parts(), found.parts(), strict=True):
        assert same(was.contiguous(), now.contiguous()) if isinstance(was, Tensor) else was == now


def test_the_memory_layout_comes_back_too() -> None:
    """A convolution of another layout adds in another order, and the result would depend on the budget."""
    scratch = Scratch()
    for tensor in (numbers(0, 2, 3, 4, 5).to(memory_format=torch.channels_last), numbers(1, 4, 6).T):
        assert same(scratch.read(scratch.write(tensor)), tensor)


def test_what_is_read_never_changes_when_its_room_is_freed() -> None:
    scratch = Scratch()
    stored = scratch.write(first := numbers(0))
    read = scratch.read(stored)
    scratch.free(stored)
    scratch.write(numbers(1))
    assert same(read, first)


def test_freed_room_is_used_again_when_nobody_looks_at_it() -> None:
    scratch = Scratch()
    for k in range(10):
        scratch.free(scratch.write(numbers(k)))
    assert scratch.size == mmap.PAGESIZE
    stored = scratch.write(numbers(0))
    part = scratch.read(stored).view(16, -1)[3:]  # of the memory, which is all of it
    scratch.free(stored)
    assert scratch.write(numbers(1)).offset != stored.offset
    del part
    assert scratch.write(numbers(2)).offset == stored.offset
    assert same(scratch.read(stored), numbers(2))


def test_a_file_may_be_longer_than_memory(tmp_path: Path) -> None:
    """Memory that a map might need is not asked for: no more than a page of this file is ever looked at."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    scratch = Scratch(tmp_path)
    scratch.size = -(-memory // mmap.PAGESIZE) * mmap.PAGESIZE
    assert same(scratch.read(scratch.write(numbers(0))), numbers(0))
    scratch.close()


def test_what_was_read_before_the_file_grew_stays() -> None:
    scratch = Scratch()
    kept = [numbers(k, 100 * 2**k) for k in range(10)]
    read = [scratch.read(scratch.write(tensor)) for tensor in kept]
    scratch.close()
    assert all(map(same, read, kept))


def in_memory(scratch: Scratch) -> int:
    """How many kB of its file are in this process's memory."""
    inode, found = os.fstat(scratch._file.fileno()).st_ino, 0
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if len(line.split()) > 5 and line.split()[4] == str(inode):
            found += next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    return found


def test_what_nobody_looks_at_any_more_is_in_no_memory() -> None:
    scratch = Scratch()
    stored = [scratch.write(numbers(k, 2**16)) for k in range(4)]
    read = [scratch.read(one) for one in stored]
    assert float(torch.stack(read).sum()) != 0
    assert in_memory(scratch) == 4 * 256
    del read[:3]
    assert in_memory(scratch) == 256


def test_memory_that_values_share_is_counted_once() -> None:
    a, b, c = nodes(3)
    values = Values(10 * BYTES, soonest_first({a: 0, b: 1, c: 2}))
    tensor, other = numbers(0), numbers(1)
    values.put(a, 0, alike(tensor))
    values.put(b, 0, alike(tensor.view(16, -1)))
    assert values.resident == BYTES
    values.put(c, 0, Pair(tensor, other))
    assert values.resident == 2 * BYTES
    values.drop(a, 0)
    values.drop(c, 0)
    assert values.resident == BYTES
    values.drop(b, 0)
    assert values.resident == 0


def test_a_part_of_a_tensor_does_not_keep_the_whole_alive() -> None:
    a, b = nodes(2)
    values = Values(10 * BYTES, soonest_first({a: 0, b: 1}))
    values.put(a, 0, alike(numbers(0)[:16]))
    assert values.resident == 16 * 4


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 400)), max_size=30),
    st.integers(0, 2000),
)
def test_the_budget_holds_whatever_is_put(puts: list[tuple[int, int, int]], budget: int) -> None:
    places = nodes(4)
    values = Values(budget, soonest_first({node: k for k, node in enumerate(places)}))
    kept: dict[tuple[int, int], Tensor] = {}
    for at, chunk, size in puts:
        kept[at, chunk] = numbers(size, size)
        values.put(places[at], chunk, alike(kept[at, chunk]))
        assert values.resident <= budget
    assert values.peak <= budget
    assert all(same(values.get(places[at], chunk).real, tensor) for (at, chunk), tensor in kept.items())


def test_reserved_room_pushes_values_out_until_it_is_released() -> None:
    a, b = nodes(2)
    values = Values(4 * BYTES, soonest_first({a: 0, b: 1}))
    for node in (a, b):
        values.put(node, 0, alike(numbers(0)))
    values.reserve(3 * BYTES, "rows")
    assert values.resident == BYTES
    values.release()
    values.put(b, 0, alike(numbers(0)))
    assert values.resident == 2 * BYTES
    assert values.peak == 4 * BYTES


def test_more_room_than_the_budget_is_refused_with_the_numbers() -> None:
    values = Values(2 * 2**20, soonest_first({}))
    values.reserve(2**20, "the first rows")
    with pytest.raises(
        CalibrationError, match=r"8192 rows of conv:input take 3 MB, and 1 MB of the memory.*\n  mend: a"
    ):
        values.reserve(3 * 2**20, "8192 rows of conv:input")


def test_nothing_is_left_in_the_folder_while_it_is_used_or_after(tmp_path: Path) -> None:
    (a,) = nodes(1)
    values = Values(0, soonest_first({a: 0}), tmp_path)
    values.put(a, 0, alike(numbers(0)))
    assert list(tmp_path.iterdir()) == []
    values.close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_by_a_process_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time, torch, pathlib; from dmqfx.sweep.scratch import Scratch\n"
        "scratch = Scratch(pathlib.Path(sys.argv[1])); scratch.write(torch.ones(1000)); print('written', flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        os.kill(process.pid, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_with_what_helps(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=rf"cannot set aside .* in {tmp_path}/gone.*\n  mend: give more memory"
    ):
        Scratch(tmp_path / "gone").write(numbers(0))


def test_a_full_disk_is_an_error_with_words() -> None:
    """/dev/full answers every write as a full disk does, and again when it is closed."""
    (a,) = nodes(1)
    values = Values(0, soonest_first({a: 0}))
    values._scratch._file = io.BufferedRandom(io.FileIO("/dev/full", "r+"))
    with pytest.raises(StoreError, match="No space left on device"):
        values.put(a, 0, alike(numbers(0)))
    values.close()


def test_a_file_that_cannot_be_mapped_is_an_error_with_words(tmp_path: Path) -> None:
    scratch = Scratch()
    stored = scratch.write(numbers(0))
    scratch._file = (tmp_path / "write only").open("wb")
    with pytest.raises(StoreError, match=r"cannot be mapped: .*Permission.*\n  mend: give more memory"):
        scratch.read(stored)
    scratch.close()
