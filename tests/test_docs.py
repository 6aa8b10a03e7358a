"""README and docs/: every block of Python runs, every link leads somewhere, every command line is legal."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmqfx.cli import build_parser
from dmqfx.graph import registry
from dmqfx.policy.policy import Policy

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^```python\n((?:(?!^```).)*)^```\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
TESTED_APART = {"writing-a-pass.md"}  # in test_writing_a_pass.py, which also reads what is printed

PIPELINE = """
from tiny_pipeline import tiny_pipeline
pipe = tiny_pipeline()
"""
GRAPH = """
import dmqfx
from dmqfx import PassContext
from dmqfx.graph import registry
unet = pipe.unet
program = registry.pipeline([("canonicalize", {}), ("flag-skips", {})]).run(dmqfx.capture(unet), PassContext())
"""
GIVEN = {
    "architecture.md": PIPELINE
    + """
from dmqfx import Calibration
pipe.save_pretrained("pipeline")
folder = "pipeline"
calibration = Calibration.record(pipe, prompts=["a cat"], steps=2)
""",
    "calibration.md": PIPELINE,
    "evaluation.md": PIPELINE,
    "file-format.md": PIPELINE
    + """
import dmqfx
pipe.unet = dmqfx.compile(pipe.unet, "w8a16", report_rows=0)
pipe.save_pretrained("pipeline")
directory = "pipeline"
""",
    "kernels.md": PIPELINE + "\nunet = pipe.unet\n",
    "policies.md": PIPELINE + GRAPH,
    "verification.md": PIPELINE
    + GRAPH
    + """
from dmqfx import Calibration, Policy
ctx = PassContext(Policy.load("w4a8-quick"), Calibration.record(pipe, prompts=["a cat"], steps=2))
before = "plan-sites insert-observers freeze-observers pair-layers learn-scaling".split()
program = registry.pipeline((name, {}) for name in before).run(program, ctx)
""",
}
"""What a page takes for granted: the reader's own pipeline, folder, program."""


def name_of(page: Path) -> str:
    return page.name


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (found,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a page in a language; one that says more than its language is not let through."""
    found = BLOCK.findall(page.read_text())
    assert not [info for info, _ in found if info.startswith(language) and info != language]
    return [code for info, code in found if info == language]


WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text() and page.name not in TESTED_APART]


LONG = {"getting-started.md"}
"""Draws, compiles and evaluates the bundled model, as its reader would."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.name in LONG)) for page in WITH_PYTHON],
    ids=name_of,
)
@pytest.mark.filterwarnings("ignore::dmqfx.calibration.calibration.CalibrationWarning")
def test_the_python_of_a_page_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    names: dict[str, Any] = {"__name__": "page"}
    exec(GIVEN.get(page.name, ""), names)
    told = dict(PRINTED.findall(page.read_text()))
    for code in blocks(page, "python"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, page.name, "exec", dont_inherit=True), names)
        assert told.get(code) in (None, out.getvalue())


def test_pages_that_take_something_for_granted_have_python() -> None:
    assert GIVEN.keys() <= {page.name for page in WITH_PYTHON}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_whole_policy_on_a_page_is_a_legal_policy(page: Path) -> None:
    for text in blocks(page, "yaml"):
        found = yaml.safe_load(text)
        if isinstance(found, dict) and "schema" in found and "split-concat" not in text:
            Policy.load(found, check_step=registry.problems_with)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, heading = target.partition("#")
        if "://" in target:
            continue
        there = page.parent / file if file else page
        assert there.exists(), target
        titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if heading else []
        anchors = {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}
        assert not heading or heading in anchors, target


def legal(line: str) -> bool:
    """Whether a command line can be run as it stands."""
    try:
        build_parser().parse_args(shlex.split(line.partition(" > ")[0], comments=True)[1:])
    except SystemExit as stopped:
        return not stopped.code  # --help stops too
    return True


def test_the_check_of_command_lines_sees_a_wrong_one() -> None:
    assert legal("dmqfx --help  # all commands")
    assert legal("dmqfx policies w4a8 > my.yaml")
    assert not legal("dmqfx compile emoji")
    assert not legal("dmqfx inspect emoji --pictures u.svg")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_command_line_on_a_page_is_legal(page: Path) -> None:
    told = [line for _, text in BLOCK.findall(page.read_text()) for line in text.splitlines()]
    assert [line for line in told if line.startswith("dmqfx ") and not legal(line)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_command_that_a_page_mentions_has_those_options(page: Path) -> None:
    for line in re.findall(r"`dmqfx ([a-z]+ [^`]*--[^`]*)`", page.read_text()):
        command, *words = line.split()
        parser = commands()[command]
        for option in (word.strip("[].") for word in words if word.lstrip("[").startswith("--")):
            assert option in parser.format_help(), f"dmqfx {line}"


def test_the_architecture_has_a_line_for_every_folder() -> None:
    section = (ROOT / "docs" / "architecture.md").read_text().partition("\n## 11. Files\n")[2]
    section = section.partition("\n## ")[0]
    rooms = sorted({file.parent.name for file in (ROOT / "dmqfx").glob("*/__init__.py")})
    assert [room for room in rooms if f"\n  {room}/ " not in section] == []
    listed = subprocess.run(
        ["git", "ls-files", "*/*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    folders = sorted({name.partition("/")[0] for name in listed.stdout.split()})
    assert [folder for folder in folders if f"\n{folder}/ " not in section] == []


def test_the_readme_lists_every_shipped_policy() -> None:
    from dmqfx import policies

    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(policies.names())


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES if page.name != "README.md" and page.name not in text] == []
