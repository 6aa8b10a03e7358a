"""Probes: inputs and constants on which a wrong rewrite shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.inputs import InputSpec
from dmqfx.graph.modules import clone, constant, propagate
from dmqfx.graph.program import Outputs, Program
from dmqfx.graph.table import Codes, Planned

__all__ = ["ROWS", "at_edges", "draw", "outputs", "sizes", "small", "strong", "unobserved"]

_LARGEST = 16  # latent height of the first probe, where the model is meant for more
_SMALL = 8  # latent height of the probes at the edges of timestep groups, and of labels
ROWS = 32
"""The largest batch of such a probe."""


def sizes(spec: InputSpec) -> tuple[dict[str, int], ...]:
    """Sizes of the probes: a batch of 3, and a batch of 1 that goes beyond the example in height and context.

    Latents are never square, and the second is odd where the model takes odd sizes.

    Example:
        >>> spec = InputSpec("UNet2DModel", (), {"B": 2, "H": 64, "W": 64}, multiple_of=8)
        >>> sizes(spec)
        ({'B': 3, 'H': 16, 'W': 24}, {'B': 1, 'H': 72, 'W': 16})
    """
    step, height = spec.multiple_of, _height(spec, _LARGEST)
    first = {"B": 3, "H": height, "W": height + _round_up(height // 2, step)}
    beyond, below = max(spec.sizes["H"], height) + step, max(height - step, 2 * step)
    beyond += step * (beyond == below)
    if step == 1:  # odd numbers
        beyond, below = beyond + 1 - beyond % 2, below - 1 + below % 2
    second = {"B": 1, "H": _round_up(beyond, step), "W": below}
    if "T" in spec.sizes:
        first["T"], second["T"] = 5, spec.sizes["T"] + 1
    return first, second


def draw(program: Program, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Random inputs in the program's own dtype, one set for each of `sizes`.

    The last set has no residuals, which are then zeros that broadcast.
    """
    found = [_drawn(program, generator, each) for each in sizes(program.inputs)]
    for i in program.inputs.inputs:
        if i.optional:
            found[-1][i.name] = torch.zeros_like(found[-1][i.name])[:1, :1, :1, :1]
    return found


def at_edges(program: Program, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Small random inputs whose timesteps are every edge of the plan's groups and the number just below it.

    So no group is left out, and no edge can move. Groups are mixed inside a batch; empty in the static case.
    """
    edges = {e for p in program.table.of(Planned).values() if p.spec for e in p.spec.boundaries}
    if not edges:
        return []
    opening = torch.tensor(sorted(edges), dtype=program.dtype)
    times = torch.stack([opening, opening.nextafter(torch.full_like(opening, -torch.inf))], 1).flatten()
    return [small(program, generator, "timestep", part) for part in torch.split(times, ROWS)]


def small(program: Program, generator: torch.Generator, name: str, values: Tensor) -> dict[str, Tensor]:
    """Small random inputs, a row for each of the values [N] that one of them has."""
    step, height = program.inputs.multiple_of, _height(program.inputs, _SMALL)
    each = {"B": len(values), "H": height, "W": height + step}
    if "T" in program.inputs.sizes:
        each["T"] = 3
    drawn = _drawn(program, generator, each)
    return {**drawn, name: values.to(drawn[name])}


def _drawn(program: Program, generator: torch.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return program.inputs.draw(generator, dtype=program.dtype, device=str(program.device), **sizes)


def _height(spec: InputSpec, most: int) -> int:
    return _round_up(min(most, spec.sizes["H"]), spec.multiple_of)


def outputs(program: Program, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The outputs of one call, always as a tuple; observers of the program see nothing of it."""
    with torch.no_grad():
        result: Outputs = unobserved(program)(**inputs)
    return result if isinstance(result, tuple) else (result,)


def unobserved(program: Program) -> fx.GraphModule:
    """The program's graph to run; a copy where a run would leave traces in observers."""
    return program.fork().gm if any(n.op == "call_module" for n in program.graph.nodes) else program.gm


def strong(program: Program, generator: torch.Generator) -> Program:
    """The program with random numbers for the weights and biases that are all alike; itself if none are.

    A fresh norm has unit gain and zero bias, a ControlNet ends in zeros: forgetting one would not show.
    """
    rounded = set(program.table.of(Codes))
    weak = {
        str(read.target)
        for node in program.calls()
        for arg in ("weight", "bias")
        if Site(node.meta["address"], arg) not in rounded
        if (read := _unscaled(ops.args(node).get(arg))) is not None
    }
    changed: dict[str, Tensor] = {}
    for name in sorted(weak):
        value = constant(program.gm, name)
        if value.is_floating_point() and value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            changed[name] = value.detach() + noise * (0.3 if value.dim() == 1 else value[0].numel() ** -0.5)
    return _with_constants(program, changed) if changed else program


def _unscaled(value: fx.node.Argument) -> fx.Node | None:
    """The constant that an argument is, or that a scale is multiplied into."""
    while ops.is_call(value, "mul") and isinstance(value, fx.Node):
        value = ops.args(value)["self"]
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _with_constants(program: Program, changed: Mapping[str, Tensor]) -> Program:
    gm = clone(program.gm, {**program.weights(), **changed})
    propagate(gm, program.inputs)
    return replace(program, gm=gm)


def _round_up(size: int, step: int) -> int:
    return -(-max(size, 1) // step) * step
