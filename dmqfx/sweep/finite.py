"""Where a value first stops being finite: an operation, or a weight, by address."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dmqfx.errors import CalibrationError
from dmqfx.graph.modules import constant, label
from dmqfx.graph.program import Program
from dmqfx.sweep.values import Pair

__all__ = ["finite", "refuse_broken_weights", "refuse_not_finite"]


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
            raise CalibrationError(
                f"{label(node)}: the {what} network's value is not finite for calibration row {numbers[row]}"
                f" (timestep {float(timestep[row]):g})\n  mend: {_MEND[what]}"
            )


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
