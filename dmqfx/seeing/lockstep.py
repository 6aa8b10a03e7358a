"""Two programs on the same rows, side by side: how far the layers and outputs of one are from the other's."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from dmqfx.graph.address import Address
from dmqfx.graph.program import Program

__all__ = ["Ratio", "Tally", "compare", "sqnr_db"]


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise); inf where there is no noise at all, nan where anything is not finite.

    Example:
        >>> sqnr_db(100.0, 1.0), sqnr_db(1.0, 0.0)
        (20.0, inf)
    """
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


@dataclass
class Ratio:
    """Energy of a signal and of what is wrong with it, summed as rows go by."""

    signal: float = 0.0
    noise: float = 0.0

    @classmethod
    def of_all(cls, ratios: Iterable[Ratio]) -> Ratio:
        """The sum of several."""
        each = list(ratios)
        return cls(sum(one.signal for one in each), sum(one.noise for one in each))

    def add(self, right: Tensor, approximate: Tensor) -> None:
        """Count two tensors of one shape."""
        exact = right.double()
        self.signal += float(exact.square().sum())
        self.noise += float((exact - approximate.double()).square().sum())

    @property
    def db(self) -> float:
        """The ratio in dB."""
        return sqnr_db(self.signal, self.noise)


@dataclass
class Tally:
    """What was compared so far, by timestep: each layer, and the outputs."""

    layers: dict[Address, dict[float, Ratio]] = field(default_factory=dict)
    outputs: dict[float, Ratio] = field(default_factory=dict)


def compare(
    before: Program, after: Program, batch: Mapping[str, Tensor], layers: Collection[Address], tally: Tally
) -> None:
    """Run both programs on a batch in step, each along its own values, and count layer outputs and results.

    A layer's output is dropped as soon as both programs have made it.
    """
    times = batch["timestep"].reshape(-1).tolist()
    waiting: dict[Address, Tensor] = {}
    left, right = _Steps(before, layers), _Steps(after, layers)
    results = right.run_with(batch)
    for at, exact in left.run_with(batch):
        while at not in waiting:
            other, value = next(results)
            waiting[other] = value
        approximate = waiting.pop(at)
        if exact.shape == approximate.shape and approximate.is_floating_point():
            _count(tally.layers.setdefault(at, {}), times, exact, approximate)
    waiting.update(results)  # the rest of the second program, up to its outputs
    for exact, approximate in zip(left.outputs, right.outputs, strict=True):
        _count(tally.outputs, times, exact, approximate)


def _count(found: dict[float, Ratio], times: Sequence[float], exact: Tensor, approximate: Tensor) -> None:
    """Add each sample at its timestep. Some layers take batch and channels as one, and some no batch at all."""
    rows = len(times) if len(exact) % len(times) == 0 else 1
    for k, time in enumerate(times):
        one, two = (each.reshape(rows, -1)[k % rows] for each in (exact, approximate))
        found.setdefault(time, Ratio()).add(one, two)


class _Steps(fx.Interpreter):
    """Runs a program operation by operation and hands out layers' outputs on the way; keeps what is live."""

    def __init__(self, program: Program, layers: Collection[Address]) -> None:
        super().__init__(program.gm)
        self.program, self.layers = program, frozenset(layers)
        self.outputs: tuple[Tensor, ...] = ()

    def run_with(self, batch: Mapping[str, Tensor]) -> Iterator[tuple[Address, Tensor]]:
        """(address, output) of each wanted layer, in execution order."""
        self.args_iter = iter(self._arguments(batch))
        self.env = {}
        for node in self.program.graph.nodes:
            with torch.no_grad():
                self.env[node] = self.run_node(node)
            at, value = node.meta.get("address"), self.env[node]
            if at in self.layers and isinstance(value, Tensor):
                yield at, value
            if node.op == "output":
                self.outputs = value if isinstance(value, tuple) else (value,)
            for done in self.user_to_last_uses.get(node, ()):
                del self.env[done]
        self.env = {}

    def _arguments(self, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
        device = self.program.device
        for i in self.program.inputs.inputs:
            if i.optional and i.name not in batch:
                yield torch.zeros((1,) * len(i.dims), dtype=i.dtype, device=device)
            else:
                yield batch[i.name].to(device, i.dtype)
