"""What a user gets from an installation: built from the source archive, installed as a wheel and in place."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from zipfile import ZipFile

import pytest

from dmqfx.runtime.kernels.native import library

ROOT = Path(__file__).parent.parent
FOLDERS = {"dmqfx": "dmqfx", "passes": "dmqfx/passes", "policies": "dmqfx/policies"}
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "tests")
LIBRARY = "dmqfx/runtime/kernels/libdmqfx.so"
PROBE = """
import importlib.util, json, sys
from importlib.metadata import entry_points
from importlib.resources import files
import dmqfx, dmqfx.passes.canonicalize, dmqfx.emoji
from dmqfx.runtime.kernels.native import library
points = entry_points(group="dmqfx.passes")
print(json.dumps({
    "core": dmqfx.__file__,
    "passes": {point.name: point.load().__module__ for point in points},
    "policies": sorted(e.name for e in files("dmqfx.policies").iterdir() if e.name.endswith(".yaml")),
    "ghost": list(dmqfx.emoji.embed(["ghost"]).shape),
    "parameters": sum(p.numel() for p in dmqfx.emoji.load_unet().parameters()),
    "kernels": getattr(library(), "chosen", None),
    "stray": [name for name in ("passes", "policies", "tests") if importlib.util.find_spec(name)],
}))
"""


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    """Kernels without optimisation: what is built and where it goes is asked here, not how fast it is."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DMQFX_CXXFLAGS", "-O0")
        yield


@dataclass(frozen=True)
class Installed:
    """An environment of its own, in which dmqfx alone is new: all else is read from the running one."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def pip_install(self, *arguments: str) -> None:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            self.python,
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
        ]
        run(*pip, *arguments)

    def probe(self) -> dict[str, object]:
        # -I: neither the current folder nor PYTHONPATH may help
        result: dict[str, object] = json.loads(run(self.python, "-I", "-c", PROBE).splitlines()[-1])
        return result


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def empty_environment(folder: Path) -> Installed:
    """A new environment that sees the running one's packages but none of its editable installations."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(folder)


def source_files() -> set[str]:
    """What a wheel must hold, by its path there: C++ becomes a library."""
    return {LIBRARY} | {
        f"{packaged}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, packaged in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix not in (".cpp", ".h", ".so")
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building leaves files beside them, and old ones would get into the wheel."""
    copy = tmp_path_factory.mktemp("source") / "dmqfx"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """The wheel that is made from the source archive, as a package index would get it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=tree)
    return next((tree / "dist").glob("*.whl"))


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == source_files()


def test_the_wheel_carries_its_licence_and_the_origin_of_the_model(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        licences = {
            Path(name).name: archive.read(name).decode()
            for name in archive.namelist()
            if "/licenses/" in name
        }
    assert "Apache License" in licences["LICENSE"]
    assert "emoji-datasource-google" in licences["NOTICE"]


@pytest.mark.slow
def test_an_installed_wheel_finds_its_passes_policies_and_model(wheel: Path, tmp_path: Path) -> None:
    environment = empty_environment(tmp_path / "environment")
    environment.pip_install(str(wheel))
    check(environment, home=tmp_path)


@pytest.mark.slow
def test_an_installation_in_place_finds_the_same_and_new_files_at_once(tree: Path, tmp_path: Path) -> None:
    environment = empty_environment(tmp_path / "environment")
    environment.pip_install("--no-build-isolation", "--editable", str(tree))
    check(environment, home=tree)
    (tree / "passes" / "brand_new.py").write_text("ANSWER = 42\n")
    try:
        shown = run(
            environment.python, "-I", "-c", "from dmqfx.passes.brand_new import ANSWER; print(ANSWER)"
        )
    finally:
        (tree / "passes" / "brand_new.py").unlink()
    assert shown == "42\n"


def test_the_command_is_installed_and_explains_itself(wheel: Path, tmp_path: Path) -> None:
    environment = empty_environment(tmp_path / "environment")
    environment.pip_install(str(wheel))
    assert "demo" in run(str(environment.folder / "bin" / "dmqfx"), "--help")


def check(environment: Installed, *, home: Path) -> None:
    found = environment.probe()
    assert Path(str(found["core"])).resolve().is_relative_to(home.resolve())
    assert found["passes"] == {
        point.name: point.module
        for point in entry_points(group="dmqfx.passes")
        if point.module.startswith("dmqfx.passes.")
    }
    assert found["policies"] == sorted(file.name for file in (ROOT / "policies").glob("*.yaml"))
    assert found["ghost"] == [1, 8, 128]
    assert found["parameters"] == 5_608_876
    assert found["stray"] == []
    assert found["kernels"] == getattr(library(), "chosen", "")


def test_without_a_compiler_it_is_installed_and_says_that_it_has_no_kernels(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = empty_environment(tmp_path / "environment")
    (tmp_path / "no compiler").mkdir()
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path / "no compiler"))
        environment.pip_install("--no-build-isolation", str(tree))
    asked = "from dmqfx.runtime.targets import resolve; print(resolve('auto').name, resolve('auto').name)"
    done = subprocess.run([environment.python, "-I", "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == "reference reference\n"
    assert done.stderr.count("no native kernels") == done.stderr.count("install a C++ compiler") == 1
