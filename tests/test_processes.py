"""Two real processes share the rows of a calibration: both end with what one alone ends with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import relative, unconditional
from side import (
    BLOCKS,
    chain,
    context,
    error,
    felt,
    found,
    made_by_itself,
    named,
    recorded,
    started,
    untimed,
    whole,
    work,
)
from sweeping import SWEEP, swept

from dmqfx import load, processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.cli import main
from dmqfx.errors import ProcessError
from dmqfx.graph.table import Table
from dmqfx.numbers.speeds import Speeds

FAILING = ("raise", "few", "other")
SHARED = (*FAILING, "minmax", "observed", "felt", "blocks", "steps", "les", "alive", "kept", "resumed")
LONG = ("mse", "percentile", "ema", "surrogate", "whole")
DYING = ("mortal0", ",", "mortal1", ",", "mortal2", ",", "mortal3", "die")
CODES = [[0, -9], [-9, -9], [-9, 0], [0, 9]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes ended with, each in files of its own."""
    folder = tmp_path_factory.mktemp("both")
    codes, said = started((*SHARED, *DYING), folder)
    assert codes == CODES, said
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of what takes long, and of what is much like the others."""
    folder = tmp_path_factory.mktemp("long")
    codes, said = started(LONG, folder)
    assert codes == [[0, 0]], said
    return folder


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(Speeds, "seconds", untimed)
    yield
    torch.set_num_threads(threads)


def differing(kind: str, both: Path, tmp_path: Path) -> dict[str, float]:
    """The tensors that one process alone has otherwise, each with the greatest difference, relative to its size."""
    table = work(kind, tmp_path)
    assert isinstance(table, Table)
    alone = named(table)
    shared = [found(kind, both, rank) for rank in (0, 1)]
    assert shared[0].keys() == shared[1].keys() == alone.keys()
    assert all(torch.equal(value, shared[1][name]) for name, value in shared[0].items())
    return {
        name: float((value.double() - shared[0][name].double()).abs().max() / value.double().abs().max())
        for name, value in alone.items()
        if not torch.equal(value, shared[0][name])
    }


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["minmax", "resumed", "les"])
def test_codes_scales_votes_and_extremes_are_those_of_one_process_bit_for_bit(
    kind: str, both: Path, tmp_path: Path
) -> None:
    """Means and variances are sums in another order; no code depends on them."""
    assert_alike(kind, both, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", LONG[:-1])
def test_codes_of_other_methods_are_those_of_one_process_too(kind: str, long: Path, tmp_path: Path) -> None:
    assert_alike(kind, long, tmp_path)


def assert_alike(kind: str, both: Path, tmp_path: Path) -> None:
    others = differing(kind, both, tmp_path)
    assert all(name.startswith("Range ") and name.endswith((" mean", " variance")) for name in others)
    assert all(off < 1e-6 for off in others.values())
    kinds = {name.split()[0] for name in found(kind, both, 0)}
    assert {"Range", "QParams", "Codes", "Bias"} <= kinds
    assert ("Shift" in kinds) == (kind in ("minmax", "mse", "percentile", "ema"))
    assert ("ChannelScale" in kinds) == (kind in ("les", "surrogate"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("kind", "entry"), [("observed", "Range"), ("felt", "Sensitivity")])
def test_sums_differ_in_their_last_digits_and_nothing_else_does(
    kind: str, entry: str, both: Path, tmp_path: Path
) -> None:
    others = differing(kind, both, tmp_path)
    assert all(name.startswith(f"{entry} ") for name in others)
    assert all(off < 1e-5 for off in others.values())
    assert not [name for name in others if name.endswith((" low", " high", " count"))]


@pytest.mark.usefixtures("one_thread")
def test_blocks_are_learned_by_one_process_and_both_end_with_its_bits(both: Path, tmp_path: Path) -> None:
    """But for the means and variances of the sweep before."""
    assert all(name.startswith("Range ") for name in differing("blocks", both, tmp_path))
    rounded = named(
        swept(chain(4, residual=True), context(recorded(chain(), 9, 4), chunk=2), BLOCKS[:2]).table
    )
    learned = found("blocks", both, 0)
    assert any(not torch.equal(rounded[name], learned[name]) for name in rounded if name.startswith("Codes"))
    assert len(list((both / "run").glob("*reconstruct-blocks*/turn-*"))) == 3  # the first one kept them


@pytest.mark.usefixtures("one_thread")
def test_steps_are_learned_by_both_from_their_shares_of_every_batch(both: Path, tmp_path: Path) -> None:
    """Slopes are sums in another order: the last digits differ, as far as Adam lets them."""
    rounded = named(swept(chain(4, residual=True), context(recorded(chain(), 9, 4), chunk=2), SWEEP).table)
    learned, moved = found("steps", both, 0), list[str]()
    for name, value in rounded.items():
        if name in learned and name.split()[0] in ("QParams", "Codes") and name.endswith("scale"):
            assert 0 < float((learned[name] / value).log().abs().max()) < 0.1
            moved.append(name)
    assert len(moved) == 10
    off = differing("steps", both, tmp_path)
    assert all(share < 1e-4 for share in off.values())
    assert len(list((both / "run").glob("*learn-steps*/state-*"))) == 1  # the first one kept it


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_all_that_w4a6_does_ends_with_the_same_output_but_for_a_twentieth_of_its_error_at_most(
    long: Path,
) -> None:
    """What is rounded by sums of another order may have other codes here and there."""
    shared = [found("whole", long, rank) for rank in (0, 1)]
    assert torch.equal(shared[0]["quantized"], shared[1]["quantized"])
    alone = whole()
    assert torch.equal(alone["real"], shared[0]["real"])
    noise = relative(alone["quantized"], alone["real"])
    assert 0.05 < noise < 0.5
    assert relative(shared[0]["quantized"], alone["quantized"]) < 0.05 * noise


def test_killed_processes_go_on_behind_what_they_did_and_end_with_the_bits_of_a_whole_run(both: Path) -> None:
    """One is killed while it measures, then both, then one that learns; who waits for a dead one ends, too."""
    for life, survivor in ((0, 0), (2, 1)):
        told = error(f"mortal{life}", both, survivor)
        assert told.startswith(f"ProcessError: process {survivor} of 2 lost another one")
    for rank, parts in enumerate((3, 4)):
        done = (both / f"done-{rank}").read_text().splitlines()
        assert done == ["look"] * parts + ["look_again"] * parts + ["_slopes"] * 8  # nothing twice
        whole, torn = found("alive", both, rank), found("mortal3", both, rank)
        assert whole.keys() == torn.keys()
        assert all(torch.equal(value, torn[name]) for name, value in whole.items())


@pytest.mark.usefixtures("one_thread")
def test_sums_that_two_processes_keep_are_not_those_of_one(
    both: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run,) = (both / "mortal").glob("*-measure-sensitivity-*")
    kept = sorted(str(path.relative_to(run)) for path in run.glob("**/state-*"))
    assert kept == ["process-1/state-0000008", "state-0000006"]
    felt(recorded(chain(), 9, 4), both / "mortal")
    assert f"the run in {run} had other numbers of processes; it is not used" in caplog.text


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_the_rows_that_one_process_kept_are_read_by_all(both: Path, tmp_path: Path) -> None:
    """What they would have made in their second life is others."""
    first = made_by_itself(tmp_path, 0).columns()
    for rank in (0, 1):
        second = found("kept", both, rank)
        assert second.keys() == first.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    (folder,) = (both / "made").iterdir()
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}


def test_one_process_that_works_on_half_of_the_rows_has_another_result(both: Path) -> None:
    """The comparison above can fail."""
    half = context(recorded(chain(), 9), chunk=2)
    table = named(swept(chain(), half, SWEEP).table)
    assert any(not torch.equal(value, found("resumed", both, 0)[name]) for name, value in table.items())


def test_an_error_in_one_process_is_an_error_in_the_other_which_goes_on_to_live(both: Path) -> None:
    assert error("raise", both, 1) == "DmqfxError: it broke here"
    assert error("raise", both, 0).startswith("ProcessError: process 1 of 2 failed")
    assert found(SHARED[-1], both, 0)  # they did more together afterwards


def test_a_process_that_dies_ends_the_other(both: Path) -> None:
    assert error("die", both, 0).startswith("ProcessError: process 0 of 2 lost another one")


def test_more_processes_than_batches_are_refused_in_all(both: Path) -> None:
    for rank in (0, 1):
        assert "2 processes cannot share 1 batches of at most 16 cal" in error("few", both, rank)


def test_processes_that_have_not_the_same_are_refused_in_all(both: Path) -> None:
    for rank in (0, 1):
        assert "process 1 does not have the name of process 0" in error("other", both, rank)


def test_a_process_alone_needs_no_group() -> None:
    x = torch.arange(3)
    assert processes.gathered(x) is x
    assert processes.summed(x) is x
    assert processes.agreed(0.5) == 0.5
    assert processes.is_first()
    assert list(processes.share(3, "things")) == [0, 1, 2]
    processes.same("names", "any")
    with pytest.raises(ProcessError), processes.together():
        raise ProcessError("as it is")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_compile_under_torchrun_writes_and_prints_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = unconditional(
        block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    unet.save_pretrained(tmp_path / "unet")
    Calibration.synthesize(unet, steps=4, trajectories=10).save(tmp_path / "cal")
    arguments = [
        "compile", str(tmp_path / "unet"), "--calibration", str(tmp_path / "cal"), "--policy", "w4a6-quick",
        "--out",
    ]  # fmt: skip
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*runner, "-m", "dmqfx", *arguments, str(tmp_path / "two")], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("written to") == 1
    assert main([*arguments, str(tmp_path / "one")]) == 0
    capsys.readouterr()
    assert {file.name for file in (tmp_path / "two").iterdir()} == {
        file.name for file in (tmp_path / "one").iterdir()
    }
    one, two = (load(tmp_path / name).program.weights() for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_shares_of_processes_are_each_thing_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for total in (3, 7, 8):
        taken: list[int] = []
        for rank in range(3):
            monkeypatch.setattr(processes, "count", lambda: 3)
            monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
            taken += processes.share(total, "things")
        assert taken == list(range(total))
