"""Whether the producer that a pair names can take its scale: tried on numbers, not derived from the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, fx

from dmqfx.checking.tablecheck import Broken
from dmqfx.graph import ops
from dmqfx.graph.modules import call_with, label
from dmqfx.graph.program import Program
from dmqfx.graph.sites import channel_axis
from dmqfx.graph.table import LayerPair

__all__ = ["wrong_producers"]

_ROW_AXIS = MappingProxyType({"conv2d": 1, "linear": -1, "group_norm": 1, "layer_norm": -1})
_PIECES = (1, 2, 3)  # the rows as a whole; a gate and what it gates; query, key and value in one
_FACTORS = (2.0, 8.0, 32.0)  # no product or square of these is one of them


def wrong_producers(program: Program, inputs: Mapping[str, Tensor]) -> Iterator[Broken]:
    """Pairs whose producer's rows, scaled, do not scale the channels that the readers read, and only that."""
    pairs = {site: pair for site, pair in program.table.of(LayerPair).items() if pair.producer is not None}
    if not pairs:
        return
    run = fx.Interpreter(program.gm, garbage_collect_values=False)
    with torch.no_grad():
        run.run(*(inputs[i.name] for i in program.inputs.inputs))
        for site, pair in pairs.items():
            assert pair.producer is not None  # those without one are left out
            producer, source = program.node(pair.producer), program.source(site)
            if not _Experiment(run.env, producer, source, channel_axis(program, site)).succeeds():
                reason = (
                    f"scaling the rows of {label(producer)} does not scale the channels of {label(source)}"
                )
                yield Broken(site, "LayerPair", reason)


@dataclass(frozen=True, eq=False)
class _Experiment:
    """The values of one call, an operation whose rows are scaled, and a value with channels on `axis`."""

    values: Mapping[fx.Node, object]
    producer: fx.Node
    source: fx.Node
    axis: int

    def succeeds(self) -> bool:
        """Whether each channel gets the factor of one row, where all rows or one piece of them is scaled."""
        made, row_axis = self.values[self.producer], _ROW_AXIS.get(ops.name(self.producer))
        if row_axis is None or not isinstance(made, Tensor):
            return False
        count = made.shape[row_axis]
        for piece in (piece for pieces in _PIECES for piece in torch.arange(count).chunk(pieces)):
            factors = made.new_tensor(_FACTORS).repeat(count)[:count]
            per_row = torch.ones_like(factors).index_copy(0, piece.to(made.device), factors[: len(piece)])
            shape = [1] * made.dim()
            shape[row_axis] = count
            if self._scales(self._again(made * per_row.view(shape))):
                return True
        return False

    def _again(self, value: Tensor) -> object:
        """What the source becomes if the producer makes another value."""
        new: dict[fx.Node, object] = {self.producer: value}
        for node in self.source.graph.nodes:
            if (
                node not in new
                and any(read in new for read in node.all_input_nodes)
                and callable(node.target)
            ):
                new[node] = call_with(
                    node.target, node.args, node.kwargs, lambda n: new.get(n, self.values[n])
                )
            if node is self.source:
                break
        return new.get(self.source)

    def _scales(self, after: object) -> bool:
        """Whether the source has become itself times one of the factors in every channel; zeros stay zeros."""
        before = self.values[self.source]
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return False
        x, y = (each.movedim(self.axis, 0).flatten(1).double() for each in (before, after))
        gain = ((x * y).sum(1) / x.square().sum(1)).nan_to_num(nan=_FACTORS[0])
        factors = gain.new_tensor(_FACTORS)
        nearest = factors[(gain[:, None] - factors).abs().argmin(1)]
        off = (y - nearest[:, None] * x).norm(dim=1) / x.norm(dim=1)
        return bool((off.nan_to_num(nan=0.0) < 1e-3).all())
