"""What each built-in pass does to the toy, as text to read; `GOLDENS=write pytest FILE` writes it anew.

`#` stands for numbers with a decimal point, whose last digits depend on the machine; other tests hold them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from mutants import MUTANTS
from mutants_kernels import folded
from planting import ORDER, SPLIT, SWEPT, context, options, program_before

from dmqfx.graph.pipeline import Pass, run_step
from dmqfx.graph.registry import create
from dmqfx.seeing.show import diff

GOLDENS = Path(__file__).parent / "goldens"
OPTIONS = {
    "learn-steps": {},
    "reconstruct-blocks": {"iterations": 600},
    "quantize-attention": {"keys": 1},
}
"""Options with which steps and blocks end far from where they began, on any machine; attention of few keys is changed."""
POLICY = dict.fromkeys([*SWEPT, "learn-steps"], "shifts") | dict.fromkeys(ORDER, "attention")
POLICY |= {"split-attention": "softmax", "quantize-attention": "attended"}
MEETS = {"choose-forms": "lower-reference", "correct-bias": "reconstruct-blocks"}
"""Whether a block that was learned is taken may depend on the machine, and with it which layers have a new bias."""
PART = dict.fromkeys(("insert-observers", "freeze-observers", "apply-scaling", "insert-qdq"), "mid.**")
POLICY["hoist-invariants"] = "many prompts"
LOWERINGS = ("lower-simulate", "lower-reference", "lower-cpu", "fuse", "lower-float", "hoist-invariants")
PART |= dict.fromkeys((*LOWERINGS[:-2], "choose-forms"), "mid.**")


def text(step: Pass) -> str:
    """The difference that a pass makes, and what it refused."""
    policy = POLICY.get(step.name(), "attention")
    before = program_before(MEETS.get(step.name(), step.name()), policy)
    after = run_step(step, before, context(policy))
    record = after.log[-1]
    part = PART.get(step.name(), "**")
    lines = [f"{step.name()} on the toy, {part}", "", *diff(before, after, part).splitlines(), ""]
    lines.append(f"{len(record.applied)} applied, {len(record.refused)} refused")
    lines += [f"refused at {r.at} by {r.rule}: {r.reason}" for r in record.refused]
    return re.sub(r"-?\d+\.\d+(e-?\d+)?|-?\d+e-\d+", "#", "\n".join(lines)) + "\n"


def made(name: str) -> Pass:
    """The pass, and for choose-forms layers that are all faster in float."""
    if name == "choose-forms":
        return folded(lambda weight: weight)(name)
    return create(name, OPTIONS.get(name, options(name)))


OTHERS = ("learn-steps", "quantize-attention", "choose-forms")


ALL = (*dict.fromkeys([*SWEPT, *SPLIT, *ORDER]), *OTHERS, *LOWERINGS)
LONG = ("reconstruct-blocks",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in ALL]
)
def test_a_pass_does_to_the_toy_what_its_golden_says(name: str) -> None:
    golden = GOLDENS / f"{name}.txt"
    found = text(made(name))
    if os.environ.get("GOLDENS") == "write":
        golden.write_text(found)
    assert found == golden.read_text()


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("canonicalize", "a factor of 2 is dropped as if it were 1"),
        ("flag-skips", "the arms of a skip change roles"),
        ("split-skips", "the bias is added by both arms"),
        ("split-attention", "the scale is forgotten"),
        ("vote-shifts", "rows that do not agree get the finest step"),
        ("pair-layers", "a reader of a shared input is left out"),
        ("absorb-scaling", "the bias is forgotten"),
        ("insert-qdq", "one reader of three stays float"),
        ("quantize-attention", "codes have two bits"),
        ("lower-reference", "the bias is lost"),
        ("hoist-invariants", "all groups are taken to be alike"),
    ],
)
def test_a_golden_sees_a_planted_bug(name: str, bug: str) -> None:
    mutant = next(m for m in MUTANTS if (m.pass_name, m.name) == (name, bug))
    assert text(mutant.make()) != (GOLDENS / f"{name}.txt").read_text()


def test_numbers_of_the_machine_are_left_out() -> None:
    assert not re.search(r"\d\.\d", "".join(file.read_text() for file in GOLDENS.glob("*.txt")))
