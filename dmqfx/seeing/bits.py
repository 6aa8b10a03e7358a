"""Bits asked for and bits got: what the plan says of a site, and what the graph does with it now."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.address import Address, Site
from dmqfx.graph.facts import INTEGER, QDQ
from dmqfx.graph.modules import constant, label
from dmqfx.graph.program import Program
from dmqfx.graph.table import Codes, Planned, Shift, SkipArm
from dmqfx.numbers.packing import unpack
from dmqfx.numbers.quant import QuantSpec, dequantize
from dmqfx.policy.policy import KIND_OF_OPERATOR, OPERANDS
from dmqfx.seeing import wording

__all__ = ["SiteBits", "is_quantized", "layers", "site_bits", "sites"]

RUN_TIME = ("qattention", "kernel_attention")
"""Operators that make codes of their operands themselves."""
BY_STEP = "step quantize-attention"
KEY_BITS = 8
_ARGUMENTS = frozenset(arg for operands in OPERANDS.values() for arg in operands)
LAYOUT = ("view", "reshape", "transpose", "permute", "contiguous", "clone", "expand", "flatten", "unflatten")
"""Operators between a dequantize and its reader that only move numbers."""


@dataclass(frozen=True)
class SiteBits:
    """What one site was asked to have and what it has.

    `asked` is None for float and `rule` the deciding one ("" where there is no plan); `got` is None for float
    and `how` says what stands in the graph; `refused` holds "pass: reason" where that is not what was asked;
    `notes` say what else a reader of bits should know: the arm of a skip that it is, the shifts that it has.
    Where codes are made anew at every call, `run_time` has the bits that a step asked for, which the plan does not know.
    """

    site: Site
    asked: QuantSpec | None
    rule: str
    got: int | None
    how: str
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    run_time: int | None = None

    @property
    def asked_bits(self) -> int | None:
        """The bits that were asked for, None for float."""
        return self.run_time or (self.asked.bits if self.asked else None)

    @property
    def as_asked(self) -> bool:
        """Whether the graph does what the plan says, and the plan what the policy said."""
        return self.asked_bits == self.got and not self.refused


def layers(program: Program) -> dict[Address, fx.Node]:
    """The operations that have sites. Lowered ones keep the address of the layer that they replace; what `fuse` made of a
    layer and an addition or a quantize stands at that one's.
    """
    nodes = {node.meta["address"]: node for node in program.calls()}
    return {at: node for at, node in nodes.items() if at.op in KIND_OF_OPERATOR}


def sites(at: Address) -> tuple[Site, ...]:
    """The sites of a layer: input and weight, or query, key and value; none for what is no layer."""
    return tuple(Site(at, arg) for arg in OPERANDS.get(at.op, ()))


def is_quantized(program: Program) -> bool:
    """Whether the graph quantizes: before that, bits are a plan."""
    return not program.facts.isdisjoint({QDQ, INTEGER})


def site_bits(program: Program, site: Site) -> SiteBits:
    """Asked and got of one site.

    Raises: KeyError if there is no such operation.
    """
    if ops.is_call(node := program.node(site.at), *RUN_TIME):
        bits = _integer(ops.args(node)["bits"]) if site.arg == "query" else KEY_BITS
        wanted = _asked_by_step(program, site) or bits
        return SiteBits(site, None, BY_STEP, bits, "dynamic codes, made at every call", run_time=wanted)
    planned = program.table.get(site, Planned)
    asked = planned.spec if planned is not None else None
    got, how = _got(program, site)
    own, others = _refusals(program, site)
    differs = planned is not None and (asked.bits if asked else None) != got
    refused = own or (others if differs else ())
    return SiteBits(site, asked, planned.rule if planned else "", got, how, refused, _notes(program, site))


def _asked_by_step(program: Program, site: Site) -> int | None:
    """The bits that the step has in its record, if that is at hand."""
    records = (
        done for record in program.log if record.name == "quantize-attention" for done in record.applied
    )
    words = next((done.what for done in records if done.at == site.at), "")
    return None if not words else int(words.split()[0]) if site.arg == "query" else KEY_BITS


def _notes(program: Program, site: Site) -> tuple[str, ...]:
    known = (program.table.get(site, SkipArm), program.table.get(site, Shift))
    return tuple(wording.entry(entry) for entry in known if entry is not None)


def _refusals(program: Program, site: Site) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Refusals of this site alone (their rule ends in its name), and those of its operation as a whole."""
    here = [(done.name, each) for done in program.log for each in done.refused if each.at == site.at]
    words = [(each.rule.rpartition(" ")[2], f"{name}: {each.reason}") for name, each in here]
    own = tuple(reason for arg, reason in words if arg == site.arg)
    return own, tuple(reason for arg, reason in words if arg not in _ARGUMENTS)


def _got(program: Program, site: Site) -> tuple[int | None, str]:
    """The bits of a site in the graph as it stands, and how it comes by them."""
    named = ops.args(program.node(site.at))
    if site.arg == "weight" and "packed_weight" in named:
        return _integer(named["bits"]), f"packed codes, read by {ops.name(program.node(site.at))}"
    codes = named.get("x_codes") if site.arg == "input" else None
    for node in _upwards(codes if codes is not None else named.get(site.arg)):
        if ops.is_call(node, "quantize", "kernel_quantize"):
            low, high = (_integer(ops.args(node)[key]) for key in ("qmin", "qmax"))
            return wording.bit_count(low, high), f"quantized by {label(node)}"
        if ops.is_call(node, "kernel_conv2d", "kernel_linear") and ops.args(node)["out_scale"] is not None:
            low, high = (_integer(ops.args(node)[key]) for key in ("out_qmin", "out_qmax"))
            return wording.bit_count(low, high), f"quantized by {label(node)}"
        if ops.is_call(node, "unpack"):
            return _integer(ops.args(node)["bits"]), f"unpacked by {label(node)}"
        if node.op == "get_attr" and _on_grid(program, site, node):
            return _integer(_bits(program, site)), f"float numbers of the codes, {label(node)}"
    return None, "float"


def _upwards(value: object) -> Iterator[fx.Node]:
    """What a value is made of: back through dequantize and layout operators, to the first that computes."""
    while isinstance(value, fx.Node):
        yield value
        if ops.is_call(value, "dequantize"):
            value = ops.args(value)["codes"]
        elif ops.is_call(value, *LAYOUT):
            value = value.all_input_nodes[0]
        else:
            return


def _bits(program: Program, site: Site) -> int:
    codes = program.table.get(site, Codes)
    return wording.bit_count(codes.qparams.qmin, codes.qparams.qmax) if codes is not None else 0


def _on_grid(program: Program, site: Site, node: fx.Node) -> bool:
    """Whether a float constant holds what the site's codes mean (looked at in its first row)."""
    codes = program.table.get(site, Codes)
    value = constant(program.gm, str(node.target))
    if codes is None or tuple(value.shape) != codes.shape or value.is_meta:
        return False
    row, bits = (1, *codes.shape[1:]), _bits(program, site)
    packed = codes.packed[: math.ceil(math.prod(row) * (4 if bits <= 4 else 8) / 8)]
    params = codes.qparams
    numbers = unpack(packed, bits, params.qmin < 0, row)
    real = dequantize(numbers, params.scale[:, :1], params.zero_point[:, :1])
    return torch.equal(real.to(value), value[:1])


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is not a number of bits")
    return value
