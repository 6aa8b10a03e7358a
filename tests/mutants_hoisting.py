"""Bugs planted in hoist-invariants: what is hoisted, what it says it depends on, and by what it is kept."""

from __future__ import annotations

from collections.abc import Callable

from planting import Mutant, Plant, edited, patched, planted, spoiled
from torch import Tensor, fx

from dmqfx.graph import ops
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.runtime.memory import content
from dmqfx.runtime.operators import OPS

GROUP = "time_embedding.linear_1/timestep_group~insert-qdq.1"


def kept_by(key: Callable[[Tensor], object]) -> Plant:
    """The pass, whose module keeps what it computes by something else than the content of what it read."""

    def spoil(before: Program, after: Program) -> Program:
        vars(after.gm)["_key"] = lambda read: tuple(
            key(each) if isinstance(each, Tensor) else each for each in read
        )
        return after

    return spoiled(spoil)


def numbers_alone(read: Tensor) -> object:
    return content(read) if read.is_floating_point() else read.shape


def group_forgotten(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    by = ops.args(node)["by"]
    return rw.like(node, by=by[:1]) if isinstance(by, list) and len(by) > 1 else None


def of_the_sample(rw: Rewriter, node: fx.Node) -> fx.Node:
    context = next(each for each in rw.graph.nodes if each.target == "encoder_hidden_states")
    query = ops.tensor(node, "query")
    return rw.like(node, query=rw.call(OPS.hoisted.default, near=query, x=query, by=[context]))


MUTANTS: tuple[Mutant, ...] = tuple(
    planted(
        "hoist-invariants",
        {
            "kept by shape": (kept_by(lambda read: read.shape), GROUP),
            "kept by where a tensor is": (kept_by(lambda read: (read.data_ptr(), read.shape)), GROUP),
            "what the sample changes is hoisted": (
                edited("kernel_sdpa", of_the_sample),
                "/transpose",
            ),
        },
        policy="one prompt",
    )
)
MUTANTS += tuple(
    planted(
        "hoist-invariants",
        {
            "kept without a look at the timestep group": (kept_by(numbers_alone), "/transpose#1"),
            "said to depend on the context alone": (edited("hoisted", group_forgotten), "/transpose#1"),
            "all groups are taken to be alike": (
                patched("_alike", lambda honest: lambda value: True),
                "to_k/quantize~insert-qdq.1",
            ),
        },
        policy="many prompts",
    )
)
