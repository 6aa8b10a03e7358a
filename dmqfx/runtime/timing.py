"""Times each layer and each attention of a program by native kernels and otherwise, on random numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from dmqfx.errors import DmqfxError
from dmqfx.graph import ops
from dmqfx.graph.address import Address
from dmqfx.graph.attention import OPERANDS
from dmqfx.graph.modules import clone, constant_of, is_fixed, propagate
from dmqfx.graph.program import Program
from dmqfx.runtime.costs import ATTENTIONS, Cost, attention_of, layer_of, size_of
from dmqfx.runtime.kernels.native import absent
from dmqfx.runtime.operators import OPS
from dmqfx.runtime.targets import Target, lower

__all__ = ["Kind", "kinds", "measured", "resized"]

Run = Callable[[], object]
NATIVE = Target("native", ("lower-reference", "lower-cpu"), "integer layers alone")
FEWEST = 3
SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True, eq=False)
class Kind:
    """Layers that are alike at one size of their input; `name` and `size` are those of costs.layer_of and size_of."""

    name: str
    size: str
    nodes: Sequence[fx.Node]
    program: Program
    native: Program

    @property
    def addresses(self) -> list[Address]:
        """Where such layers stand."""
        return [node.meta["address"] for node in self.nodes]

    @property
    def otherwise(self) -> str:
        """What it is without native kernels: a layer simulated, attention torch's, attention in codes float."""
        first = self.nodes[0]
        return "float" if self.is_coded else "torch" if ops.is_call(first, *ATTENTIONS) else "simulated"

    @property
    def is_coded(self) -> bool:
        """Whether it is attention in codes."""
        return ops.is_call(self.nodes[0], "qattention")

    def forms(self) -> tuple[Run, ...]:
        """The first of them, natively and otherwise, on the same random numbers: of a layer with its quantize.

        Attention in codes is otherwise in float, by the kernel or by torch.
        """
        layer = self.nodes[0]
        if ops.is_call(layer, *ATTENTIONS):
            return self._of_attention(layer)
        real = ops.tensor(layer, "input")
        codes = ops.tensor(real, "codes")
        kernel = self.native.node(layer.meta["address"])
        return self._natively(kernel), self._of(self.program, (codes, real, layer))

    def _natively(self, layer: fx.Node) -> Run:
        """quantize by the kernels, as fuse has it, and the layer."""
        codes, conv = ops.tensor(layer, "x_codes"), ops.is_call(layer, "kernel_conv2d")
        values = _values(self.native, (codes, layer))
        read = {arg: values[x] if isinstance(x, fx.Node) else x for arg, x in ops.args(codes).items()}
        axis = 1 if conv else ops.tensor(codes, "x").meta["val"].dim() - 1
        more = {"channels_last": True} if conv else {}

        def run() -> object:
            made: object = OPS.kernel_quantize(**{**read, "axis": axis})
            return _call(layer, {**values, codes: made}, **more)

        return run

    def _of_attention(self, layer: fx.Node) -> tuple[Run, ...]:
        """Attention whose heads lie beside each other in memory."""
        drawn = _values(self.program, (layer,))
        values = {x: drawn[x].transpose(1, 2).contiguous().transpose(1, 2) for x in layer.all_input_nodes}
        operands: dict[str, Any] = {arg: values[ops.tensor(layer, arg)] for arg in OPERANDS}
        operands["scale"] = ops.args(layer)["scale"]
        in_float = [partial(call, **operands) for call in (OPS.kernel_sdpa.default, SDPA)]
        if not self.is_coded:
            return tuple(in_float)
        return partial(OPS.kernel_attention.default, **operands, bits=ops.args(layer)["bits"]), *in_float

    def _of(self, program: Program, nodes: Sequence[fx.Node]) -> Run:
        """Operations one after the other; the last one's result."""
        values = _values(program, nodes)

        def run() -> object:
            made: dict[fx.Node, object] = {**values}
            for node in nodes:
                made[node] = _call(node, made)
            return made[nodes[-1]]

        return run

    def measure(self, seconds: float) -> Cost:
        """The least time of each form, by turns, over about so many seconds for all."""
        forms = self.forms()
        best, started, rounds = [float("inf")] * len(forms), time.perf_counter(), 0
        with torch.no_grad():
            while rounds <= FEWEST or time.perf_counter() - started < seconds:
                for k, run in enumerate(forms):
                    before = time.perf_counter()
                    run()
                    spent = time.perf_counter() - before
                    best[k] = min(best[k], spent) if rounds else best[k]  # the first call warms up
                rounds += 1
        return Cost(1e3 * best[0], 1e3 * min(best[1:]))


def kinds(program: Program) -> list[Kind]:
    """The kinds of layers between quantize and dequantize, and of attention in float or codes, that have a native form.

    They are those at the program's example sizes.

    Raises: DmqfxError where there are no native kernels, or the program is not on the CPU.
    """
    if why := absent():
        raise DmqfxError(why)
    if program.device.type != "cpu":
        raise DmqfxError(f"the program is on {program.device}, kernels are of the CPU; move it there")
    native, found = lower(program, NATIVE), dict[tuple[str, str], list[fx.Node]]()
    for node in program.calls("conv2d", "linear"):
        name = layer_of(node)
        if name is not None and ops.is_call(
            native.node(node.meta["address"]), "kernel_conv2d", "kernel_linear"
        ):
            found.setdefault((name, size_of(node)), []).append(node)
    for node in program.calls(*ATTENTIONS):
        if (name := attention_of(node)) is not None:
            found.setdefault((name, size_of(node)), []).append(node)
    return [Kind(*key, nodes, program, native) for key, nodes in found.items()]


def measured(found: Sequence[Kind], seconds: float, *, bars: bool) -> Mapping[tuple[str, str], Cost]:
    """The cost of each kind, about so many seconds for each, perhaps behind a progress bar."""
    shown = tqdm(found, desc="layers", unit="kind", disable=not bars, leave=False)
    return {(each.name, each.size): each.measure(seconds) for each in shown}


def resized(program: Program, **sizes: int) -> Program:
    """The program at other example sizes: batch B, height H, width W, length of the context T.

    Raises: DmqfxError for sizes that it does not take.
    """
    multiple = program.inputs.multiple_of
    for name, size in sizes.items():
        if name in "HW" and size % multiple:
            raise DmqfxError(f"the model does not take {name} = {size}: it must be a multiple of {multiple}")
    inputs = replace(program.inputs, sizes={**program.inputs.sizes, **sizes})
    gm = clone(program.gm)
    propagate(gm, inputs)
    return replace(program, gm=gm, inputs=inputs)


def _values(program: Program, nodes: Sequence[fx.Node]) -> dict[fx.Node, Tensor]:
    """What operations read from elsewhere: constants, the first timestep group for every sample, and random numbers."""
    found: dict[fx.Node, Tensor] = {}
    weights = program.weights()
    for read in {read for node in nodes for read in node.all_input_nodes} - set(nodes):
        if is_fixed(read):
            found[read] = constant_of(read, weights.__getitem__)
        elif read.meta["val"].is_floating_point():
            found[read] = _random(read.meta["val"])
        else:
            found[read] = torch.zeros(read.meta["val"].shape, dtype=read.meta["val"].dtype)
    return found


def _random(like: Tensor) -> Tensor:
    """Numbers of a size and dtype, channels last as layers make them."""
    made = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like.dtype)
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made


def _call(node: fx.Node, values: Mapping[fx.Node, object], **more: object) -> object:
    given = {arg: values[read] if isinstance(read, fx.Node) else read for arg, read in ops.args(node).items()}
    return node.target(**{**given, **more})  # type: ignore[operator]  # a call, as programs have them
