"""What a layer will compute once the table is carried out: the quantized twin of one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.facts import SCALED
from dmqfx.graph.modules import call_with
from dmqfx.graph.program import Program
from dmqfx.graph.sites import channel_axis
from dmqfx.graph.table import Bias, ChannelScale, Codes, LayerPair, Planned, Shift, Table
from dmqfx.numbers.packing import unpack
from dmqfx.numbers.quant import QParams, dequantize, quantize, spread
from dmqfx.numbers.scaling import column_factor
from dmqfx.runtime.operators import timestep_group

__all__ = [
    "Deployed",
    "deployed_bias",
    "deployed_input",
    "deployed_weight",
    "pending_scales",
    "scaled_weight",
]


class Deployed:
    """One call with its planned arguments quantized, as far as the table knows how.

    What stands for a weight is unpacked once if it is `held`, else for every call.

    Shapes: timestep [B].
    """

    def __init__(
        self,
        program: Program,
        table: Table,
        node: fx.Node,
        gammas: Mapping[Site, Tensor],
        *,
        held: bool = True,
    ) -> None:
        self._node, self._program = node, program
        self._constants: dict[str, Callable[[], Tensor]] = {}
        self._inputs: dict[str, _Input] = {}
        for arg in ops.args(node) if "address" in node.meta else ():
            site = Site(node.meta["address"], arg)
            if (constant := _constant(program, table, site, gammas)) is not None:
                self._constants[arg] = cache(constant) if held else constant
            elif (params := table.get(site, QParams)) is not None or site in gammas:
                axis = channel_axis(program, site)
                self._inputs[arg] = _Input(params, gammas.get(site), table.get(site, Shift), axis)

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """What stands for the float weight and bias, by argument, where that is quantized or corrected."""
        return {arg: make() for arg, make in self._constants.items()}

    @property
    def differs(self) -> bool:
        """Whether some argument is quantized."""
        return bool(self._constants or self._inputs)

    def __call__(self, timestep: Tensor, value_of: Callable[[fx.Node], object], **instead: Tensor) -> object:
        """The call's quantized value; `instead` has what is being learned: constants, and steps of inputs.

        A slope passes the rounding of an input wherever that clips nothing; a step's is that of LSQ
        (arXiv 1902.08153), without its factor.
        """
        assert isinstance(self._node.target, OpOverload)  # sites are arguments of operators
        own = {arg: make() for arg, make in self._constants.items() if arg not in instead}
        named = {**ops.args(self._node), **own, **instead}
        for arg, given in ops.args(self._node).items():
            if arg in self._inputs and isinstance(given, fx.Node):
                named[arg] = self._inputs[arg](value_of(given), timestep, instead.get(arg))
        return call_with(self._node.target, (), named, value_of)


@dataclass(frozen=True, eq=False)
class _Input:
    """What becomes of an input: divided by gamma, rounded, or both."""

    params: QParams | None
    gamma: Tensor | None
    shift: Shift | None
    axis: int

    def __call__(self, x: object, timestep: Tensor, step: Tensor | None = None) -> Tensor:
        """Shapes: x [B, ...]; timestep [B]; step [G, 1] or [G, C], instead of the parameters' scale."""
        assert isinstance(x, Tensor)
        params = self.params if step is None or self.params is None else replace(self.params, scale=step)
        given = (params, self.gamma, self.shift, timestep, self.axis)
        learned = step is not None and step.requires_grad
        if not torch.is_grad_enabled() or not (x.requires_grad or learned):
            return deployed_input(x, *given)
        inside = within_range(x, *given)
        with torch.no_grad():
            off = deployed_input(x, *given) - inside
        if params is None or not learned:
            return inside + off
        scale = params.scale if self.shift is None else params.scale * self.shift.factor.to(params.scale)
        own = spread(scale, _group_of(params, timestep), self.axis, x.dim())
        return inside + off / own.detach() * own


def _constant(
    program: Program, table: Table, site: Site, gammas: Mapping[Site, Tensor]
) -> Callable[[], Tensor] | None:
    """Makes the weight or bias that stands for the float one; None where that stays."""
    codes, bias, gamma = table.get(site, Codes), table.get(site, Bias), gammas.get(Site(site.at, "input"))
    if codes is not None:
        return lambda: deployed_weight(codes, _bits(table, site)).to(program.device)
    if bias is not None:
        return lambda: bias.value.to(program.device)
    if site.arg == "weight" and gamma is not None:
        return partial(_scaled, program.constant_at(site), gamma)
    return None


def _scaled(weight: Tensor, gamma: Tensor) -> Tensor:
    return weight * column_factor(weight.shape, gamma.to(weight))


def deployed_bias(program: Program, table: Table, node: fx.Node, like: Tensor) -> Tensor:
    """A layer's bias by now, zeros without one.

    Shapes: like, result [O].
    """
    site = Site(node.meta["address"], "bias")
    if (found := table.get(site, Bias)) is not None:
        return found.value.to(like)
    if ops.args(node).get("bias") is None:
        return torch.zeros_like(like)
    return program.constant_at(site).detach()


def deployed_weight(codes: Codes, bits: int) -> Tensor:
    """The weight that the codes stand for.

    Shapes: as the weight was, [O, ...].
    """
    params = codes.qparams
    real = unpack(codes.packed, bits, params.qmin < 0, codes.shape)
    return dequantize(real, params.scale, params.zero_point, None, params.axis or 0)


def deployed_input(
    x: Tensor, params: QParams | None, gamma: Tensor | None, shift: Shift | None, timestep: Tensor, axis: int
) -> Tensor:
    """Q(x / gamma), with the parameters of each row's timestep group; without parameters x / gamma.

    Shapes: x [B, ...] with C channels on `axis`; gamma [C]; timestep [B].
    """
    if params is None:
        return x if gamma is None else x / spread(gamma[None].to(x), None, axis, x.dim())
    group = _group_of(params, timestep)
    scale, zero_point = params.scale, params.zero_point
    if shift is not None:
        scale = scale * shift.factor.to(scale)
    step = scale if gamma is None else scale * gamma.to(scale)
    codes = quantize(x, step, zero_point, group, axis, params.qmin, params.qmax)
    return dequantize(codes, scale, zero_point, group, axis)


def within_range(
    x: Tensor, params: QParams | None, gamma: Tensor | None, shift: Shift | None, timestep: Tensor, axis: int
) -> Tensor:
    """x / gamma cut off at the least and the greatest code, not rounded.

    Shapes: as for `deployed_input`.
    """
    if gamma is not None:
        x = x / spread(gamma[None].to(x), None, axis, x.dim())
    if params is None:
        return x
    group = _group_of(params, timestep)
    scale = params.scale if shift is None else params.scale * shift.factor.to(params.scale)
    low, high = (
        spread((end - params.zero_point) * scale, group, axis, x.dim()) for end in (params.qmin, params.qmax)
    )
    return torch.minimum(torch.maximum(x, low.to(x)), high.to(x))


def _group_of(params: QParams, timestep: Tensor) -> Tensor | None:
    """The timestep group of each row, or None if there is one for all."""
    if not params.boundaries:
        return None
    return timestep_group(timestep, torch.tensor(params.boundaries, device=timestep.device))


def pending_scales(program: Program, table: Table) -> dict[Site, Tensor]:
    """The equivalent scale [C] of every input site that has one which is learned and not yet in the graph."""
    if SCALED in program.facts:
        return {}
    scales = table.of(ChannelScale)
    pairs = ((pair, scales[at].gamma) for at, pair in table.of(LayerPair).items() if at in scales)
    return {site: gamma for pair, gamma in pairs for site in pair.readers}


def scaled_weight(program: Program, site: Site) -> Tensor:
    """The weight at a site as it is rounded: times the equivalent scale that is not yet in the graph."""
    weight = program.constant_at(site).detach()
    gamma = pending_scales(program, program.table).get(Site(site.at, "input"))
    return weight if gamma is None else weight * column_factor(weight.shape, gamma.to(weight))


def _bits(table: Table, site: Site) -> int:
    planned = table.get(site, Planned)
    assert planned is not None
    assert planned.spec is not None  # codes are made of what was planned
    return planned.spec.bits
