"""A run directory: no finished turn is done twice, and an interrupted run ends with the bits of a whole one."""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import pytest
import torch
from sweeping import SWEEP, VOTED, Stop, Tell, bits, chain, context, recorded, swept

from dmqfx.errors import StoreError
from dmqfx.graph.facts import FLAGGED
from dmqfx.graph.journal import Journal
from dmqfx.graph.modules import clone
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Planned, Shift
from dmqfx.storage.lock import locked
from dmqfx.sweep.run import running, until_done
from dmqfx.sweep.walk import Walk

SITES = [f"conv{k}/conv2d:input" for k in range(4)] + ["conv4/conv2d:input", "time/linear:input"]
SITES += [f"conv{k}/conv2d:input" for k in range(5, 8)]


def ready(folder: Path, **changes: object) -> PassContext:
    return replace(context(recorded(chain(), 9), run_dir=folder / "run"), **changes)


def told(folder: Path) -> Tell:
    return Tell(file=str(folder / "visits"))


def visits(folder: Path) -> list[str]:
    """The visits since the last time somebody asked."""
    file = folder / "visits"
    found = file.read_text().splitlines() if file.exists() else []
    file.write_text("")
    return found


def again(folder: Path, **changes: object) -> Program:
    """A run to its end."""
    return swept(chain(), ready(folder, **changes), SWEEP, Stop(), told(folder))


def interrupted(folder: Path, at: str) -> None:
    """A run that was ended in the turn of a site."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "at", at)
        with pytest.raises(KeyboardInterrupt):
            again(folder)


def turn_folders(folder: Path) -> list[Path]:
    return sorted((folder / "run").glob("*/turn-*"))


def test_keeping_a_run_changes_no_bit(tmp_path: Path) -> None:
    without = swept(chain(), context(recorded(chain(), 9)))
    assert bits(swept(chain(), ready(tmp_path)).table) == bits(without.table)


@pytest.mark.parametrize("at", [SITES[0], SITES[4], SITES[-1]])
def test_an_interrupted_run_goes_on_where_it_was_and_ends_with_the_same_bits(tmp_path: Path, at: str) -> None:
    whole = again(tmp_path / "other")
    done = SITES.index(at)
    interrupted(tmp_path, at)
    assert visits(tmp_path) == SITES[:done]
    after = again(tmp_path)
    assert visits(tmp_path) == SITES[done:]
    assert bits(after.table) == bits(whole.table)
    assert [record.applied for record in after.log] == [record.applied for record in whole.log]
    assert [record.refused for record in after.log] == [record.refused for record in whole.log]


@pytest.mark.parametrize("at", [SITES[4], None])
def test_what_a_turn_drops_is_dropped_again_by_a_run_that_goes_on(tmp_path: Path, at: str | None) -> None:
    """Ranges that are fitted anew take away the shifts that were voted on other steps: of finished turns too."""
    flagged = replace(chain(), facts=chain().facts | {FLAGGED})
    voted = swept(flagged, context(recorded(chain(), 9)), VOTED)
    assert {str(site) for site in voted.table.of(Shift)} & set(SITES[:4])
    whole = swept(voted, context(recorded(chain(), 9)), SWEEP, Stop())
    kept = ready(tmp_path)
    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Stop, "at", at)  # None: to its end, and nothing is left to compute
        swept(voted, kept, SWEEP, Stop())
    assert len(turn_folders(tmp_path)) == (4 if at else len(SITES))
    after = swept(voted, kept, SWEEP, Stop())
    assert not whole.table.of(Shift)
    assert bits(after.table) == bits(whole.table)
    assert len(after.table) == len(whole.table)


def test_a_finished_run_is_read_and_nothing_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = again(tmp_path)
    visits(tmp_path)

    def never(self: Walk, visit: object) -> None:
        raise AssertionError("the graph was walked")

    monkeypatch.setattr(Walk, "run", never)
    second = again(tmp_path)
    assert bits(second.table) == bits(first.table)
    assert [record.applied for record in second.log] == [record.applied for record in first.log]
    assert visits(tmp_path) == []


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit of a tensor": lambda turn: flip(turn / "tensors.safetensors"),
    "a bit of the record": lambda turn: flip(turn / "record.json"),
    "a bit of the manifest": lambda turn: flip(turn / "dmqfx.json"),
    "half a file": lambda turn: os.truncate(turn / "tensors.safetensors", 100),
    "no tensors": lambda turn: (turn / "tensors.safetensors").unlink(),
    "no manifest": lambda turn: (turn / "dmqfx.json").unlink(),
    "another turn's files": lambda turn: (
        [(turn / file.name).write_bytes(file.read_bytes()) for file in (turn.parent / "turn-00001").iterdir()]
        and None
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_turn_is_said_and_done_again_with_all_that_followed(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = again(tmp_path)
    visits(tmp_path)
    DAMAGE[kind](turn_folders(tmp_path)[5])
    with caplog.at_level(logging.WARNING):
        after = again(tmp_path)
    assert visits(tmp_path) == SITES[5:]
    assert bits(after.table) == bits(whole.table)
    assert "turn-00005" in caplog.text
    assert "computed again" in caplog.text


def test_a_missing_turn_is_done_again(tmp_path: Path) -> None:
    whole = again(tmp_path)
    visits(tmp_path)
    for file in (gone := turn_folders(tmp_path)[3]).iterdir():
        file.unlink()
    gone.rmdir()
    assert bits(again(tmp_path).table) == bits(whole.table)
    assert visits(tmp_path) == SITES[3:]


def test_a_damaged_plan_starts_the_run_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = again(tmp_path)
    visits(tmp_path)
    flip(turn_folders(tmp_path)[0].parent / "plan" / "record.json")
    assert bits(again(tmp_path).table) == bits(whole.table)
    assert visits(tmp_path) == SITES
    assert "plan" in caplog.text


def other_weights() -> Program:
    program = chain()
    constants = {name: value.clone() for name, value in program.weights().items()}
    constants["conv3"][0, 0, 0, 0] += 1e-6
    return replace(program, gm=clone(program.gm, constants))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("settings", lambda folder: again(folder, seed=1)),
        ("settings", lambda folder: again(folder, chunk=3)),
        ("calibration rows", lambda folder: again(folder, calibration=recorded(chain(), 9, seed=1))),
        ("passes", lambda folder: swept(chain(), ready(folder), rows_of(63), Stop(), told(folder))),
        ("weights", lambda folder: swept(other_weights(), ready(folder), SWEEP, Stop(), told(folder))),
        ("plan", lambda folder: swept(other_plan(), ready(folder), SWEEP, Stop(), told(folder))),
    ],
)
def test_a_run_of_anything_else_is_not_used_and_that_is_said(
    tmp_path: Path, part: str, change: Callable[[Path], Program], caplog: pytest.LogCaptureFixture
) -> None:
    first = again(tmp_path)
    visits(tmp_path)
    change(tmp_path)
    assert visits(tmp_path) == SITES
    assert f"had other {part}; it is not used" in caplog.text
    assert bits(again(tmp_path).table) == bits(first.table)  # and it is still there for who comes back to it
    assert visits(tmp_path) == []


def rows_of(count: int) -> Sequence[tuple[str, dict[str, object]]]:
    return [SWEEP[0], ("round-weights", {"method": "gptq", "rows": count})]


def other_plan() -> Program:
    program = chain()
    at = next(at for at in program.table.of(Planned) if at.arg == "weight")
    entry = program.table.of(Planned)[at]
    assert entry.spec is not None
    return program.with_table(program.table.put(at, replace(entry, spec=replace(entry.spec, bits=3))))


def test_a_directory_at_work_is_refused_to_others(tmp_path: Path) -> None:
    ctx = ready(tmp_path)

    class Nested(Tell):
        def visit(self, turn: object, context: PassContext) -> tuple[()]:
            with pytest.raises(StoreError, match="another process is at work in"):
                swept(chain(), ctx, SWEEP, Nested())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swept(chain(), ctx, SWEEP, Nested())


def test_a_full_disk_is_an_error_that_says_where_and_what_was_kept_is_still_there(tmp_path: Path) -> None:
    directory, device = tmp_path / "run", torch.device("cpu")
    with running(directory, "pass", {"weights": "a"}, device) as run:
        run.begin(1.0)
        run.keep(1, {"x": torch.ones(3)})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, hard))  # no file can be longer
        try:
            with pytest.raises(
                StoreError, match=f"cannot keep a run in {directory}/pass-[0-9a-f]*: .*too large"
            ):
                run.keep(2, {"x": torch.zeros(2**16)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        kept = run.state()
    assert kept is not None
    assert (kept[0], kept[1]["x"].tolist()) == (1, [1, 1, 1])


def test_half_of_a_turn_goes_and_a_hidden_file_of_somebody_else_stays(tmp_path: Path) -> None:
    with running(tmp_path, "pass", {"weights": "a"}, torch.device("cpu")) as run:
        run.begin(1.0)
    (folder,) = tmp_path.iterdir()
    (folder / ".DS_Store").write_text("")
    (folder / ".turn-00000.dmqfx-abcdefgh" / "new").mkdir(parents=True)
    with running(tmp_path, "pass", {"weights": "a"}, torch.device("cpu")) as run:
        assert run.factor == 1.0
    assert sorted(path.name for path in folder.iterdir()) == [".DS_Store", "lock", "plan"]


def test_a_run_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StoreError, match="cannot keep a run in"):
        again(tmp_path)


def test_a_lock_or_a_leftover_that_cannot_be_handled_is_an_error_in_words(tmp_path: Path) -> None:
    again(tmp_path)
    (kept,) = (each for each in (tmp_path / "run").iterdir() if each.is_dir())
    (kept / "turn-99999").write_text("somebody else's")
    with pytest.raises(StoreError, match=r"cannot keep a run in .*turn-99999"):
        again(tmp_path)
    (kept / "turn-99999").unlink()
    (kept / "lock").unlink()
    (kept / "lock").mkdir()
    with pytest.raises(StoreError, match="cannot be held for one process"):
        again(tmp_path)


def test_a_directory_until_all_is_done_loses_what_runs_kept_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "out.run"
    key = f"02-round-weights-{'0' * 12}"
    with until_done(directory):
        (directory / key).mkdir()
        with pytest.raises(StoreError, match="another process is at work"), until_done(directory):
            pass
    assert not directory.exists()
    with suppress(KeyboardInterrupt), until_done(directory):
        (directory / key).mkdir()
        raise KeyboardInterrupt
    assert (directory / key).exists()
    others = ("550e8400-e29b-41d4-a716-446655440000", "results-20261130abcd")
    for name in others:
        (directory / name).mkdir()
    (directory / "lock").write_text("mine, too")
    with until_done(directory):
        pass
    left = sorted([*others, "lock"])
    assert sorted(each.name for each in directory.iterdir()) == left
    assert (directory / "lock").read_text() == "mine, too"
    assert f"out.run stays: {', '.join(left)} is not of a run" in caplog.text


def test_a_directory_that_is_gone_in_the_end_hides_no_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), until_done(tmp_path / "out.run"):
        raise removed(tmp_path / "out.run")
    with until_done(tmp_path / "out.run"):
        removed(tmp_path / "out.run")


def removed(directory: Path) -> KeyboardInterrupt:
    shutil.rmtree(directory)
    return KeyboardInterrupt()


def test_a_lock_that_was_removed_while_another_waited_for_it_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fcntl.flock

    def late(file: TextIO, how: int) -> None:
        (tmp_path / "lock").unlink()
        (tmp_path / "lock").touch()
        honest(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(StoreError, match="another process is at work"), locked(tmp_path):
        pass


def test_a_directory_in_which_nothing_was_kept_goes_with_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early"), until_done(tmp_path / "out.run"):
        raise ValueError("early")
    assert not (tmp_path / "out.run").exists()


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    interrupted(tmp_path, SITES[4])
    folder = turn_folders(tmp_path)[0].parent
    half = folder / ".turn-00004.dmqfx-abc" / "new"
    half.mkdir(parents=True)
    (half / "record.json").write_text("{")
    again(tmp_path)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_pass_that_is_bisected_keeps_no_run(tmp_path: Path) -> None:
    ctx = replace(ready(tmp_path), journal=Journal(fuel=3))
    swept(chain(), ctx, SWEEP, Stop(), told(tmp_path))
    assert not (tmp_path / "run").exists()


def test_several_sweeps_of_one_pipeline_share_a_directory(tmp_path: Path) -> None:
    steps = [SWEEP[0], ("pair-layers", {}), SWEEP[1]]
    first = swept(chain(), ready(tmp_path), steps)
    assert len(list((tmp_path / "run").iterdir())) == 2
    second = swept(chain(), ready(tmp_path), steps)
    assert bits(first.table) == bits(second.table)
