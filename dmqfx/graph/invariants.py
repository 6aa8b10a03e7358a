"""What must hold of every program, whatever pass made it: a sound graph, its own inputs, facts that are so."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dmqfx.errors import RewriteError
from dmqfx.graph.modules import label
from dmqfx.graph.program import Program

__all__ = ["check_facts", "check_structure"]


def check_structure(program: Program, step: str, before: Program | None = None) -> None:
    """What must hold after every pass: lint, the inputs, unique addresses, live table sites, output shapes.

    Raises: RewriteError naming the pass and the address, or the placeholder.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise RewriteError(f"{step} left a broken graph: {str(error).splitlines()[0]}") from error
    _check_inputs(program, step, before or program)
    seen: set[object] = set()
    for node in program.graph.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        address = node.meta.get("address")
        if address is None:
            raise RewriteError(f"{step} left {node.name} without an address; make nodes through the Rewriter")
        if address in seen:
            raise RewriteError(f"{step} left two operations at {address}")
        if "val" not in node.meta:
            raise RewriteError(f"{step} left {address} without a fake value; make nodes through the Rewriter")
        seen.add(address)
    for site in program.table.sites():
        if site.at not in seen:
            mend = (
                "put what took its place at the same address (rw.like, rw.call_at), or table.drop the entry"
            )
            raise RewriteError(f"{step} left a table entry for {site}, but that operation is gone; {mend}")
    if before is not None and _shapes(program) != _shapes(before):
        raise RewriteError(f"{step} changed the outputs from {_shapes(before)} to {_shapes(program)}")


def _check_inputs(program: Program, step: str, before: Program) -> None:
    """The placeholders are the inputs that the program before had declared, and still declares."""
    wanted = [i.name for i in before.inputs.inputs]
    placeholders = [str(node.target) for node in program.graph.nodes if node.op == "placeholder"]
    for what, names in (("placeholders", placeholders), ("inputs", [i.name for i in program.inputs.inputs])):
        if names != wanted:
            raise RewriteError(
                f"{step} changed the {what}: {_difference(names, wanted)}; a program is called with "
                f"{', '.join(wanted)}, so leave these as they are, read or not"
            )


def _difference(names: Sequence[str], wanted: Sequence[str]) -> str:
    """How names that are not the wanted ones differ from them."""
    told = [f"{name} is gone" for name in wanted if name not in names]
    told += [f"{name} is new" for name in names if name not in wanted]
    return ", ".join(told) or f"they stand in the order {', '.join(names)}"


def check_facts(program: Program, step: str) -> None:
    """What a program is said to be must be so, as far as a fact can be checked.

    Raises: RewriteError naming the pass, the fact and what contradicts it.
    """
    for fact in sorted(program.facts, key=str):
        if why := fact.broken(program):
            raise RewriteError(f"after {step} the fact {fact.name!r} ({fact.meaning}) does not hold: {why}")


def _shapes(program: Program) -> list[tuple[str, str]]:
    output = next(iter(reversed(program.graph.nodes)))
    values = [n.meta["val"] for n in output.all_input_nodes]
    return [
        (str(tuple(v.shape)), str(v.dtype)) if isinstance(v, Tensor) else (label(output), "") for v in values
    ]
