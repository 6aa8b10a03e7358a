"""What a layer will compute once the table is carried out: the quantized twin of one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.facts import SCALED
from dmqfx.graph.modules import call_with
from dmqfx.graph.program import Program
from dmqfx.graph.sites import channel_axis
from dmqfx.graph.table import Bias, ChannelScale, Codes, LayerPair, Planned, Shift, Table
from dmqfx.numbers.packing import unpack
from dmqfx.numbers.quant import QParams, dequantize, quantize
from dmqfx.numbers.scaling import column_factor
from dmqfx.runtime.operators import timestep_group

__all__ = ["Deployed", "deployed_input", "deployed_weight", "pending_scale"]


class Deployed:
    """Calls with their planned arguments quantized, as far as the table knows how.

    Shapes: timestep [B].
    """

    def __init__(self, program: Program, table: Table, timestep: Tensor) -> None:
        self._program, self._table, self._timestep = program, table, timestep

    def changes(self, node: fx.Node) -> bool:
        """Whether some argument of a call is quantized."""
        at = node.meta.get("address")
        return at is not None and any(
            self._table.get(Site(at, arg), QParams) or self._table.get(Site(at, arg), Codes)
            for arg in ops.args(node)
        )

    def call(self, node: fx.Node, value_of: Callable[[fx.Node], object]) -> object:
        """The call's quantized value."""
        if not self.changes(node):
            assert callable(node.target)
            return call_with(node.target, node.args, node.kwargs, value_of)
        at, changed = node.meta["address"], dict[str, object]()
        for arg, given in ops.args(node).items():
            site = Site(at, arg)
            if isinstance(given, fx.Node):
                if arg == "weight" and (codes := self._table.get(site, Codes)):
                    changed[arg] = deployed_weight(codes, self._planned_bits(site))
                elif params := self._table.get(site, QParams):
                    x = value_of(given)
                    assert isinstance(x, Tensor)
                    gamma = pending_scale(self._program, self._table, site)
                    changed[arg] = deployed_input(
                        x, params, gamma, self._table.get(site, Shift),
                        self._timestep, channel_axis(self._program, site),
                    )  # fmt: skip
            if arg == "bias" and (bias := self._table.get(site, Bias)):
                changed[arg] = bias.value
        return _call(node, changed, value_of)

    def _planned_bits(self, site: Site) -> int:
        planned = self._table.get(site, Planned)
        assert planned is not None and planned.spec is not None
        return planned.spec.bits


def deployed_weight(codes: Codes, bits: int) -> Tensor:
    """The weight that the codes stand for."""
    params = codes.qparams
    real = unpack(codes.packed, bits, params.qmin < 0, codes.shape)
    return dequantize(real, params.scale, params.zero_point, None, params.axis or 0)


def deployed_input(
    x: Tensor, params: QParams, gamma: Tensor | None, shift: Shift | None, timestep: Tensor, axis: int
) -> Tensor:
    """Q(x / gamma), with the parameters of each row's timestep group.

    Shapes: x [B, ...] with C channels on `axis`; gamma [C]; timestep [B].
    """
    group = None
    if params.boundaries:
        group = timestep_group(timestep, torch.tensor(params.boundaries, device=timestep.device))
    scale, zero_point = params.scale, params.zero_point
    if shift is not None:
        scale = scale * shift.factor.to(scale)
    step = scale if gamma is None else scale * gamma.to(scale)
    codes = quantize(x, step, zero_point, group, axis, params.qmin, params.qmax)
    return dequantize(codes, scale, zero_point, group, axis)


def pending_scale(program: Program, table: Table, site: Site) -> Tensor | None:
    """The scale [C] that is learned for an input site and not yet in the graph, or None."""
    if SCALED in program.facts:
        return None
    first = next((at for at, pair in table.of(LayerPair).items() if site in pair.readers), None)
    scale = table.get(first, ChannelScale) if first is not None else None
    return None if scale is None else scale.gamma


def scaled_weight(program: Program, site: Site) -> Tensor:
    """The weight at a site as it is rounded: times the equivalent scale that is not yet in the graph."""
    weight = program.constant_at(site).detach()
    gamma = pending_scale(program, program.table, Site(site.at, "input"))
    return weight if gamma is None else weight * column_factor(weight.shape, gamma.to(weight))


def _call(node: fx.Node, changed: dict[str, object], value_of: Callable[[fx.Node], object]) -> object:
    from torch.utils._pytree import tree_map_only

    named = {
        arg: changed[arg] if arg in changed else tree_map_only(fx.Node, value_of, given)
        for arg, given in ops.args(node).items()
    }
    args, kwargs = ops.call_spelling(node.target, named)  # type: ignore[arg-type]
    assert callable(node.target)
    return node.target(*args, **kwargs)
