"""How much the UNet's output feels an error of each layer's output: one look back by automatic differentiation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dmqfx import processes
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.modules import call_with, constant
from dmqfx.graph.program import Program
from dmqfx.graph.sites import CHANNEL_AXIS
from dmqfx.graph.table import Planned, Sensitivity
from dmqfx.numbers.ranges import search_range
from dmqfx.runtime.operators import timestep_group
from dmqfx.sweep.chunks import Chunk
from dmqfx.sweep.streaming import streamed

__all__ = ["LARGEST_METRIC", "measure"]

LARGEST_METRIC = 2048
"""Output channels up to which a layer gets a full metric; wider ones only weights per timestep group."""


@dataclass(eq=False)
class _Layer:
    """What is summed up for one layer: by timestep group, and over all."""

    node: fx.Node
    step: Tensor
    felt: Tensor
    noise: Tensor
    metric: Tensor | None = None


@dataclass(eq=False)
class _Look:
    """One batch, forward and back: each layer's gradient and the energy that its weights meet."""

    program: Program
    layers: Mapping[fx.Node, _Layer]
    chunk: Chunk
    seed: int
    outputs: dict[fx.Node, Tensor] = field(default_factory=dict)
    energies: dict[fx.Node, Tensor] = field(default_factory=dict)

    def gradients(self) -> Iterator[tuple[_Layer, Tensor, Tensor]]:
        """(layer, gradient [B, ..., O], energy of what each output position reads [B, ..., 1]).

        The gradient is that of a random direction of the output, each row relative to its own norm, and drawn
        for it alone: it does not depend on the rows beside it.
        """
        with torch.enable_grad():
            out = self._forward()
            norm = out.detach().flatten(1).norm(dim=1).clamp(min=torch.finfo(out.dtype).tiny)
            drawn = torch.stack([self._drawn(row, out.shape[1:]) for row in range(len(out))]).to(out)
            direction = drawn / norm.view(-1, *[1] * (out.dim() - 1))
            wanted = [node for node in self.layers if self.outputs[node].requires_grad]
            found = torch.autograd.grad(
                out, [self.outputs[node] for node in wanted], direction, allow_unused=True
            )
        for node, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                yield (
                    self.layers[node],
                    gradient.movedim(CHANNEL_AXIS[ops.name(node)], -1),
                    self.energies[node],
                )

    def _drawn(self, row: int, shape: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + self.chunk.first + row)
        return torch.randn(shape, generator=generator)

    def _forward(self) -> Tensor:
        values: dict[fx.Node, object] = {}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                values[node] = self.chunk.inputs[str(node.target)]
            elif node.op == "get_attr":
                values[node] = constant(self.program.gm, str(node.target)).detach()
            elif node.op == "output":
                return torch.cat([_flat(values[n]) for n in node.all_input_nodes], 1)
            elif node.op == "call_module":  # an observer, which is an identity
                values[node] = values[node.all_input_nodes[0]]
            else:
                assert callable(node.target)  # calls are all that is left
                value = call_with(node.target, node.args, node.kwargs, lambda n: values[n])
                values[node] = self._watched(node, value, values) if node in self.layers else value
        raise AssertionError("a graph ends with its output")

    def _watched(self, node: fx.Node, value: object, values: Mapping[fx.Node, object]) -> Tensor:
        assert isinstance(value, Tensor)
        found = value if value.requires_grad else value.detach().requires_grad_()
        x = values[ops.tensor(node, "input")]
        assert isinstance(x, Tensor)
        self.outputs[node], self.energies[node] = found, _energy(node, x.detach())
        return found


def measure(
    program: Program,
    chunks: Sequence[Chunk],
    boundaries: tuple[float, ...],
    generator: torch.Generator,
) -> dict[Site, Sensitivity]:
    """The sensitivity of every layer with planned weights, at the site of its output.

    The expected output noise of each timestep group is predicted from the planned weights' steps; every
    group then counts by the inverse of its noise, so that none drowns the others. The first look finds the
    noise, the second the metric. Where processes share the rows, `chunks` are those of this one.
    """
    layers = {layer.node: layer for layer in _layers(program, len(boundaries) + 1)}
    edges, groups = torch.tensor(boundaries), len(boundaries) + 1
    first, second = torch.randint(2**31, (2,), generator=generator).tolist()
    seen = torch.zeros(groups, dtype=torch.float64)
    rows = sum(len(chunk.timestep) for chunk in chunks)
    looks = streamed((*chunks, *chunks), 2 * rows, "measure-sensitivity")
    for chunk in islice(looks, len(chunks)):
        group = timestep_group(chunk.timestep.cpu(), edges)
        seen += torch.bincount(group, minlength=groups)
        for layer, gradient, energy in _Look(program, layers, chunk, first).gradients():
            felt = gradient.square().flatten(1).sum(1)
            noise = ((gradient.square() @ (layer.step.square() / 12))[..., None] * energy).flatten(1).sum(1)
            layer.felt.index_add_(0, group, felt.double().cpu())
            layer.noise.index_add_(0, group, noise.double().cpu())
    seen = processes.summed(seen)
    for layer in layers.values():
        layer.felt, layer.noise = processes.summed(torch.stack([layer.felt, layer.noise]))
    total = torch.stack([layer.noise for layer in layers.values()]).sum(0) / seen.clamp(min=1)
    importance = torch.where(total > 0, 1 / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    for chunk in looks:
        group = timestep_group(chunk.timestep.cpu(), edges)
        for layer, gradient, _ in _Look(program, layers, chunk, second).gradients():
            if layer.metric is not None:
                weight = importance[group].sqrt().to(gradient).view(-1, *[1] * (gradient.dim() - 1))
                each = (gradient * weight).flatten(0, -2)
                layer.metric += each.T @ each
    for layer in layers.values():
        layer.metric = None if layer.metric is None else processes.summed(layer.metric)
    return {
        Site(layer.node.meta["address"], "out"): _entry(layer, importance, seen, boundaries)
        for layer in layers.values()
    }


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


def _entry(layer: _Layer, importance: Tensor, seen: Tensor, boundaries: tuple[float, ...]) -> Sensitivity:
    weight = layer.felt / seen.clamp(min=1) * importance
    live = seen > 0
    mean = weight[live].mean() if bool(live.any()) else weight.sum()
    weight = weight / mean if float(mean) > 0 else torch.ones_like(weight)
    nearest = (torch.arange(len(seen))[:, None] - live.nonzero().flatten()).abs().argmin(1)
    return Sensitivity(weight[live][nearest].float(), layer.metric, boundaries)


def _energy(node: fx.Node, x: Tensor) -> Tensor:
    """The sum of squares that each output position reads.

    Shapes: x [B, C, H, W] -> [B, H', W', 1] for a convolution; [B, ..., C] -> [B, ..., 1] for a linear layer.
    """
    if ops.is_call(node, "linear"):
        return x.square().sum(-1, keepdim=True)
    named = ops.args(node)
    kernel = ops.tensor(node, "weight").meta["val"].shape[2:]
    energy = x.square().sum(1, keepdim=True)
    window = energy.new_ones(1, 1, *kernel)
    found = F.conv2d(energy, window, None, named["stride"], named["padding"], named["dilation"])  # type: ignore[arg-type]  # canonical
    return found.movedim(1, -1)


def _flat(value: object) -> Tensor:
    assert isinstance(value, Tensor)  # a program's outputs are tensors
    return value.flatten(1)
