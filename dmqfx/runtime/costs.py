"""What layers cost on this machine, natively and not: `dmqfx bench` measures it, choose-forms and lower-float follow it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.attention import OPERANDS, more_than_plain
from dmqfx.machine import processor
from dmqfx.runtime.kernels.attend import WIDEST
from dmqfx.runtime.kernels.native import library
from dmqfx.storage.atomic import replacing_file
from dmqfx.storage.lock import locked

__all__ = ["Cost", "Costs", "attention_of", "file", "keep", "layer_of", "machine", "size_of"]

logger = logging.getLogger(__name__)

FORMAT = "dmqfx.costs/2"

LEAVE_FLOAT = "leave it float by `keys` or `at` of the step quantize-attention, and compile again"
ATTENTIONS = ("scaled_dot_product_attention", "qattention")


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one call by native kernels, and otherwise.

    A layer is otherwise simulated: quantize, dequantize and float layer in place of quantize and integer layer. Attention
    in float is otherwise torch's, and attention in codes is otherwise in float.

    Example:
        >>> Cost(2.0, 3.0).native_loses, Cost(3.0, 2.0).native_loses
        (False, True)
    """

    native: float
    otherwise: float

    @property
    def native_loses(self) -> bool:
        """By more than clocks are off."""
        return self.otherwise < 0.95 * self.native


@dataclass(frozen=True)
class Costs:
    """The costs of layers, by layer and by the size of their input.

    Example:
        >>> found = {("linear 4x8 w4 a8", "2x77x8"): Cost(1.0, 2.0), ("linear 4x8 w4 a8", "2x1x8"): Cost(2.0, 1.5)}
        >>> costs = Costs(found)
        >>> costs.of("linear 4x8 w4 a8", "2x77x8")
        Cost(native=1.0, otherwise=2.0)
        >>> costs.of("linear 4x8 w4 a8", "4x9x8")  # of a size that was not measured, all that were
        Cost(native=3.0, otherwise=3.5)
        >>> costs.of("conv2d 8x8x3x3 w4 a8", "2x8x4x4") is None
        True
    """

    found: Mapping[tuple[str, str], Cost] = field(default_factory=dict)

    def of(self, layer: str, size: str) -> Cost | None:
        """The cost at a size; if that was not measured the sum over all that were, or None."""
        those = [cost for (name, _), cost in self.found.items() if name == layer]
        known = self.found.get((layer, size))
        if known is not None or not those:
            return known
        return Cost(sum(c.native for c in those), sum(c.otherwise for c in those))

    @staticmethod
    def here() -> Costs:
        """What was measured on this machine with this many threads; of a damaged file nothing, which is logged."""
        try:
            said = json.loads(file().read_text())
            if said["format"] != FORMAT or said["machine"] != machine():
                raise ValueError(f"it is not {FORMAT} of this machine")
            return Costs({(each["layer"], each["input"]): _cost(each) for each in said["layers"]})
        except FileNotFoundError:
            return Costs()
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning(
                "%s is no file of costs (%s); mend: delete it, or run dmqfx bench again", file(), error
            )
            return Costs()


def keep(found: Mapping[tuple[str, str], Cost]) -> Path:
    """Add what was measured to the file of this machine, in place of what was measured before; returns where it is.

    Raises: StoreError where another process writes at this moment.
    """
    target = file()
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent):
        rows = [
            {"layer": layer, "input": size, "native": cost.native, "otherwise": cost.otherwise}
            for (layer, size), cost in sorted({**Costs.here().found, **found}.items())
        ]
        said = {"format": FORMAT, "machine": machine(), "layers": rows}
        with replacing_file(target) as half:
            half.write_text(json.dumps(said, indent=1) + "\n")
    return target


def _cost(row: Mapping[str, object]) -> Cost:
    native, otherwise = float(str(row["native"])), float(str(row["otherwise"]))
    if not (0 < native < math.inf and 0 < otherwise < math.inf):
        raise ValueError(f"{row['layer']} costs {native:g} and {otherwise:g} ms")
    return Cost(native, otherwise)


def machine() -> dict[str, str | int]:
    """What costs depend on beside the layer."""
    from dmqfx import __version__

    native = library()
    return {
        "processor": processor(),
        "instruction set": native.chosen if native is not None else "none",
        "kernels": _digest(native.file) if native is not None else "none",
        "torch's instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "dmqfx": str(__version__),
    }


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def file() -> Path:
    """Where the costs of this machine are: in $DMQFX_CACHE, $XDG_CACHE_HOME/dmqfx or ~/.cache/dmqfx."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("DMQFX_CACHE") or Path(home) / "dmqfx")
    name = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"costs-{name}.json"


def layer_of(layer: fx.Node) -> str | None:
    """What the cost of a layer between quantize and dequantize depends on beside its input's size; None for any other.

    So it reads for a convolution: `conv2d 320x320x3x3 w4 a8 stride 1x1 padding 1x1 dilation 1x1 groups 1`.
    """
    if not ops.is_call(layer, "conv2d", "linear"):
        return None
    real = ops.tensor(layer, "input")
    codes, unpacked = _codes(real), _codes(ops.tensor(layer, "weight"))
    if (
        codes is None
        or unpacked is None
        or not ops.is_call(codes, "quantize")
        or not ops.is_call(unpacked, "unpack")
    ):
        return None
    of_weight, of_input = ops.args(unpacked), ops.args(codes)
    bits = (int(str(of_input["qmax"])) - int(str(of_input["qmin"]))).bit_length()
    words = [ops.name(layer), _by(of_weight["shape"]), f"w{of_weight['bits']}", f"a{bits}"]
    words += ["signed"] * (int(str(of_input["qmin"])) < 0)
    words += [dtype for dtype in (_dtype(real),) if dtype != "float32"]
    words += ["shifted"] * (ops.args(real)["shift"] is not None)
    if ops.is_call(layer, "conv2d"):
        named = ops.args(layer)
        words += [f"{name} {_by(named[name])}" for name in ("stride", "padding", "dilation", "groups")]
    return " ".join(words)


def attention_of(node: fx.Node) -> str | None:
    """What the cost of attention of float32 depends on beside its sizes, as `attention 8x40`: 8 heads of 40 channels.

    In codes of 7 bits it is `attention 8x40 a7`. None for what has no kernel.
    """
    coded = ops.is_call(node, "qattention")
    if not coded and (
        not ops.is_call(node, "scaled_dot_product_attention") or more_than_plain(node) is not None
    ):
        return None
    operands = [ops.tensor(node, arg).meta["val"] for arg in OPERANDS]
    if {each.dtype for each in operands} != {torch.float32} or operands[0].shape[3] > WIDEST:
        return None
    name = f"attention {operands[0].shape[1]}x{operands[0].shape[3]}"
    return f"{name} a{ops.args(node)['bits']}" if coded else name


def size_of(node: fx.Node) -> str:
    """The size of a layer's input at the program's example sizes; of attention that of its queries, and how many keys."""
    if not ops.is_call(node, *ATTENTIONS):
        return _by(ops.tensor(node, "input").meta["val"].shape)
    query, key = (ops.tensor(node, arg).meta["val"].shape for arg in ("query", "key"))
    return f"{_by(query)} to {key[2]} keys"


def _dtype(node: fx.Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _codes(real: fx.Node) -> fx.Node | None:
    """What a dequantize reads, or None."""
    return ops.tensor(real, "codes") if ops.is_call(real, "dequantize") else None


def _by(sizes: object) -> str:
    return (
        "x".join(map(str, sizes))
        if isinstance(sizes, Iterable) and not isinstance(sizes, str)
        else str(sizes)
    )
