"""Times each layer of a program in its native and its simulated form, on random numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx
from tqdm import tqdm

from dmqfx.graph import ops
from dmqfx.graph.modules import clone, constant_of, is_fixed, propagate
from dmqfx.graph.program import Program
from dmqfx.runtime.costs import Cost, layer_of, size_of
from dmqfx.runtime.operators import OPS
from dmqfx.runtime.targets import Target, lower

__all__ = ["Layer", "layers", "resized", "timed"]

Run = Callable[[], object]
NATIVE = Target("native", ("lower-reference", "lower-cpu"), "integer layers alone")
FEWEST = 3


class Layer:
    """A kind of layer at one size, and its two forms, ready to run on the same random numbers.

    Units: `addresses` has every layer of the kind; `name` and `size` are those of costs.layer_of and size_of.
    """

    def __init__(self, program: Program, native: Program, nodes: list[fx.Node]) -> None:
        first = nodes[0]
        self.name, self.size = str(layer_of(first)), size_of(first)
        self.addresses = [node.meta["address"] for node in nodes]
        self._weights = program.weights()
        self.simulated = self._simulation(first)
        self.native = self._kernel(native, native.node(first.meta["address"]))

    def _simulation(self, layer: fx.Node) -> Run:
        real = ops.tensor(layer, "input")
        codes = ops.tensor(real, "codes")
        x, values = ops.tensor(codes, "x"), self._values(codes, real, layer)
        values[x] = _like(x)
        steps = (codes, real, layer)

        def run() -> object:
            made: dict[fx.Node, object] = dict(values)
            for node in steps:
                made[node] = _call(node, made)
            return made[layer]

        return run

    def _kernel(self, program: Program, layer: fx.Node) -> Run:
        self._weights = program.weights()
        codes = ops.tensor(layer, "x_codes")
        x, values = ops.tensor(codes, "x"), self._values(codes, layer)
        values[x] = _like(x)
        how = {
            arg: values.get(read, read) if isinstance(read, fx.Node) else read
            for arg, read in ops.args(codes).items()
        }
        conv = ops.is_call(layer, "kernel_conv2d")
        how["axis"] = 1 if conv else x.meta["val"].dim() - 1  # as fuse has it
        last = {"channels_last": True} if conv else {}

        def run() -> object:
            made: dict[fx.Node, object] = {**values, codes: OPS.kernel_quantize(**how)}
            return _call(layer, made, **last)

        return run

    def _values(self, *nodes: fx.Node) -> dict[fx.Node, object]:
        """Constants that operations read, and the first timestep group for every sample."""
        found: dict[fx.Node, object] = {}
        for node in nodes:
            for read in node.all_input_nodes:
                if read not in nodes and is_fixed(read):
                    found[read] = constant_of(read, self._weights.__getitem__)
                elif ops.args(node).get("group") is read:
                    found[read] = torch.zeros(read.meta["val"].shape, dtype=torch.int64)
        return found

    def measure(self, seconds: float) -> Cost:
        """The least time of each form, by turns, over about so many seconds for both."""
        best = [float("inf"), float("inf")]
        started, rounds = time.perf_counter(), 0
        with torch.no_grad():
            while rounds <= FEWEST or time.perf_counter() - started < seconds:
                for k, run in enumerate((self.native, self.simulated)):
                    before = time.perf_counter()
                    run()
                    spent = time.perf_counter() - before
                    best[k] = min(best[k], spent if rounds else float("inf"))  # the first call warms up
                rounds += 1
        return Cost(*(1e3 * each for each in best))


def layers(program: Program) -> list[Layer]:
    """The kinds of layers between quantize and dequantize that have a native form, at the program's example sizes."""
    native, kinds = lower(program, NATIVE), dict[tuple[str, str], list[fx.Node]]()
    for node in program.calls("conv2d", "linear"):
        name = layer_of(node)
        if name is not None and ops.is_call(
            native.node(node.meta["address"]), "kernel_conv2d", "kernel_linear"
        ):
            kinds.setdefault((name, size_of(node)), []).append(node)
    return [Layer(program, native, nodes) for nodes in kinds.values()]


def timed(found: list[Layer], seconds: float, *, bars: bool) -> Mapping[tuple[str, str], Cost]:
    """The cost of each kind, about so many seconds for each, perhaps behind a progress bar."""
    shown = tqdm(found, desc="layers", unit="kind", disable=not bars, leave=False)
    return {(each.name, each.size): each.measure(seconds) for each in shown}


def resized(program: Program, **sizes: int) -> Program:
    """The program at other example sizes: batch B, height H, width W, length of the context T."""
    inputs = replace(program.inputs, sizes={**program.inputs.sizes, **sizes})
    gm = clone(program.gm)
    propagate(gm, inputs)
    return replace(program, gm=gm, inputs=inputs)


def _like(node: fx.Node) -> Tensor:
    """Random numbers of a value's size, channels last as layers make them."""
    shape = node.meta["val"].shape
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made


def _call(node: fx.Node, values: Mapping[fx.Node, object], **more: object) -> object:
    given = {arg: values[read] if isinstance(read, fx.Node) else read for arg, read in ops.args(node).items()}
    return node.target(**{**given, **more})  # type: ignore[operator]  # a call, as programs have them
