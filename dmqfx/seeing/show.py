"""Programs as text: `show` prints a line per operation, `diff` aligns two programs, `why` tells one life."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

from dmqfx.graph.address import Address
from dmqfx.graph.modules import label
from dmqfx.graph.program import Program
from dmqfx.seeing.given import Seen, program_of
from dmqfx.seeing.lines import Line, Part, lines
from dmqfx.seeing.selection import select
from dmqfx.seeing.why import why

__all__ = ["diff", "show", "why"]


def show(program: Seen, at: str = "**") -> str:
    """One line per operation: address, call with arguments by name, output shape; table entries after `!`.

    `at` is a glob on addresses (`*` stays inside one name, `**` crosses names) or, after `re:`, a regular
    expression.

    Raises: AddressError if no operation fits; NotAProgramError.
    Example:
        >>> import torch
        >>> from torch import fx
        >>> from dmqfx.graph.inputs import Input, InputSpec
        >>> from dmqfx.graph.modules import build, propagate
        >>> graph = fx.Graph()
        >>> silu = graph.call_function(torch.ops.aten.silu.default, (graph.placeholder("sample"),))
        >>> silu.meta["address"] = Address("act", "silu")
        >>> _ = graph.output(silu)
        >>> gm, spec = build(graph, {}), InputSpec("Toy", (Input("sample", ("B", 3)),), {"B": 2})
        >>> propagate(gm, spec)
        >>> program = Program(gm, spec)
        >>> show(program)
        'act/silu  silu(self=sample) -> [2, 3]'
    """
    found = lines(program_of(program, "show"))
    wanted = select(found, at)
    return "\n".join(str(line) for address, line in found.items() if address in wanted)


def diff(before: Seen, after: Seen, at: str = "**", *, context: int = 0) -> str:
    """What differs between two programs, aligned by address: `-` gone, `+` new, `~` changed and how.

    Unchanged operations are left out, but for `context` of them around each change; the last line counts.

    Raises: AddressError if no operation of either program fits; NotAProgramError.
    Example:
        >>> import torch
        >>> from torch import fx
        >>> from dmqfx.graph.inputs import Input, InputSpec
        >>> from dmqfx.graph.modules import build, propagate
        >>> graph = fx.Graph()
        >>> silu = graph.call_function(torch.ops.aten.silu.default, (graph.placeholder("sample"),))
        >>> silu.meta["address"] = Address("act", "silu")
        >>> _ = graph.output(silu)
        >>> gm, spec = build(graph, {}), InputSpec("Toy", (Input("sample", ("B", 3)),), {"B": 2})
        >>> propagate(gm, spec)
        >>> program = Program(gm, spec)
        >>> diff(program, program.fork())
        'equal: 1 operation, 0 table entries'
    """
    before, after = program_of(before, "diff"), program_of(after, "diff")
    old, new = lines(before), lines(after, before.dtype)
    wanted = select({**old, **new}, at)
    old, new = ({k: line for k, line in each.items() if k in wanted} for each in (old, new))
    rows = [*_aligned(old, new), *_outputs(before, after)]
    count = {mark: sum(1 for each, _ in rows if each == mark) for mark in "+-~ "}
    if count[" "] == len(rows):
        entries = sum(len(line.notes) for line in new.values())
        return f"equal: {_many(len(new), 'operation')}, {_many(entries, 'table entry', 'table entries')}"
    shown = [f"{mark} {text}" for mark, text in _near_changes(rows, context)]
    return "\n".join(
        [*shown, f"{count['~']} changed, {count['+']} new, {count['-']} gone, {count[' ']} as before"]
    )


def _aligned(old: dict[Address, Line], new: dict[Address, Line]) -> Iterator[tuple[str, str]]:
    """(mark, text) of every operation of both programs, in an order that keeps both orders."""
    before, after = list(old), list(new)
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            for address in after[c:d]:
                changes = list(_changes(old[address], new[address]))
                text = f"{address}  {'; '.join(changes)}" if changes else str(new[address])
                yield ("~" if changes else " "), text
            continue
        for address in before[a:b]:
            yield "-", str(old[address]) + "  (moved)" * (address in new)
        for address in after[c:d]:
            yield "+", str(new[address]) + "  (moved)" * (address in old)


def _changes(old: Line, new: Line) -> Iterator[str]:
    if old.op != new.op:
        yield f"{old.op} => {new.op}"
    yield from (f"{arg}: {words}" for arg, words in _differences(old.arguments, new.arguments))
    if old.shape != new.shape:
        yield f"-> {old.shape} => {new.shape}"
    said: dict[str, list[str]] = {}
    for key, words in _differences(old.notes, new.notes):
        said.setdefault(key.partition(" ")[0], []).append(words)
    yield from (f"! {arg}: {' | '.join(words)}" for arg, words in said.items())


def _differences(old: Mapping[str, Part], new: Mapping[str, Part]) -> Iterator[tuple[str, str]]:
    """(key, what became of it), for each key whose part is not the same."""
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key), new.get(key)
        if was is None:
            yield key, f"+ {new[key].words}"
        elif now is None:
            yield key, f"- {was.words}"
        elif not was.same(now):
            yield key, f"{was.words} => {now.words if now.words != was.words else 'other values'}"


def _outputs(before: Program, after: Program) -> Iterator[tuple[str, str]]:
    old, new = (", ".join(map(label, each.graph.output_node().all_input_nodes)) for each in (before, after))
    if old != new:
        yield "~", f"output  {old} => {new}"


def _near_changes(rows: Sequence[tuple[str, str]], context: int) -> Iterator[tuple[str, str]]:
    changed = [k for k, (mark, _) in enumerate(rows) if mark != " "]
    kept = sorted({k for c in changed for k in range(max(c - context, 0), min(c + context + 1, len(rows)))})
    last = -1
    for k in kept:
        if context and k > last + 1:
            yield " ", "..."
        yield rows[k]
        last = k


def _many(count: int, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"
