"""How much the UNet's output feels an error of each layer's output: two looks back by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dmqfx import processes
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.modules import computed
from dmqfx.graph.program import Program
from dmqfx.graph.sites import CHANNEL_AXIS
from dmqfx.graph.table import Planned, Sensitivity
from dmqfx.numbers.ranges import search_range
from dmqfx.numbers.voting import nearest_full
from dmqfx.runtime.operators import timestep_group
from dmqfx.sweep.blockwalk import Twins
from dmqfx.sweep.chunks import Chunk
from dmqfx.sweep.network import Network

__all__ = ["LARGEST_METRIC", "Measurement"]

LARGEST_METRIC = 2048
"""Output channels up to which a layer gets a full metric; wider ones only weights per timestep group."""


@dataclass(eq=False)
class _Layer:
    """What is summed up for one layer: by timestep group, and over all.

    Shapes: step [O]; felt, noise float64 [G]; metric [O, O].
    """

    node: fx.Node
    step: Tensor
    felt: Tensor
    noise: Tensor
    metric: Tensor | None = None

    def add_noise(self, gradient: Tensor, energy: Tensor, group: Tensor) -> None:
        """What rounding the weight with its step is expected to make of the rows' outputs."""
        squares, steps = gradient.square(), self.step.square() / 12
        if (groups := energy.shape[-1]) == 1:
            moved = (squares @ steps)[..., None]
        else:
            moved = (squares.reshape(*squares.shape[:-1], groups, -1) * steps.view(groups, -1)).sum(-1)
        noise = (moved * energy).flatten(1).sum(1)
        self.felt.index_add_(0, group, gradient.square().flatten(1).sum(1).double().cpu())
        self.noise.index_add_(0, group, noise.double().cpu())

    def products(self, gradient: Tensor, importance: Tensor) -> Tensor | None:
        """The metric of every output position, summed, rows as they weigh; None for a layer that is too wide."""
        if self.metric is None:
            return None
        weight = importance.sqrt().to(gradient).view(-1, *[1] * (gradient.dim() - 1))
        each = (gradient * weight).flatten(0, -2)
        return each.T @ each

    def add_metric(self, gradient: Tensor, importance: Tensor) -> None:
        """Of some rows."""
        seen = self.products(gradient, importance)
        if self.metric is not None and seen is not None:
            self.metric += seen


Take: TypeAlias = Callable[[_Layer, Tensor, Tensor], object]
"""Gets a layer, the gradient of its output [B, ..., O], and the energy that each output position reads [B, ..., groups]."""


@dataclass(frozen=True)
class _Watched:
    """A layer's place in the network: its gradient is taken as it comes by, and not kept."""

    layer: _Layer
    take: Take
    differs = True

    def __call__(self, timestep: Tensor, value_of: Callable[[fx.Node], object], **instead: Tensor) -> Tensor:
        node, value = self.layer.node, computed(self.layer.node, value_of)
        assert isinstance(value, Tensor)
        if not torch.is_grad_enabled():
            return value
        x = value_of(ops.tensor(node, "input"))
        assert isinstance(x, Tensor)
        energy, axis = _energy(node, x.detach()), CHANNEL_AXIS[ops.name(node)]
        found = value if value.requires_grad else value.detach().requires_grad_()

        def hook(slope: Tensor) -> None:
            self.take(self.layer, slope.movedim(axis, -1), energy)

        found.register_hook(hook)  # type: ignore[no-untyped-call]  # torch has no types for it
        return found


@dataclass(frozen=True, eq=False)
class _Look:
    """Rows, forward and back.

    The gradient is that of a random direction of the output, each row relative to its own norm, and drawn
    for it alone: it does not depend on the rows beside it.
    """

    network: Network
    layers: Sequence[_Layer]
    seed: int

    def __call__(self, chunk: Chunk, take: Take) -> None:
        """Hand out each layer's gradient."""
        twins = {layer.node: _Watched(layer, take) for layer in self.layers}
        with torch.enable_grad():
            out = self.network(chunk, twins)
        norm = out.detach().norm(dim=1, keepdim=True).clamp(min=torch.finfo(out.dtype).tiny)
        drawn = torch.stack([self._drawn(number, out.shape[1]) for number in chunk.numbers]).to(out)
        if out.requires_grad:
            out.backward(drawn / norm)  # type: ignore[no-untyped-call]  # torch has no types for it

    def _drawn(self, number: int, size: int) -> Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(self.seed + number))


class Measurement:
    """The sensitivity of every layer with planned weights, while it is measured.

    The first look at the rows finds the output noise of each timestep group that the planned weights' steps are
    expected to make, and every group then counts by the inverse of its noise, so that none drowns the others. The
    second look finds the metric. Where processes share the rows, each sees its own.
    """

    def __init__(
        self, network: Network, program: Program, boundaries: tuple[float, ...], generator: torch.Generator
    ) -> None:
        self.network, self._boundaries, self._edges = network, boundaries, torch.tensor(boundaries)
        self._layers = list(_layers(program, len(boundaries) + 1))
        seeds = torch.randint(2**31, (2,), generator=generator).tolist()
        self._looks = [_Look(network, self._layers, seed) for seed in seeds]
        self._seen = torch.zeros(len(boundaries) + 1, dtype=torch.float64)

    @property
    def watched(self) -> Twins:
        """The layers, for a network whose gradients nobody takes."""
        return {layer.node: _Watched(layer, lambda *_: None) for layer in self._layers}

    @property
    def nbytes(self) -> int:
        """Memory of all sums."""
        return sum(tensor.nbytes for tensor in self.state().values())

    def try_out(self, chunk: Chunk) -> None:
        """What a look takes, without a trace."""
        equal = torch.ones(len(chunk.timestep))
        self._looks[1](chunk, lambda layer, slope, _: layer.products(slope, equal))

    def look(self, chunk: Chunk) -> None:
        """The first look at some rows."""
        group = timestep_group(chunk.timestep.cpu(), self._edges)
        self._seen += torch.bincount(group, minlength=len(self._seen))
        self._looks[0](chunk, lambda layer, slope, energy: layer.add_noise(slope, energy, group))

    def look_again(self, chunk: Chunk) -> None:
        """The second look at some rows, when the first was had at all."""
        own = self.importance[timestep_group(chunk.timestep.cpu(), self._edges)]
        self._looks[1](chunk, lambda layer, slope, _: layer.add_metric(slope, own))

    @cached_property
    def _felt(self) -> tuple[Tensor, dict[_Layer, Tensor]]:
        """Of all processes: rows seen by group [G], and for each layer what was felt and its noise [2, G]."""
        sums = {each: processes.summed(torch.stack([each.felt, each.noise])) for each in self._layers}
        return processes.summed(self._seen), sums

    @cached_property
    def importance(self) -> Tensor:
        """What each timestep group counts [G]."""
        seen, sums = self._felt
        noise = torch.stack([noise for _, noise in sums.values()]).sum(0) / seen.clamp(min=1)
        return torch.where(noise > 0, 1 / noise.clamp(min=torch.finfo(torch.float64).tiny), 0.0)

    def entries(self) -> dict[Site, Sensitivity]:
        """What was found, at the site of each layer's output."""
        seen, sums = self._felt
        found = {}
        for layer in self._layers:
            metric = None if layer.metric is None else processes.summed(layer.metric)
            weight = _weights(sums[layer][0], self.importance, seen)
            found[Site(layer.node.meta["address"], "out")] = Sensitivity(weight, metric, self._boundaries)
        return found

    def state(self) -> dict[str, Tensor]:
        """All sums so far."""
        found = {"seen": self._seen}
        for k, layer in enumerate(self._layers):
            found |= {f"{k}.felt": layer.felt, f"{k}.noise": layer.noise}
            found |= {} if layer.metric is None else {f"{k}.metric": layer.metric}
        return found

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on from sums that were kept."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _layers(program: Program, groups: int) -> Iterator[_Layer]:
    for node in program.calls("conv2d", "linear"):
        site = Site(node.meta["address"], "weight")
        planned = program.table.get(site, Planned)
        if planned is None or planned.spec is None:
            continue
        weight = program.constant_at(site).detach()
        rows = weight.shape[0]
        step = search_range(weight, planned.spec).scale.flatten().expand(rows).to(weight)
        sums = torch.zeros(2, groups, dtype=torch.float64)
        metric = weight.new_zeros(rows, rows) if rows <= LARGEST_METRIC else None
        yield _Layer(node, step, sums[0], sums[1], metric)


def _weights(felt: Tensor, importance: Tensor, seen: Tensor) -> Tensor:
    """What each timestep group weighs, 1 in the mean; one without rows takes its nearest neighbour's [G]."""
    weight = felt / seen.clamp(min=1) * importance
    live = seen > 0
    mean = weight[live].mean() if bool(live.any()) else weight.sum()
    weight = weight / mean if float(mean) > 0 else torch.ones_like(weight)
    return weight[nearest_full(seen)].float()


def _energy(node: fx.Node, x: Tensor) -> Tensor:
    """The sum of squares that each output position reads, for each group of channels.

    Shapes: x [B, C, H, W] -> [B, H', W', groups] for a convolution; [B, ..., C] -> [B, ..., 1] for a linear layer.
    """
    if ops.is_call(node, "linear"):
        return x.square().sum(-1, keepdim=True)
    named = ops.args(node)
    read, *kernel = ops.tensor(node, "weight").meta["val"].shape[1:]
    groups = x.shape[1] // read
    energy = x.square().reshape(len(x), groups, read, *x.shape[2:]).sum(2)
    window = energy.new_ones(groups, 1, *kernel)
    found = F.conv2d(energy, window, None, named["stride"], named["padding"], named["dilation"], groups)  # type: ignore[arg-type]  # canonical
    return found.movedim(1, -1)
