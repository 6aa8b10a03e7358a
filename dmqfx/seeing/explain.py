"""What a policy asks of every site of a program, before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

from dmqfx.errors import PolicyError, Problem
from dmqfx.graph import registry
from dmqfx.graph.facts import PLANNED
from dmqfx.graph.pipeline import PassContext, Pipeline
from dmqfx.graph.program import Program
from dmqfx.graph.sites import operations
from dmqfx.policy.policy import Explanation, Policy
from dmqfx.policy.policy import explain as resolved
from dmqfx.seeing import wording
from dmqfx.seeing.given import Seen, program_of
from dmqfx.seeing.selection import select

__all__ = ["explain", "explanations", "table"]


def explain(
    program: Seen, policy: str | PathLike[str] | Mapping[str, object] | Policy = "w4a8-quick", at: str = "**"
) -> str:
    """One line per site: the bits that a policy asks for, the rule that decided, the rules that it overrides.

    Nothing is quantized. The program is best one from `capture`: it is taken through the policy's own steps up
    to planning. `policy` is what `compile` takes, `at` a glob on addresses as in `show`.

    Raises: PolicyError with every mistake of the policy; AddressError if no operation fits;
        NotAProgramError.
    Example:
        >>> import dmqfx
        >>> from diffusers import UNet2DModel
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=2, **blocks)
        >>> print(explain(dmqfx.capture(unet), "w8a16", "re:(conv_in|down_blocks.0.resnets.0.conv1)/.*"))
        site                                         bits                                rule     overrides
        conv_in/conv2d:input                         float                               ends
        conv_in/conv2d:weight                        float                               ends
        down_blocks.0.resnets.0.conv1/conv2d:input   float                               default
        down_blocks.0.resnets.0.conv1/conv2d:weight  8 bit symmetric per channel minmax  default
    """
    return table(explanations(program_of(program, "explain"), policy, at))


def table(found: Sequence[Explanation]) -> str:
    """Explanations as a table for a terminal."""
    rows = [["site", "bits", "rule", "overrides"]]
    rows += [[str(e.site), str(e.spec or "float"), e.rule, ", ".join(e.overridden)] for e in found]
    return wording.columns(rows)


def explanations(
    program: Program, policy: str | PathLike[str] | Mapping[str, object] | Policy, at: str = "**"
) -> list[Explanation]:
    """What `explain` prints, as values.

    Raises: as explain.
    """
    chosen = Policy.load(policy, check_step=registry.problems_with)
    found = resolved(chosen, operations(_to_be_planned(program, chosen)))
    wanted = select(dict.fromkeys(each.site.at for each in found), at)
    return [each for each in found if each.site.at in wanted]


def _to_be_planned(program: Program, policy: Policy) -> Program:
    """The program as the step that plans sites would get it; one that has a plan is taken as it is."""
    if PLANNED in program.facts:
        return program
    steps = registry.pipeline((step.name, step.keywords()) for step in policy.pipeline).steps
    planning = next((k for k, step in enumerate(steps) if PLANNED in step.provides), None)
    if planning is None:
        planners = " or ".join(name for name, step in registry.passes().items() if PLANNED in step.provides)
        text = f"the pipeline of {policy.name} has no step that plans sites, so it quantizes nothing"
        raise PolicyError([Problem(f"{text}; put {planners} into it")])
    return Pipeline(steps[:planning]).run(program, PassContext(policy))
