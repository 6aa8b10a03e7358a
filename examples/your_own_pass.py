"""A pass of your own, verified, in a pipeline run by hand (docs/writing-a-pass.md has the way to a policy).

python examples/your_own_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tiny_pipeline import tiny_pipeline

import dmqfx
from dmqfx import PassContext, Pipeline, Policy, Preserves, RewritePass, p, rule
from dmqfx.graph.registry import create


@rule(p.gelu(self=p.any("x"), approximate=p.value("none")))
def approximate(rw, root, x):
    """gelu(x)  ->  its approximation by tanh."""
    return rw.like(root, approximate="tanh")


@dataclass(frozen=True)
class ApproximateGelu(RewritePass):
    """GELU as most integer hardware has it: not the same function, so the pass is lossy, and says so."""

    preserves, rules = Preserves.LOSSY, (approximate,)


unet = tiny_pipeline().unet
context = PassContext(policy=Policy.load("w8a16"))
program = Pipeline((create("canonicalize"),)).run(dmqfx.capture(unet), context)

verdict = dmqfx.verify(program, ApproximateGelu(), context)
print(f"approximate-gelu alone: {verdict.sqnr_db:.1f} dB")

steps = (
    ApproximateGelu(),
    create("plan-sites"),
    create("round-weights", {"method": "nearest"}),
    create("insert-qdq"),
)
finished = Pipeline(steps).run(program, context)
for record in finished.log:
    print(record)

q = dmqfx.CompiledUNet(finished, config=unet.config, policy=context.policy)
sample, prompt = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 16)
print(q(sample, 500, encoder_hidden_states=prompt).sample.shape)
