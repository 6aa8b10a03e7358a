"""SIGKILL at random moments of every pass that keeps a run: it goes on, does nothing twice, and ends with the same bits."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from sweeping import SWEEP, Tell, bits, chain, context, recorded, swept

from dmqfx.graph.blocks import Block
from dmqfx.graph.pipeline import Pipeline
from dmqfx.graph.program import Program
from dmqfx.graph.registry import pipeline
from dmqfx.graph.table import Table
from dmqfx.numbers.adaround import Annealing
from dmqfx.numbers.speeds import Speeds
from dmqfx.passes import reconstruct_blocks
from dmqfx.sweep.blockwalk import Arrival

LEARNING = (
    ("learn-scaling", {"method": "les", "iterations": 10, "rows": 64, "batch": 32}),
    ("fit-ranges", {}),
    ("round-weights", {"method": "adaround", "start": "gptq", "rows": 64, "iterations": 20}),
    ("correct-bias", {}),
)
BLOCKS = ("reconstruct-blocks", {"rows": 6, "batch": 3, "iterations": 40, "rate": 0.1})


def learned(folder: Path, pause: float) -> list[Program]:
    """All passes that learn: those of a sweep in each of its turns; residual blocks from the nearest codes."""
    tell, learn = Tell(file=str(folder / "visits"), pause=pause), reconstruct_blocks.reconstructed

    def seen(
        program: Program,
        table: Table,
        block: Block,
        arrivals: Sequence[Arrival],
        how: Annealing,
        **options: Any,
    ) -> object:
        if how.iterations == BLOCKS[1]["iterations"]:  # the trial learns for less
            with (folder / "visits").open("a") as file:
                file.write(f"{block.at}\n")
            time.sleep(pause)
        return learn(program, table, block, arrivals, how, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct_blocks, "reconstructed", seen)
        layers = chain(5, residual=True)
        rows = recorded(layers, 6)
        ctx = context(rows, run_dir=folder / "run")
        steps = Pipeline((*pipeline((("pair-layers", {}), *LEARNING)).steps, tell))
        nearest = swept(layers, context(rows), (("fit-ranges", {}), ("round-weights", {"method": "nearest"})))
        return [steps.run(layers, ctx), swept(nearest, ctx, [BLOCKS])]


def rounded(folder: Path, pause: float) -> list[Program]:
    """A sweep over a chain of layers."""
    ctx = context(recorded(chain(), 9), run_dir=folder / "run")
    return [swept(chain(), ctx, SWEEP, Tell(file=str(folder / "visits"), pause=pause))]


WORK = {"learned": learned, "rounded": rounded}


def serve() -> NoReturn:
    """For every line of standard input, a kind of work, a pause and a folder, a fork that does it."""

    def say(what: object) -> None:
        sys.stdout.write(f"{what}\n")
        sys.stdout.flush()

    torch.set_num_threads(1)
    Speeds.seconds = lambda *operation, **sizes: 1e-3  # type: ignore[method-assign]  # no estimate is looked at
    for line in sys.stdin:
        kind, pause, name = line.split(maxsplit=2)
        folder = Path(name.strip())
        if not (child := os.fork()):
            after = WORK[kind](folder, float(pause))
            journals = [(record.applied, record.refused) for each in after for record in each.log]
            found = ([bits(each.table) for each in after], journals)
            (folder / "bits").write_bytes(pickle.dumps(found))
            os._exit(0)
        say(child)
        os.waitpid(child, 0)
        say("over")
    sys.exit(0)


class Workers:
    """Starts processes that work in a folder, quickly: all are forks of one that has imported everything."""

    def __enter__(self) -> Workers:
        code = "import sys; sys.path.insert(0, sys.argv[1]); import test_killed; test_killed.serve()"
        arguments = [sys.executable, "-c", code, str(Path(__file__).parent)]
        self._parent = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._parent.communicate()

    def start(self, kind: str, folder: Path, pause: float) -> int:
        folder.mkdir(exist_ok=True)
        assert self._parent.stdin is not None
        self._parent.stdin.write(f"{kind} {pause} {folder}\n")
        self._parent.stdin.flush()
        return int(self._said())

    def wait(self) -> None:
        assert self._said() == "over\n"

    def _said(self) -> str:
        assert self._parent.stdout is not None
        return self._parent.stdout.readline()


def killed(process: int) -> bool:
    """Whether there was something to kill."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def alive(process: int) -> bool:
    """Whether it is still there: one that failed is not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def count(folder: Path) -> int:
    file = folder / "visits"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers() as started:
        yield started


def kill_and_go_on(
    workers: Workers, kind: str, folder: Path, *, seed: int, turns: int, pause: float
) -> tuple[int, set[str]]:
    """How often the work was killed until it was done, and the turns in which; all that must hold is checked.

    A kill comes after one to `turns` more turns, at a random moment: while one works, or while it stores. Where the machine
    is so slow that no turn ended since the last kill, it may come later.
    """
    whole, torn, chance = folder / "whole", folder / "torn", random.Random(seed)
    kills, struck, ended, late = 0, set[str](), 0, 1
    workers.start(kind, whole, 0.0)
    workers.wait()
    while not (torn / "bits").exists():
        wanted = count(torn) + chance.randint(1, turns)
        process = workers.start(kind, torn, pause)
        while count(torn) < wanted and not (torn / "bits").exists() and alive(process):
            time.sleep(0.002)
        time.sleep(chance.random() * 1.5 * pause * late)
        if killed(process):
            kills += 1
            struck.add((torn / "visits").read_text().splitlines()[-1])
        elif not (torn / "bits").exists():
            raise AssertionError("the work failed by itself")
        workers.wait()
        late, ended = (1, len(kept(torn))) if len(kept(torn)) > ended else (2 * late, ended)
    found, expected = (pickle.loads((path / "bits").read_bytes()) for path in (torn, whole))
    assert found == expected
    seen, once = (Counter((path / "visits").read_text().splitlines()) for path in (torn, whole))
    assert set(seen) == set(once)
    assert once.total() == len(once) == len(kept(whole)) == len(kept(torn))
    assert seen.total() <= len(once) + kills  # at most the turn that was going on is done again
    return kills, struck


def kept(folder: Path) -> list[Path]:
    return list((folder / "run").glob("*/turn-*"))


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_ends_with_the_bits_of_a_whole_one(
    workers: Workers, tmp_path: Path
) -> None:
    kills, _ = kill_and_go_on(workers, "rounded", tmp_path, seed=0, turns=3, pause=0.1)
    assert kills >= 3


@pytest.mark.slow
def test_passes_that_learn_end_with_the_same_bits_wherever_they_are_killed(
    workers: Workers, tmp_path: Path
) -> None:
    """Scales by les, codes by adaround from gptq and corrected biases in one sweep; then residual blocks."""
    kills, struck = kill_and_go_on(workers, "learned", tmp_path, seed=0, turns=2, pause=0.03)
    assert kills >= 3
    assert any(":" in turn for turn in struck)  # a turn of the sweep
    assert any(":" not in turn for turn in struck)  # a block
    _, journals = pickle.loads((tmp_path / "torn" / "bits").read_bytes())
    assert len(journals[-1][0]) >= 2  # blocks that have other codes now
    assert {name(path) for path in kept(tmp_path / "torn")} == {
        "learn-scaling+fit-ranges+round-weights+correct-bias+tell",
        "reconstruct-blocks",
    }


def name(turn: Path) -> str:
    """The passes of the run that a turn belongs to."""
    return turn.parent.name.split("-", 1)[1].rsplit("-", 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_more_kills(workers: Workers, tmp_path: Path, seed: int) -> None:
    kills, _ = kill_and_go_on(workers, "learned", tmp_path, seed=seed, turns=1, pause=0.05)
    assert kills >= 5
