"""reconstruct-blocks: the codes of residual blocks, learned together, and of layers between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from dmqfx.graph.address import Site
from dmqfx.graph.blocks import Block, single, units
from dmqfx.graph.facts import CORRECTED, QDQ, ROUNDED, Fact
from dmqfx.graph.modules import label
from dmqfx.graph.options import above, at_least, between
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry, Table
from dmqfx.numbers.adaround import Annealing, Loss
from dmqfx.numbers.weighting import UNEVEN, TimestepWeights, Weighting
from dmqfx.runtime.operators import timestep_group
from dmqfx.sweep.blocksweep import learn_blocks
from dmqfx.sweep.blockwalk import Arrival
from dmqfx.sweep.reconstruct import Reconstructed, Weigh, layers_with_codes, reconstructed


@dataclass(frozen=True)
class ReconstructBlocks(Pass):
    """Let the weights of each residual block move to the other code beside them, for the block's output's sake.

    Residual blocks of one module in a row are one: the attentions and the feed-forward layer of a transformer block.
    With `where` all, layers in no block learn too, each by itself, when the network comes to it.
    A code is the one that round-weights chose, or its neighbour on the side of the weight. What comes into a block is
    the network as quantized so far, what should come out the float block's output: of the same inputs, or with
    `asymmetric` 1 of the float ones. Where measure-sensitivity has run, an error counts by what the UNet's output
    feels of it. `weighting` is what rows weigh by their timestep group besides, with `adaptive` by the error that the
    codes before make there, see TimestepWeights. A block whose loss on all rows is no less keeps its codes.

    Units: `rows` of calibration, timesteps in equal shares; `batch` of them at a time; `iterations`, `rate`,
    `warmup`, the `beta`s, `settling` and `loss` are those of Annealing, a relative loss counting as 1 per weight at
    the start, an absolute one in sequences as published: summed over tokens, in the mean over channels. `groups` are
    parts of equal width of the training timesteps, for the weighting, whose exponent is `strength`.
    Source: BRECQ (arXiv 2102.05426).
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({ROUNDED})
    provides: ClassVar[frozenset[Fact]] = frozenset({ROUNDED})
    clears: ClassVar[frozenset[Fact]] = frozenset({CORRECTED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.BITWISE
    only_with: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]] = dict.fromkeys(
        ("strength", "groups"), ("weighting", UNEVEN)
    )
    where: Literal["blocks", "all"] = "blocks"
    rows: int = 64
    batch: int = 8
    iterations: int = 150
    rate: float = 0.03
    warmup: float = Annealing.warmup
    beta_start: float = Annealing.beta_start
    beta_end: float = Annealing.beta_end
    settling: float = Annealing.settling
    loss: Loss = Annealing.loss
    asymmetric: float = 0.0
    biases: bool = True
    weighting: Weighting = "uniform"
    strength: float = 20.0
    groups: int = 20

    def __post_init__(self) -> None:
        at_least(self, 1, "rows", "batch", "iterations", "groups")
        at_least(self, 0, "settling", "strength")
        above(self, 0, "rate")
        above(self, 1, "beta_start", "beta_end")
        between(self, 0, 1, "asymmetric", "warmup")

    @property
    def needs_calibration(self) -> bool:
        """Always."""
        return True

    @property
    def budgeted(self) -> frozenset[str]:
        """The fields that a time budget multiplies."""
        return frozenset({"rows", "iterations"})

    def run(self, program: Program, ctx: PassContext) -> Program:
        """One walk over the rows, and in every block as many steps as there are iterations.

        Raises: CalibrationError without calibration data, for rows that do not fit, or values that are not
            finite; StoreError for a run directory or a disk.
        """
        return learn_blocks(program, self._wanted(program, ctx), self, ctx)

    def _wanted(self, program: Program, ctx: PassContext) -> list[Block]:
        """The blocks to learn, in execution order; the others are refused with the reason."""
        found, wanted = units(program), dict[fx.Node, Block]()
        for block in found:
            if (outside := block.read_outside) is not None:
                ctx.journal.refuse(block.at, "block", f"{label(outside)} is also read outside")
            elif not layers_with_codes(program, program.table, block):
                ctx.journal.refuse(block.at, "block", "no layer of the block has codes")
            else:
                wanted[block.out] = block
        learned = {node for block in wanted.values() for node in block.inside}
        inside = {node for block in found for node in block.inside}
        for node in program.calls("conv2d", "linear"):
            if node in learned or (node in inside and self.where == "blocks"):
                continue
            if not layers_with_codes(program, program.table, alone := single(node)):
                ctx.journal.refuse(alone.at, "layer", "it has no codes")
            elif self.where == "all":
                wanted[node] = alone
            else:
                ctx.journal.refuse(alone.at, "layer", "it is in no residual block; where: all learns it too")
        return [wanted[node] for node in program.graph.nodes if node in wanted]

    def learn(
        self,
        program: Program,
        table: Table,
        block: Block,
        arrivals: Sequence[Arrival],
        ctx: PassContext,
    ) -> tuple[dict[Site, Entry], float | None]:
        """The codes and biases of one block, where they are better than what it has, and the loss that is left."""
        if ctx.journal.exhausted:
            return {}, None
        how = Annealing(
            self.iterations, self.warmup, self.beta_start, self.beta_end, self.settling, self.rate, self.loss
        )
        kind, seeded = "block" if block.arms else "layer", torch.Generator().manual_seed(ctx.seed)
        found = reconstructed(
            program,
            table,
            block,
            arrivals,
            how,
            asymmetric=self.asymmetric,
            biases=self.biases,
            generator=seeded,
            weigh=None if self.weighting == "uniform" else self._weigh(ctx),
        )
        if not better(found):
            told = (
                f"learning ends at {found.after / found.before:.2g} of the loss"
                if found.before
                else "no loss"
            )
            ctx.journal.refuse(block.at, kind, f"{told}; the codes are kept")
            return {}, found.before
        ctx.journal.apply(block.at, kind, f"{found.after / found.before:.2g} of the loss of the codes before")
        return found.entries, found.after

    def _weigh(self, ctx: PassContext) -> Weigh:
        edges = torch.tensor([ctx.train_timesteps * k / self.groups for k in range(1, self.groups)])

        def weigh(losses: Tensor, timestep: Tensor) -> Tensor:
            group = timestep_group(timestep, edges.to(timestep.device))
            return TimestepWeights(self.weighting, self.groups, self.strength)(losses, group)

        return weigh


def better(found: Reconstructed) -> bool:
    """Whether learning ended with less loss than it began with."""
    return found.after < found.before
