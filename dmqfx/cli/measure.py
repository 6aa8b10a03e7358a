"""The command that measures this machine: bench."""

from __future__ import annotations

import argparse
import math
import re
from typing import TYPE_CHECKING

from dmqfx.cli import sources, terminal
from dmqfx.cli.terminal import Commands, bars, command, whole

if TYPE_CHECKING:
    from dmqfx.runtime.costs import Cost
    from dmqfx.runtime.timing import Kind


_NAMED = 4  # addresses


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    parser = command(
        commands,
        "bench",
        bench,
        "time every kind of layer of a compiled model on this machine, and keep what is faster",
        (
            ("dmqfx bench unet-w4a8/", "at the model's example sizes"),
            ("dmqfx bench unet-w4a8/ --batch 2 --size 96x64", "a guided pair of 768 x 512 pixels"),
            ("dmqfx bench unet-w4a8/ --seconds 1", "longer, where other programs run too"),
        ),
    )
    parser.add_argument("compiled", metavar="COMPILED", help="folder of `dmqfx compile`")
    parser.add_argument("--batch", type=whole(1), help="rows of a call [the model's example]")
    parser.add_argument(
        "--size", type=_size, metavar="HxW", help="of the sample, as the UNet gets it [the model's example]"
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=0.2, help="for each kind of layer, all its forms together [0.2]"
    )


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write height and width, as 64x64")
    return int(found[1]), int(found[2])


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text} seconds are no time to measure in: a number above 0, as 0.2"
        )
    return seconds


def bench(options: argparse.Namespace) -> int:
    """dmqfx bench."""
    from dmqfx.runtime import timing
    from dmqfx.runtime.costs import keep, machine

    program = sources.load_stored(options.compiled).program
    sizes = {"B": options.batch} if options.batch else {}
    if options.size is not None:
        sizes |= dict(zip("HW", options.size, strict=True))
    kinds = timing.kinds(timing.resized(program, **sizes))
    found = timing.measured(kinds, options.seconds, bars=bars())
    path = keep(found)
    rows = [(kind, found[kind.name, kind.size]) for kind in kinds]
    follow = "models that are lowered for `cpu` here follow it, but for attention in codes"
    text = f"{_table(rows)}\n\n{_said(rows)}\nkept in {path}: {follow}"
    layers = [
        {
            "layer": kind.name,
            "input": kind.size,
            "addresses": [str(at) for at in kind.addresses],
            "native_ms": cost.native,
            "otherwise_ms": cost.otherwise,
            "faster": _faster(kind, cost),
        }
        for kind, cost in rows
    ]
    terminal.say(options, text, {"machine": machine(), "file": str(path), "layers": layers})
    return terminal.OK


def _faster(kind: Kind, cost: Cost) -> str:
    return kind.otherwise if cost.native_loses else "native"


def _table(rows: list[tuple[Kind, Cost]]) -> str:
    from dmqfx.seeing import wording

    lines = [["layer", "input", "times", "native", "otherwise", "", "faster"]]
    for kind, cost in sorted(rows, key=lambda row: row[1].native * len(row[0].addresses), reverse=True):
        spent = [f"{cost.native:.3g} ms", f"{cost.otherwise:.3g} ms", f"{cost.otherwise / cost.native:.2f}"]
        lines.append([kind.name, kind.size, str(len(kind.addresses)), *spent, _faster(kind, cost)])
    return wording.columns(lines, right=frozenset({2, 3, 4, 5}))


def _said(rows: list[tuple[Kind, Cost]]) -> str:
    every = [cost for kind, cost in rows for _ in kind.addresses]
    native, otherwise = sum(cost.native for cost in every), sum(cost.otherwise for cost in every)
    best = sum(cost.otherwise if cost.native_loses else cost.native for cost in every)
    count, slow = len(every), sum(cost.native_loses for cost in every)
    spent = f"native {native:.4g} ms a call, otherwise {otherwise:.4g} ms, the faster of each {best:.4g} ms"
    return f"{count} layers and attentions, {slow} of them slower by native kernels: {spent}{_mend(rows)}"


def _mend(rows: list[tuple[Kind, Cost]]) -> str:
    """What to do where attention is slower in codes, which no lowering undoes."""
    from dmqfx.runtime import costs

    slow = [at for kind, cost in rows if cost.native_loses and kind.is_coded for at in kind.addresses]
    if not slow:
        return ""
    more = f" and {len(slow) - _NAMED} more" if len(slow) > _NAMED else ""
    where = f"{', '.join(map(str, slow[:_NAMED]))}{more}"
    return f"\nattention in codes is slower than in float at {where}\n  mend: {costs.LEAVE_FLOAT}"
