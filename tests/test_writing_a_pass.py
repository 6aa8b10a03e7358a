"""docs/writing-a-pass.md as its reader meets it: the code of the page, block by block, and what it prints."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import float_program, program_of
from torch import fx

from dmqfx.errors import PipelineError
from dmqfx.graph.facts import CANONICAL
from dmqfx.graph.pipeline import PassContext, Pipeline
from dmqfx.graph.registry import passes

PAGE = (Path(__file__).parent.parent / "docs" / "writing-a-pass.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SAID = re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page() -> tuple[dict[str, Any], list[str]]:
    """The names that the page defines, and what each of its blocks prints."""
    names: dict[str, Any] = {"__name__": "page"}
    printed = []
    for block in BLOCKS:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block, "docs/writing-a-pass.md", "exec", dont_inherit=True), names)
        printed.append(out.getvalue())
    return names, printed


def lines_of_the_example() -> list[str]:
    """The rule and the class of the first block."""
    return [line for line in BLOCKS[0].partition("@rule")[2].splitlines() if line.strip()]


def test_the_example_has_fifteen_lines() -> None:
    assert len(lines_of_the_example()) == 15


def test_the_bug_of_the_first_version_is_found_where_the_page_says(page: tuple[Any, list[str]]) -> None:
    """Word for word; the size of the error, and on which probe it is largest, are the machine's."""
    found, told = (re.sub(r"probe \d \(\S+\)|0\.\d+", "", text) for text in (page[1][1], SAID[0]))
    assert found == told


def test_the_mended_version_keeps_its_promise(page: tuple[Any, list[str]]) -> None:
    assert 0 < float(page[1][2]) < 1e-13
    assert 0 < float(SAID[1]) < 1e-13


def test_what_has_changed_is_what_the_page_shows(page: tuple[Any, list[str]]) -> None:
    found, told = (re.sub(r"\d+\.\d+ s$", "", text, flags=re.MULTILINE) for text in (page[1][3], SAID[2]))
    assert found == told


def test_the_pass_with_an_option_is_measured_as_lossy(page: tuple[Any, list[str]]) -> None:
    assert "Preserves.LOSSY" in page[1][4]


def test_three_arms_are_refused_with_the_reason(page: tuple[Any, list[str]]) -> None:
    graph = fx.Graph()
    sample = graph.placeholder("sample")
    graph.placeholder("timestep")
    three = graph.call_function(torch.ops.aten.cat.default, ([sample] * 3, 1))
    graph.output(graph.call_function(torch.ops.aten.conv2d.default, (three, graph.get_attr("w"))))
    program = replace(program_of(graph, {"w": torch.ones(4, 12, 1, 1)}), facts=frozenset({CANONICAL}))
    done = Pipeline((page[0]["SplitConcat"](),)).run(program, PassContext()).log[-1]
    assert done.applied == ()
    assert [each.reason for each in done.refused] == ["3 arms in 1 groups; 2 in 1 can be split"]


def test_before_canonicalize_the_pass_is_refused_with_a_hint(page: tuple[Any, list[str]]) -> None:
    with pytest.raises(PipelineError, match=r"requires .canonical.*put canonicalize before it"):
        Pipeline((page[0]["SplitConcat"](),)).check(float_program(), tuple(passes().values()))
