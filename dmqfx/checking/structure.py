"""Second opinions on the shape of the graph: which concatenation is a long skip, which layers read one tensor."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.facts import INTEGER, QDQ
from dmqfx.graph.modules import label
from dmqfx.graph.program import Program
from dmqfx.graph.sites import readers
from dmqfx.graph.table import LayerPair, Planned, SkipConcat

__all__ = ["depth", "is_quantized_layer", "pair_claims", "skip_claims", "skip_of"]


def skip_claims(program: Program, site: Site, entry: SkipConcat) -> Iterator[str]:
    """What speaks against a SkipConcat."""
    arms = _arms(program.node(site.at))
    if arms is None:
        yield "the operation does not concatenate"
        return
    counts = [arm.meta["val"].shape[1] for arm in arms]
    claimed = [entry.deep, entry.skip] if entry.skip_last else [entry.skip, entry.deep]
    if counts != claimed:
        yield f"the arms have {counts} channels, not {claimed}"
        return
    deep, skip = arms if entry.skip_last else arms[::-1]
    if depth(deep) <= depth(skip):
        yield f"{label(deep)} is called deep, but {label(skip)} has as many convolutions behind it"
    if (entry.deep_variance != entry.deep_variance) != (entry.skip_variance != entry.skip_variance):
        yield "the variance of one arm is measured, that of the other is not"


def skip_of(node: fx.Node) -> fx.Node | None:
    """The arm of a concatenation of feature maps from which the other arm is made, by way of convolutions."""
    arms = _arms(node) or []
    if len(arms) != 2 or arms[0].meta["val"].dim() != 4 or ops.args(node)["dim"] not in (1, -3):
        return None
    for skip, deep in (arms, arms[::-1]):
        if skip in _upstream(deep) and depth(deep) > depth(skip):
            return skip
    return None


def pair_claims(program: Program, site: Site, entry: LayerPair) -> Iterator[str]:
    """What speaks against a LayerPair, but for whether its producer can absorb a scale."""
    if {QDQ, INTEGER} & program.facts:  # then every reader has a dequantize of its own
        return
    if entry.readers[:1] != (site,):
        yield "the entry does not stand at its first reader"
    sources = {program.source(reader) for reader in entry.readers}
    if len(sources) != 1:
        yield f"its readers read {len(sources)} tensors: {', '.join(sorted(map(label, sources)))}"
        return
    source = sources.pop()
    reading = {Site(user.meta["address"], arg) for user, arg in readers(source)}
    left_out = sorted(s for s in reading - set(entry.readers) if is_quantized_layer(program, s))
    if left_out:
        yield f"{left_out[0]} reads {label(source)} too and is left out"
    if entry.producer is None and not entry.reason:
        yield "there is no producer and no reason why not"
    if entry.producer is not None and entry.producer not in program:
        yield f"{entry.producer} is said to absorb the scale, but there is no such operation"
    elif entry.producer is not None and reading != set(entry.readers):
        unscaled = min(reading - set(entry.readers))
        yield f"{entry.producer} is said to absorb the scale, but {unscaled} reads it unscaled"


def is_quantized_layer(program: Program, site: Site) -> bool:
    """Whether a site is the input of a layer whose input and weight are both planned to be quantized."""
    plans = [program.table.get(s, Planned) for s in (site, Site(site.at, "weight"))]
    return site.arg == "input" and all(plan is not None and plan.spec is not None for plan in plans)


def _arms(node: fx.Node) -> list[fx.Node] | None:
    """What a concatenation reads, or None if it is none."""
    arms = ops.args(node).get("tensors") if ops.is_call(node, "cat") else None
    return [arm for arm in arms if isinstance(arm, fx.Node)] if isinstance(arms, (list, tuple)) else None


def depth(node: fx.Node) -> int:
    """How many convolutions lie behind a value."""
    return sum(1 for each in _upstream(node) if ops.is_call(each, "conv2d", "qconv2d", "kernel_conv2d"))


def _upstream(node: fx.Node) -> set[fx.Node]:
    """A value and all that it is made from."""
    seen, todo = set[fx.Node](), [node]
    while todo:
        here = todo.pop()
        if here not in seen:
            seen.add(here)
            todo += here.all_input_nodes
    return seen
