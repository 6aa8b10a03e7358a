"""The codes of a block's layers, learned together: what the block's output lacks decides, not each layer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, fx

from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.blocks import Block
from dmqfx.graph.program import Program
from dmqfx.graph.sites import CHANNEL_AXIS
from dmqfx.graph.table import Bias, Codes, Entry, Planned, Sensitivity, Table
from dmqfx.numbers.adaround import Annealing, Cells, rectified, unsettled
from dmqfx.numbers.packing import pack, unpack
from dmqfx.numbers.rounding import Grid
from dmqfx.sweep.blockwalk import Arrival, forward, quantized_twins
from dmqfx.sweep.deploy import deployed_bias, scaled_weight

__all__ = ["Reconstructed", "Weigh", "layers_with_codes", "reconstructed"]

Weigh: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Gets the losses of all rows and their timesteps, gives what each row weighs; all [N]."""


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """The loss of a block as it was and as learned, and the entries that learning came to.

    Units: losses relative to the energy of what the block's output should be.
    """

    before: float
    after: float
    entries: dict[Site, Entry]


def layers_with_codes(program: Program, table: Table, block: Block) -> list[fx.Node]:
    """The layers of a block whose weights have codes."""
    return [n for n in block.inside if table.get(Site(n.meta["address"], "weight"), Codes) is not None]


def reconstructed(
    program: Program,
    table: Table,
    block: Block,
    arrivals: Sequence[Arrival],
    how: Annealing,
    *,
    asymmetric: float,
    biases: bool,
    generator: torch.Generator,
    weigh: Weigh | None = None,
) -> Reconstructed:
    """Learn: each iteration looks at one chunk, drawn at random, with inputs as the layers will see them.

    Rows count alike, or as `weigh` says of what the codes before lose on them.

    Source: BRECQ (arXiv 2102.05426), block reconstruction; rounding is learned as in AdaRound (arXiv 2004.10568).
    """
    layers = [_Layer(program, table, node, biases) for node in layers_with_codes(program, table, block)]
    problem = _Problem(program, table, block, arrivals, asymmetric)
    if weigh is not None:
        problem.weigh(weigh)
    before = problem.loss()
    movable = max(1.0, sum(float(layer.cells.movable.sum()) for layer in layers))
    relative = movable / before if before > 0 else 0.0
    unit = relative if how.loss == "relative" else problem.energy_over_dimension_1
    adam = torch.optim.Adam(
        [each for layer in layers for each in layer.parameters], lr=how.rate, foreach=False
    )
    order = torch.randint(len(arrivals), (how.iterations,), generator=generator).tolist()
    for iteration, k in enumerate(order if before > 0 else ()):
        with torch.enable_grad():
            adam.zero_grad()
            loss = unit * problem.error(k, {layer.node: layer.constants() for layer in layers})
            if (beta := how.beta(iteration)) is not None:
                for layer in layers:
                    loss = loss + how.settling * layer.unsettled(beta)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        adam.step()
    entries = {site: entry for layer in layers for site, entry in layer.entries().items()}
    return Reconstructed(
        before, _Problem(program, table.put_all(entries), block, arrivals, 0.0, problem).loss(), entries
    )


class _Layer:
    """One layer's codes, and its bias, while they are learned."""

    def __init__(self, program: Program, table: Table, node: fx.Node, biases: bool) -> None:
        self.node, self.at = node, node.meta["address"]
        site = Site(self.at, "weight")
        codes, planned = table.get(site, Codes), table.get(site, Planned)
        assert codes is not None  # the caller looked
        assert planned is not None
        assert planned.spec is not None  # codes are made of what was planned
        self.codes, self._bits = codes, planned.spec.bits
        self._weight = scaled_weight(program, site)
        start = unpack(codes.packed, self._bits, codes.qparams.qmin < 0, codes.shape).flatten(1).double()
        grid = Grid.of(codes.qparams, codes.shape[0])
        self.cells = Cells.of(grid, self._weight, start.to(self._weight.device))
        self._step = grid.scale.to(self._weight)
        self._lower = grid.real(self.cells.lower).to(self._weight)
        self._alpha = self.cells.alpha.to(self._weight).requires_grad_()
        self._moved = torch.zeros_like(self._step).requires_grad_(biases)
        self._bias = deployed_bias(program, table, node, self._step)

    @property
    def parameters(self) -> list[Tensor]:
        """What Adam moves; the bias in steps of its channel's weights."""
        return [self._alpha, self._moved] if self._moved.requires_grad else [self._alpha]

    @property
    def _h(self) -> Tensor:
        h = rectified(self._alpha)
        return torch.where(self.cells.movable, h, self.cells.begin.to(h))

    def constants(self) -> dict[str, Tensor]:
        """The weight and the bias as they are by now."""
        weight = (self._lower + self._h * self._step[:, None]).view(self.codes.shape)
        return {"weight": weight, "bias": self._bias + self._moved * self._step}

    def unsettled(self, beta: float) -> Tensor:
        """The regulariser, summed over the weights that may move."""
        return (unsettled(rectified(self._alpha), beta) * self.cells.movable).sum()

    def entries(self) -> dict[Site, Entry]:
        """What the table gets."""
        params, found = self.codes.qparams, self.cells.settled(self._alpha.detach())
        whole = found.to(torch.int8 if params.qmin < 0 else torch.uint8).view(self.codes.shape)
        adjacent = self.codes.nearest or self.codes.adjacent
        codes = Codes(pack(whole, self._bits), self.codes.shape, params, nearest=False, adjacent=adjacent)
        entries: dict[Site, Entry] = {Site(self.at, "weight"): codes}
        if self._moved.requires_grad:
            entries[Site(self.at, "bias")] = Bias((self._bias + self._moved * self._step).detach())
        return entries


class _Problem:
    """A block's outputs on all rows: what they should be, and what an error in them weighs."""

    def __init__(
        self,
        program: Program,
        table: Table,
        block: Block,
        arrivals: Sequence[Arrival],
        asymmetric: float,
        like: _Problem | None = None,
    ) -> None:
        self._program, self._block, self._arrivals = program, block, arrivals
        self._twins = quantized_twins(program, table, block.inside)
        self._felt, self._axis = _felt(program, table, block)
        self._wanted: list[Tensor]
        self._energy: float
        self._weights: Sequence[Tensor] | None = None
        if like is not None:
            self._wanted, self._energy, self._weights = like._wanted, like._energy, like._weights
            return
        self._wanted = [self._target(arrival, asymmetric) for arrival in arrivals]
        rows = sum(len(arrival.timestep) for arrival in arrivals)
        energies = (
            self._felt_by_row(y, a.timestep).mean() * len(a.timestep)
            for y, a in zip(self._wanted, arrivals, strict=True)
        )
        self._energy = max(sum(float(each) for each in energies) / rows, torch.finfo(torch.float32).tiny)

    @property
    def energy_over_dimension_1(self) -> float:
        """What a loss of 1 is, summed over dimension 1, in the mean over the others: channels of maps, tokens of sequences.

        In units of the output, whatever that feels: a metric is brought to a mean diagonal of 1.
        """
        positions = sum(wanted.numel() // wanted.shape[1] for wanted in self._wanted)
        metric = None if self._felt is None else self._felt.metric
        felt = 1.0 if metric is None else float(metric.diagonal().mean()) or 1.0
        return self._energy * sum(map(len, self._wanted)) / positions / felt

    def weigh(self, by: Weigh) -> None:
        """Let rows weigh what is said of their losses with constants as they are in the table."""
        with torch.no_grad():
            losses = [self._lost(k, {}) for k in range(len(self._arrivals))]
        timesteps = [arrival.timestep for arrival in self._arrivals]
        weights = by(torch.cat(losses), torch.cat(timesteps))
        self._weights = torch.split(weights, [len(each) for each in losses])

    def loss(self) -> float:
        """The mean over all rows, with constants as they are in the table."""
        rows = [len(arrival.timestep) for arrival in self._arrivals]
        with torch.no_grad():
            return sum(float(self.error(k, {})) * count for k, count in enumerate(rows)) / sum(rows)

    def error(self, k: int, learned: dict[fx.Node, dict[str, Tensor]]) -> Tensor:
        """The mean over the rows of one chunk."""
        lost = self._lost(k, learned)
        return (lost if self._weights is None else lost * self._weights[k]).mean() / self._energy

    def _lost(self, k: int, learned: dict[fx.Node, dict[str, Tensor]]) -> Tensor:
        """The error of each row of a chunk, as it is felt [B]."""
        arrival = self._arrivals[k]
        given = {node: pair.quantized for node, pair in arrival.values.items()}
        values = forward(self._program, self._block.inside, given, arrival.timestep, self._twins, learned)
        out = values[self._block.out]
        assert isinstance(out, Tensor)
        return self._felt_by_row(out - self._wanted[k], arrival.timestep)

    def _target(self, arrival: Arrival, asymmetric: float) -> Tensor:
        """The float block's output, on the way from that of the quantized inputs to that of the float ones."""
        target: Tensor | None = None
        for share, quantized in ((1 - asymmetric, True), (asymmetric, False)):
            if share == 0:
                continue
            given = {n: p.quantized if quantized else p.real for n, p in arrival.values.items()}
            out = forward(self._program, self._block.inside, given, arrival.timestep)[self._block.out]
            assert isinstance(out, Tensor)
            target = share * out if target is None else target + share * out
        assert target is not None
        return target

    def _felt_by_row(self, error: Tensor, timestep: Tensor) -> Tensor:
        """The sum of e' metric e over positions, for each row by what the output feels at its timestep [B]."""
        last = error.movedim(self._axis, -1)
        rows = last.reshape(len(last), -1, last.shape[-1])
        felt = self._felt
        seen = rows if felt is None or felt.metric is None else rows @ felt.metric.to(rows)
        each = (seen * rows).sum((1, 2))
        return each if felt is None else each * felt.of(timestep).to(each)


def _felt(program: Program, table: Table, block: Block) -> tuple[Sensitivity | None, int]:
    """What the UNet's output feels of the block's, and the axis of its channels.

    An addition hands its slope on as it is: what is known of a layer that it adds is known of the sum. Of a single
    layer it is what is known of itself.
    """
    axis = 1 if len(block.out.meta["val"].shape) == 4 else -1
    for arm in (*reversed(block.arms), block.out):
        site = Site(arm.meta["address"], "out") if "address" in arm.meta else None
        felt = table.get(site, Sensitivity) if site is not None and ops.name(arm) in CHANNEL_AXIS else None
        if felt is not None:
            return felt, CHANNEL_AXIS[ops.name(arm)]
    return None, axis
