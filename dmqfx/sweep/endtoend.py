"""Steps and biases learned for the UNet's output: all at once, by slopes through the whole quantized network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from dmqfx import processes
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.program import Program
from dmqfx.graph.table import Bias, Codes, Entry, Table
from dmqfx.numbers.quant import QParams
from dmqfx.numbers.voting import nearest_full
from dmqfx.runtime.operators import timestep_group
from dmqfx.sweep.blockwalk import Learned, quantized_twins
from dmqfx.sweep.chunks import Chunk
from dmqfx.sweep.deploy import deployed_bias
from dmqfx.sweep.finite import finite
from dmqfx.sweep.network import Network

__all__ = ["FARTHEST", "Descent", "Objective", "Steps", "practise"]

FARTHEST = 2.0
"""What a step may be multiplied or divided by at most."""
_BIAS_STEPS = 8.0  # a bias moves in steps of its channel's weight, these at a time
_HALVINGS = 3
_WEIGHTS_SHARE = 0.2  # of the rate, for the steps of weights


@dataclass(frozen=True)
class Descent:
    """How far each iteration moves.

    Units: `rate` is Adam's, for the logarithm of an input's step; a weight's step moves a fifth as fast, a bias
    by eight of its channel's weight steps for each 1 of a logarithm. The rate grows from 0 for the share `warmup`
    of the iterations, and all along it falls to 0 by a cosine.
    Example:
        >>> how = Descent(iterations=100, rate=1.0, warmup=0.1)
        >>> [round(how.factor(k), 2) for k in (0, 9, 50, 99)]
        [0.1, 0.98, 0.5, 0.0]
    """

    iterations: int
    rate: float
    warmup: float

    def factor(self, iteration: int) -> float:
        """What the rate is multiplied by."""
        begun = max(1, round(self.warmup * self.iterations))
        return min(1.0, (iteration + 1) / begun) * (1 + math.cos(math.pi * iteration / self.iterations)) / 2


@dataclass(frozen=True)
class _Made(Mapping[fx.Node, Mapping[str, Tensor]]):
    """What is made of each node when it is asked for, and not held: all weights of a UNet at once are many."""

    nodes: Mapping[fx.Node, object]
    make: Callable[[fx.Node], dict[str, Tensor]]

    def __getitem__(self, node: fx.Node) -> dict[str, Tensor]:
        if node not in self.nodes:
            raise KeyError(node)
        return self.make(node)

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)


class Steps:
    """The steps of inputs and weights, and the biases of layers with codes, while they are learned.

    Shapes: a number for each entry of a scale [G, 1], [G, C] or [1, O], and for each bias [O]; 0 is as it was.
    """

    def __init__(self, program: Program, table: Table, nodes: Sequence[fx.Node]) -> None:
        self._table = table
        self.twins = quantized_twins(program, table, nodes, held=False)
        self._scales, self._weights, self._biases = (
            dict[Site, Tensor](),
            dict[Site, Tensor](),
            dict[Site, Tensor](),
        )
        self._nodes = {node: node.meta["address"] for node in nodes if "address" in node.meta}
        self._before: dict[Site, Tensor] = {}
        for node, at in self._nodes.items():
            for arg in ops.args(node):
                site = Site(at, arg)
                if (codes := table.get(site, Codes)) is not None:
                    self._weights[site] = torch.zeros_like(codes.qparams.scale)
                    self._begin_bias(program, node, codes)
                elif (params := table.get(site, QParams)) is not None:
                    self._scales[site] = torch.zeros_like(params.scale)
        for each in self.numbers:
            each.requires_grad_()

    def _begin_bias(self, program: Program, node: fx.Node, codes: Codes) -> None:
        rows = codes.qparams.scale.flatten().expand(codes.shape[0])
        site = Site(node.meta["address"], "bias")
        self._before[site] = deployed_bias(program, self._table, node, rows).to(rows)
        self._biases[site] = torch.zeros_like(rows)

    @property
    def numbers(self) -> list[Tensor]:
        """All that is learned, in an order that does not change."""
        return [*self._scales.values(), *self._weights.values(), *self._biases.values()]

    def groups(self, rate: float) -> list[dict[str, object]]:
        """The numbers with their rates, as optimizers take them."""
        parts = ((self._scales, 1.0), (self._weights, _WEIGHTS_SHARE), (self._biases, 2.0))
        return [{"params": list(part.values()), "lr": rate * share} for part, share in parts if part]

    def learned(self) -> Learned:
        """The steps, weights and biases as they are by now, by operation and argument, made when they are asked for."""
        return _Made(self._nodes, self._made)

    def _made(self, node: fx.Node) -> dict[str, Tensor]:
        found = dict[str, Tensor]()
        for arg in ops.args(node):
            site = Site(self._nodes[node], arg)
            if site in self._scales:
                found[arg] = self._scale(site)
            elif site in self._weights:
                weight, wider = self.twins[node].constants[arg], self._weights[site].flatten().exp()
                found[arg] = weight * wider.to(weight).view(-1, *[1] * (weight.dim() - 1))
                found["bias"] = self._bias(Site(site.at, "bias"), site).to(weight)
        return found

    def scale(self, factor: float) -> None:
        """Go so many times as far from where everything was."""
        with torch.no_grad():
            for each in self.numbers:
                each.mul_(factor)

    def spread(self) -> None:
        """Let timestep groups of which there were no rows to learn from move like their neighbours."""
        with torch.no_grad():
            for each in self._scales.values():
                each.copy_(_like_neighbours(each))

    def entries(self) -> dict[Site, Entry]:
        """What the table gets."""
        with torch.no_grad():
            found: dict[Site, Entry] = {}
            for site in self._scales:
                params = self._table.get(site, QParams)
                assert params is not None  # it was when learning began
                found[site] = replace(params, scale=params.scale * self._scales[site].exp())
            for site in self._weights:
                codes = self._table.get(site, Codes)
                assert codes is not None
                scale = codes.qparams.scale * self._weights[site].exp()
                found[site] = replace(
                    codes, qparams=replace(codes.qparams, scale=scale), nearest=False, adjacent=False
                )
                bias = Site(site.at, "bias")
                found[bias] = Bias(self._bias(bias, site))
            return found

    def bound(self) -> None:
        """Put back what went too far."""
        most = math.log(FARTHEST)
        with torch.no_grad():
            for each in (*self._scales.values(), *self._weights.values()):
                each.clamp_(-most, most)

    def _scale(self, site: Site) -> Tensor:
        params = self._table.get(site, QParams)
        assert params is not None  # it was when learning began
        return params.scale * self._scales[site].exp()

    def _bias(self, site: Site, weight: Site) -> Tensor:
        codes = self._table.get(weight, Codes)
        assert codes is not None  # it was when learning began
        return self._before[site] + self._biases[site] * (_BIAS_STEPS * codes.qparams.scale.flatten())


def _like_neighbours(moved: Tensor) -> Tensor:
    """How far each group's steps moved; a group of which there were no rows moves like the nearest that had some.

    Shapes: [G, 1] or [G, C].
    """
    live = (moved != 0).any(1)
    return moved[nearest_full(live)] if bool(live.any()) else moved


@dataclass(eq=False)
class Objective:
    """The error of the outputs on all chunks, every timestep group relative to its own before learning.

    Where processes share the rows, chunks are those of this one. At most `portion` rows are computed at a time.

    Shapes: weight [G], the inverse of each group's error before learning; 0 where there was none.
    """

    network: Network
    chunks: Sequence[Chunk]
    edges: Tensor
    portion: int
    wanted: list[Tensor] = field(init=False)
    weight: Tensor = field(init=False)

    def begin(self, steps: Steps) -> None:
        """Two looks at all rows: at what the outputs should be, and at what they lack."""
        with torch.no_grad():
            self.wanted = [self._exact(k) for k in range(len(self.chunks))]
            error = self._errors(steps)
        self.weight = torch.where(error > 0, 1 / error.clamp(min=torch.finfo(error.dtype).tiny), 0.0)

    def begin_alone(self) -> None:
        """A look at what the outputs should be; errors count as they are, and no other process is waited for."""
        with torch.no_grad():
            self.wanted = [self._exact(k) for k in range(len(self.chunks))]
        self.weight = torch.ones(len(self.edges) + 1, dtype=torch.float64)

    def left(self, steps: Steps) -> float:
        """The mean over timestep groups of what is left of each one's error; 1 when learning begins."""
        with torch.no_grad():
            error = self._errors(steps)
        live = self.weight > 0
        return float((error * self.weight)[live].mean()) if bool(live.any()) else 0.0

    def settle(self, steps: Steps) -> float:
        """Go back half of the way as long as no less is left than there was, at most to an eighth; what is left then."""
        left = processes.agreed(self.left(steps))
        for _ in range(_HALVINGS):
            if left < 1:
                break
            steps.scale(0.5)
            left = processes.agreed(self.left(steps))
        return left

    def portions(self, k: int) -> list[slice]:
        """A chunk's rows as they are computed."""
        return [slice(at, at + self.portion) for at in range(0, len(self.chunks[k].timestep), self.portion)]

    def loss(self, k: int, rows: slice, steps: Steps, learned: Learned) -> Tensor:
        """The sum over some rows of a chunk."""
        part = self.chunks[k].part(rows)
        error = (self.network(part, steps.twins, learned) - self.wanted[k][rows]).double().square().mean(1)
        weight = self.weight.to(error)[timestep_group(part.timestep, self.edges.to(part.timestep.device))]
        return (error * weight).sum()

    def _exact(self, k: int) -> Tensor:
        """The float network's outputs on a chunk, which has no rows where there are fewer than processes."""
        parts = [self.network(self.chunks[k].part(rows)) for rows in self.portions(k)]
        return torch.cat(parts) if parts else torch.empty(0)

    def _errors(self, steps: Steps) -> Tensor:
        """The mean squared error of each timestep group.

        Shapes: float64 [G].
        """
        sums = torch.zeros(2, len(self.edges) + 1, dtype=torch.float64)
        learned = steps.learned()
        for k, chunk in enumerate(self.chunks):
            for rows in self.portions(k):
                part, wanted = chunk.part(rows), self.wanted[k][rows]
                error = (self.network(part, steps.twins, learned) - wanted).double().square().mean(1).cpu()
                if not finite(error):
                    self.network.blame(part, steps.twins, learned)
                group = timestep_group(part.timestep.cpu(), self.edges)
                sums[0].index_add_(0, group, error)
                sums[1].index_add_(0, group, torch.ones_like(error))
        total, count = processes.summed(sums)
        mean: Tensor = total / count.clamp(min=1)
        return mean


def practise(network: Network, steps: Steps, chunk: Chunk) -> None:
    """What an iteration does on a chunk: a look at what it should give, the loss, and the way back; nothing moves."""
    objective = Objective(network, [chunk], torch.empty(0), len(chunk.timestep))
    objective.begin_alone()
    with torch.enable_grad():
        objective.loss(0, slice(None), steps, steps.learned()).backward()  # type: ignore[no-untyped-call]  # torch has no types for it
