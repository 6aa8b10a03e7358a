"""Where a value first stops being finite: an operation, or a weight, by address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dmqfx.errors import CalibrationError
from dmqfx.graph.modules import constant, label
from dmqfx.graph.program import Program
from dmqfx.sweep.values import Pair

if TYPE_CHECKING:
    from dmqfx.calibration.calibration import Calibration

__all__ = ["finite", "refuse_broken_weights", "refuse_not_finite", "refuse_overflow", "refuse_overflow_of"]


def refuse_broken_weights(program: Program) -> None:
    """Raise if a weight of the program is not finite.

    Raises: CalibrationError naming the weight, the first operation that reads it, and the place in it.
    """
    for node in program.graph.nodes:
        if node.op != "get_attr" or finite(weight := constant(program.gm, str(node.target))):
            continue
        place = (~torch.isfinite(weight)).nonzero()[0].tolist()
        reader = next((label(user) for user in node.users), "nothing")
        raise CalibrationError(
            f"{node.target}, read by {reader}, holds {weight[tuple(place)].item()} at {place}\n"
            "  mend: load the model again; its file or a conversion of it is damaged"
        )


def refuse_not_finite(node: fx.Node, pair: Pair, timestep: Tensor, numbers: Sequence[int]) -> None:
    """Raise if an operation's value is not finite; the rows of the chunk have these numbers.

    Shapes: timestep [B].
    Raises: CalibrationError naming the operation, the network (float or quantized) and the row.
    """
    for value, what in ((pair.real, "float"), (pair.quantized, "quantized")):
        for tensor in tree_leaves(value):
            if not isinstance(tensor, Tensor) or finite(tensor):
                continue
            row = _row(tensor, len(timestep))
            raise _error(node, what, f"row {numbers[row]} (timestep {float(timestep[row]):g})")


def refuse_overflow(program: Program, data: Calibration) -> None:
    """Raise for the first operation of a float program whose value is not finite, trying the rows one by one.

    For where something was seen that is not finite; if every row's values are, nothing happens.

    Raises: CalibrationError naming the operation and the row.
    """
    places = zip(data.trajectories().tolist(), data.steps().tolist(), data.timesteps().tolist(), strict=True)
    batches = data.batches(1, program.inputs, dtype=program.dtype)
    for (trajectory, step, time), batch in zip(places, batches, strict=True):
        refuse_overflow_of(program, batch, f"row of trajectory {trajectory}, step {step} (timestep {time:g})")


def refuse_overflow_of(program: Program, batch: Mapping[str, Tensor], where: str) -> None:
    """The same of one batch, which is called so.

    Raises: CalibrationError naming the operation, or the weight that is not finite itself.
    """
    refuse_broken_weights(program)
    _Watched(program, where).run(*(batch[i.name].to(program.device) for i in program.inputs.inputs))


class _Watched(fx.Interpreter):
    """Runs a graph as far as its values are finite."""

    def __init__(self, program: Program, where: str) -> None:
        super().__init__(program.gm)
        self.where = where
        self.extra_traceback = False  # the error says where it is

    def run_node(self, n: fx.Node) -> object:
        with torch.no_grad():
            value = super().run_node(n)
        if not finite(value):
            raise _error(n, "float", self.where)
        return value


def _error(node: fx.Node, what: str, where: str) -> CalibrationError:
    said = f"{label(node)}: the {what} network's value is not finite for calibration {where}"
    return CalibrationError(f"{said}\n  mend: {_MEND[what]}")


_MEND = {
    "float": "the model itself overflows there; look at its weights, or leave the row out",
    "quantized": "keep this operation float in the policy, or give it more bits",
}


def finite(value: object) -> bool:
    """Whether all numbers of a value are finite; a sum tells in one pass, unless it overflows itself."""
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return all(bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all()) for x in tensors)


def _row(x: Tensor, rows: int) -> int:
    """The first row with a number that is not finite; 0 for what has no rows."""
    if x.dim() == 0 or x.shape[0] != rows:
        return 0
    return int((~torch.isfinite(x)).reshape(rows, -1).any(1).nonzero()[0])
