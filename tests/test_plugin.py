"""A pass of another package: really installed, found by its entry point, named in a policy, verified."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import one_level, randomize

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "tests" / "plugin"
Session = dict[str, dict[str, Any]]
PAGE = (ROOT / "docs" / "writing-a-pass.md").read_text()
SESSION = """
import contextlib, io, json, sys
from dmqfx.cli import main

def dmqfx(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

compiled = ["compile", "unet", "--rows", "0", "--json", "--policy"]
print(json.dumps({
    "pass": dmqfx("passes", "split-concat", "--json"),
    "split": dmqfx(*compiled, "split.yaml", "--out", "split", "--verify"),
    "refused": dmqfx(*compiled, "wide.yaml", "--out", "wide"),
    "typo": dmqfx(*compiled, "split.yaml", "--out", "typo", "--set", "pipeline.split-concat.lest=2"),
    "shown": dmqfx("show", "split", "--at", "up_blocks.0.resnets.0.conv_shortcut/*", "--json"),
}))
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """What commands answer in an environment where the plug-in is installed."""
    home = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PLUGIN, home / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    run([*pip, "--target", str(home / "installed"), str(source)], home)
    unet = one_level()
    randomize(unet)
    unet.save_pretrained(home / "unet")
    policy = PAGE.partition("```yaml\n")[2].partition("```")[0]
    for name, least in (("split", 1), ("wide", 17)):
        (home / f"{name}.yaml").write_text(policy.replace("least: 32", f"least: {least}"))
    answers = run([sys.executable, "-c", SESSION], home, PYTHONPATH=str(home / "installed"))
    found: Session = json.loads(answers.splitlines()[-1])
    return found


def run(command: list[str], home: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=home, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def test_an_installed_pass_is_listed_with_its_options_and_where_it_comes_from(session: Session) -> None:
    told = json.loads(session["pass"]["out"])
    assert told["options"] == {"least": "int = 1"}
    assert told["preserves"] == "exact"
    assert told["from"] == "dmqfx_split_concat"


def test_a_policy_runs_it_and_the_verifier_watches(session: Session) -> None:
    assert session["split"]["code"] == 0, session["split"]["err"]
    done = {each["name"]: each for each in json.loads(session["split"]["out"])["report"]["passes"]}
    assert done["split-concat"]["applied"] == 2
    assert 0 < done["split-concat"]["drift"] < 1e-10


def test_what_it_made_is_quantized_stored_and_loaded_without_it_being_asked_again(session: Session) -> None:
    assert session["shown"]["code"] == 0, session["shown"]["err"]
    operations = [line["op"] for line in json.loads(session["shown"]["out"])]
    assert operations.count("conv2d") == 2
    assert operations.count("unpack") == 2


def test_its_option_comes_from_the_policy_and_its_refusals_are_reported(session: Session) -> None:
    assert session["refused"]["code"] == 0, session["refused"]["err"]
    done = {each["name"]: each for each in json.loads(session["refused"]["out"])["report"]["passes"]}
    assert done["split-concat"]["applied"] == 0
    assert [each["reason"] for each in done["split-concat"]["refused"]] == [
        "an arm has 16 channels, fewer than 17"
    ] * 2


def test_a_wrong_option_is_refused_with_the_nearest_right_one(session: Session) -> None:
    assert session["typo"]["code"] == 1
    assert "split-concat has no option 'lest'; did you mean 'least'?" in session["typo"]["err"]


def test_without_the_package_there_is_no_such_pass() -> None:
    from dmqfx.graph import registry

    assert "split-concat" not in registry.passes()


def test_the_documented_packaging_is_that_of_the_plug_in() -> None:
    shown = PAGE.partition("```toml\n")[2].partition("```")[0]
    assert shown == (PLUGIN / "pyproject.toml").read_text()
