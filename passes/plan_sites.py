"""plan-sites: write what the policy asks of every site into the table: one plan for all passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmqfx.errors import PipelineError
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.facts import CANONICAL, PLANNED, QDQ, Fact
from dmqfx.graph.modules import is_fixed
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.sites import is_weight, operations
from dmqfx.graph.table import Planned
from dmqfx.policy.policy import resolve


@dataclass(frozen=True)
class PlanSites(Pass):
    """Resolve the policy against the program: a Planned entry per site, a refusal for what cannot be."""

    requires: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.BITWISE

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Write the plan.

        Raises: PipelineError without a policy; PolicyError for rules that match nothing.
        """
        if ctx.policy is None:
            raise PipelineError("plan-sites needs a policy in its context; compile passes one along")
        planned = resolve(ctx.policy, operations(program), ctx.train_timesteps)
        entries: dict[Site, Planned] = {}
        for site, plan in ctx.journal.fuelled(planned.items()):
            reason = _unquantizable(program, site) if plan.spec is not None else None
            if reason is not None:
                ctx.journal.refuse(site, f"plan {site.arg}", f"{reason}; {plan.spec} was asked for")
                plan = Planned(None, plan.rule)
            elif not ctx.journal.apply(site, f"plan {site.arg}", f"{plan.spec or 'float'} by {plan.rule}"):
                break
            entries[site] = plan
        return program.with_table(program.table.put_all(entries))


def _unquantizable(program: Program, site: Site) -> str | None:
    named = ops.args(program.node(site.at))
    source = named.get(site.arg)
    if not isinstance(source, fx.Node):
        return f"{site.arg} is not a tensor"
    if is_weight(site) and not is_fixed(source):
        return "the weight depends on an input, so it has no fixed codes"
    if not source.meta["val"].dtype.is_floating_point:
        return f"{site.arg} is {source.meta['val'].dtype}, not a floating tensor"
    first = next((named[arg] for arg in ("input", "query", "softmax") if arg in named), None)
    if isinstance(first, fx.Node) and first.meta["val"].shape[:1] != (program.inputs.sizes["B"],):
        return "the operation does not work on a batch (a resampling filter takes batch and channels as one)"
    return None
