"""Why a rule of a policy decides nothing, said so that its author can mend it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dmqfx.errors import Problem

if TYPE_CHECKING:
    from dmqfx.policy.policy import Operation, Rule

__all__ = ["problem_with_idle"]


def problem_with_idle(rule: Rule, operations: Sequence[Operation], hits: Sequence[Operation]) -> Problem:
    """The mistake of a rule that decides about none of the operations, `hits` being those that it selects."""
    return rule.mark.problem(
        f"rule {rule.name!r} {_why(rule, operations, hits)}; `optional: true` allows that"
    )


def _why(rule: Rule, operations: Sequence[Operation], hits: Sequence[Operation]) -> str:
    if hits:
        mend = "say `kind: attention` to quantize its operands" if rule.input else "attention has no weight"
        return f"matches only attention, which it says nothing about: {mend}"
    by_address = replace(rule, kind=None, fed_by=None).selector()
    named = [op for op in operations if by_address(op)]
    wants = [f"{key}: {word}" for key, word in (("kind", rule.kind), ("fed_by", rule.fed_by)) if word]
    if not named or not wants:
        return f"matches no operation: {_near(rule.at, [str(op.address) for op in operations])}"
    hint = " (fed_by is known once the step flag-skips has run)" if rule.fed_by else ""
    hint += " (a softmax can be seen once the step split-attention has run)" if rule.kind == "softmax" else ""
    return f"matches no operation: none of the {len(named)} at its addresses is {' with '.join(wants)}{hint}"


def _near(patterns: Sequence[str], addresses: Sequence[str]) -> str:
    """The three addresses that are most like any of the patterns."""
    likeness: dict[str, float] = {}
    for pattern in patterns:
        compare = difflib.SequenceMatcher(b=pattern.removeprefix("re:").replace("*", "").replace("\\", ""))
        for address in addresses:
            compare.set_seq1(address)
            likeness[address] = max(likeness.get(address, 0.0), compare.ratio())
    nearest = sorted(likeness, key=lambda address: -likeness[address])[:3]
    return f"the nearest are {', '.join(nearest)}" if nearest else "there is none to choose from"
