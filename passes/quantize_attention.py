"""quantize-attention: both products of attention in integers, on codes whose scales are found at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dmqfx.errors import PipelineError
from dmqfx.globs import matcher
from dmqfx.graph import ops
from dmqfx.graph.attention import OPERANDS, more_than_plain
from dmqfx.graph.facts import ATTENDED, INTEGER, QDQ, Fact
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.runtime.operators import OPS
from dmqfx.seeing.bits import LAYOUT

EVERYWHERE = "**"
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """attention(q, k, v)  ->  qattention(q, k, v): integer products, and a softmax that becomes codes at once.

    No calibration is needed: each head of keys, row of queries and channel of values has a scale of its own, found
    anew at every call. What a rule of the policy quantizes already keeps its grid.

    Units: bits, 2 to 8, of queries and of the softmax; keys and values have 8. On AVX2 without VNNI 7 bits are faster than
    8. `at` is a glob of addresses; where there are fewer than `keys` at the example sizes, attention stays float: over 64
    keys making codes takes longer than they save, over the 77 of CLIP's prompts about as long, and over more it pays
    (benchmarks/bench_attention.py).
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    provides: ClassVar[frozenset[Fact]] = frozenset({ATTENDED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({ATTENDED, INTEGER})
    preserves: ClassVar[Preserves] = Preserves.LOSSY
    bits: int = 8
    at: str = EVERYWHERE
    keys: int = 77

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if self.keys < 0:
            raise ValueError(f"keys must not be below 0, as {self.keys} is")
        matcher(self.at)

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Another operator at each address that `at` fits.

        Raises: PipelineError if `at` fits no attention.
        """
        fits = matcher(self.at)
        found = list(program.calls("scaled_dot_product_attention"))
        chosen = [each for each in found if any(map(fits, each.meta["address"].names))]
        if not chosen and self.at != EVERYWHERE:
            raise PipelineError(f"quantize-attention: at: {self.at} fits none of {len(found)} attentions")
        rw = Rewriter(program, self.name(), ctx.journal)
        for node in ctx.journal.fuelled(chosen):
            at = node.meta["address"]
            if reason := _unfit(node, self.keys):
                ctx.journal.refuse(at, "quantize", reason)
            elif ctx.journal.apply(at, "quantize", f"{self.bits} bits"):
                old = rw.node(at)
                named = {arg: ops.args(old)[arg] for arg in (*OPERANDS, "scale")}
                with rw.before(old):
                    rw.replace(old, rw.call_at(OPS.qattention.default, at, **named, bits=self.bits))
        return rw.finish()


def _unfit(attention: fx.Node, fewest: int) -> str | None:
    """Why attention cannot be of codes, or None."""
    operands = [ops.tensor(attention, arg) for arg in OPERANDS]
    if quantized := [arg for arg in OPERANDS if _is_quantized(ops.tensor(attention, arg))]:
        return f"the policy quantizes its {' and '.join(quantized)} already"
    if more := more_than_plain(attention):
        return more
    keys = operands[1].meta["val"].shape[2]
    if keys < fewest:
        return f"it has {keys} keys, fewer than the {fewest} that codes are made for (keys: {fewest})"
    dtypes = {node.meta["val"].dtype for node in operands}
    return None if len(dtypes) == 1 and dtypes <= {*REAL} else f"its operands are {sorted(map(str, dtypes))}"


def _is_quantized(value: fx.Node) -> bool:
    """Whether a dequantize made it, behind what only moves numbers."""
    while ops.is_call(value, *LAYOUT):
        value = value.all_input_nodes[0]
    return ops.is_call(value, "dequantize")
