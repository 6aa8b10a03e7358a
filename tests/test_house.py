"""House rules that a machine can check. Each check is first shown something that it must refuse."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import dmqfx
from dmqfx.graph.registry import GROUP, passes

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "dmqfx").rglob("*.py"))
PASS_FILES = sorted(file for file in (ROOT / "passes").glob("*.py") if file.name != "__init__.py")
SOURCES = [*CORE, *PASS_FILES, *sorted((ROOT / "policies").glob("*.py"))]
BUILT_IN = {
    point.name: point for point in entry_points(group=GROUP) if point.module.startswith("dmqfx.passes.")
}
KERNELS = ROOT / "dmqfx" / "runtime" / "kernels"
LONGEST_FILE, LONGEST_FUNCTION, MOST_PUBLIC_NAMES = 320, 40, 40

UNFINISHED = re.compile(
    r"NotImplementedError|\bTODO\b|\bFIXME\b|\bXXX\b|pragma: no cover|except Exception: *pass"
)
UNREASONED = re.compile(r"# type: ignore(?!\[[\w, -]+\]  # \S)")
# A letter in brackets, here and in the examples below: the patterns must not find themselves.
MOVED = re.compile(r"\.cu" + r"da\(|\.to\([\"']cu" + "da")
TOOTHLESS = re.compile(r"assert [T]rue\b|pytest\.[s]kip|mark\.[s]kip|\b[x]fail\b|import[o]rskip")
WORKPLACE = re.compile(r"/[w]ork/|/[f]arm/|/tmp/[l]ab|/tmp/[v]/|(?<!torch)\.[l]ibrary\b|\.\./[s]hared")
JUST_IN_TIME = re.compile(
    r"@torch\.compile|torch\.compile\(|torch\.jit\.|_inductor|_dynamo|cpp_extension|load_inline|\.compile\(\)|"
    r"(import|from) (triton|numba|cffi)|from torch import .*\bcompile\b"
)
VAGUE = re.compile(r"(Manager|Helper|Utils?|Base)$", re.IGNORECASE)


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "dmqfx" else ("dmqfx", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tracked() -> Iterator[tuple[str, str]]:
    """Path and text of every text file under version control."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data:
            yield name, data.decode("utf-8")


# --- the core knows nothing of the passes


def imports_of_passes(source: str) -> list[int]:
    """Lines that reach for the built-in passes: by an import, or by the name of one in a string."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "dmqfx." * bool(node.level) + (node.module or "")
            names = [module] + [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if re.fullmatch(r"dmqfx\.passes\.\w+", node.value) else []
        else:
            continue
        if any(re.match(r"(dmqfx\.+)?passes(\.|$)", name) for name in names):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "line",
    [
        "import dmqfx.passes.canonicalize",
        "from dmqfx.passes import canonicalize",
        "from dmqfx import passes",
        "from .passes.canonicalize import Canonicalize",
        "from passes import canonicalize",
        "import_module('dmqfx.passes.canonicalize')",
    ],
)
def test_the_import_check_sees_every_way_to_a_pass(line: str) -> None:
    assert imports_of_passes(f"def f():\n    {line}\n") == [2]


def test_the_import_check_lets_the_registry_be() -> None:
    assert imports_of_passes("from dmqfx.graph.registry import passes\nGROUP = 'dmqfx.passes'\n") == []


@pytest.mark.parametrize("file", CORE, ids=relative)
def test_the_core_never_imports_a_pass(file: Path) -> None:
    assert imports_of_passes(file.read_text()) == []


# --- public names


def undocumented(name: str, value: object) -> str | None:
    """What is missing of a public name's documentation."""
    doc = getattr(value, "__doc__", None) or ""
    if "Example:" not in doc or ">>>" not in doc:
        return f"dmqfx.{name} has no docstring with an Example"
    return None


def test_the_documentation_check_refuses_a_generated_docstring() -> None:
    assert undocumented("Planned", type("Planned", (), {"__doc__": "Planned(spec, rule)"}))


def test_the_public_surface_is_small() -> None:
    assert 0 < len(dmqfx.__all__) <= MOST_PUBLIC_NAMES
    assert sorted(set(dmqfx.__all__)) == sorted(dmqfx.__all__)


def test_every_public_name_is_offered_for_completion() -> None:
    listed = "import dmqfx; print(*sorted({*dir(dmqfx)} & {*dmqfx.__all__})); print(dmqfx.__version__)"
    fresh = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    assert fresh.stdout.splitlines() == [" ".join(dmqfx.__all__), version("dmqfx")]


def test_every_public_name_is_documented_by_an_example() -> None:
    problems = [undocumented(name, getattr(dmqfx, name)) for name in dmqfx.__all__]
    assert [problem for problem in problems if problem] == []


@pytest.mark.parametrize("file", [file for file in SOURCES if ">>>" in file.read_text()], ids=relative)
def test_the_examples_of_a_module_run(file: Path) -> None:
    results = doctest.testmod(importlib.import_module(module_of(file)), optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0
    assert results.failed == 0


def test_every_public_name_is_defined_where_its_example_is_run() -> None:
    """Doctest looks only at names of the module itself: a public name from elsewhere would go unchecked."""
    modules = {module_of(file) for file in SOURCES}
    strangers = [name for name in dmqfx.__all__ if getattr(dmqfx, name).__module__ not in modules]
    assert strangers == []


# --- a pass is one verb phrase in three spellings


@pytest.mark.parametrize("file", PASS_FILES, ids=relative)
def test_a_pass_file_has_an_entry_point_and_a_class_of_its_name(file: Path) -> None:
    name = file.stem.replace("_", "-")
    camel = "".join(word.capitalize() for word in file.stem.split("_"))
    assert name in BUILT_IN, f"pyproject.toml lacks: {name} = dmqfx.passes.{file.stem}:{camel}"
    assert BUILT_IN[name].value == f"dmqfx.passes.{file.stem}:{camel}"
    assert passes()[name].name() == name


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_an_entry_point_has_a_file(name: str) -> None:
    assert (ROOT / "passes" / f"{name.replace('-', '_')}.py").is_file()


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_pass_has_a_golden(name: str) -> None:
    golden = ROOT / "tests" / "goldens" / f"{name}.txt"
    assert golden.is_file(), f"{relative(golden)} is missing: what {name} makes of a small program"
    assert golden.read_text().strip()


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_pass_has_a_mutant(name: str) -> None:
    from mutants import MUTANTS

    assert name in {mutant.pass_name for mutant in MUTANTS}, (
        f"no planted bug in {name} shows that its tests bite"
    )


def test_every_mutant_and_golden_belongs_to_a_built_in_pass() -> None:
    from mutants import MUTANTS

    goldens = {file.stem for file in (ROOT / "tests" / "goldens").glob("*.txt")}
    assert goldens | {mutant.pass_name for mutant in MUTANTS} <= set(BUILT_IN)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_pass_has_a_row_in_the_architecture_that_tells_what_it_preserves(name: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(rf"^\| `{name}` \|.*\| \**(\w+)\**[^|]*\|$", page, re.MULTILINE)
    assert rows == [passes()[name].preserves.value], (
        f"docs/architecture.md, section 6, should have one row for {name} that ends in what it preserves"
    )


# --- size and words


def long_functions(source: str) -> list[str]:
    """Functions over the limit, their docstrings not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        first = node.body[0]
        documented = ast.get_docstring(node) is not None
        doc = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
        length = (node.end_lineno or 0) - node.lineno + 1 - doc
        if length > LONGEST_FUNCTION:
            found.append(f"{node.name}: {length} lines")
    return found


def test_the_length_check_counts_code_and_not_the_docstring() -> None:
    text = '    """A docstring\n' + "    of many lines\n" * 50 + '    """\n'
    assert long_functions("def f():\n" + text + "    x = 1\n" * 39) == []
    assert long_functions("def f():\n" + text + "    x = 1\n" * 40) == ["f: 41 lines"]


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_a_file_has_one_idea(file: Path) -> None:
    length = len(file.read_text().splitlines())
    assert length <= LONGEST_FILE
    assert long_functions(file.read_text()) == []


@pytest.mark.parametrize("file", sorted(KERNELS.glob("*.[ch]*")), ids=relative)
def test_a_kernel_has_one_idea(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_FILE


def vague_names(source: str) -> list[str]:
    names = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return [name for name in names if VAGUE.search(name)]


def test_the_name_check_refuses_words_that_say_nothing() -> None:
    assert vague_names("class GraphManager: ...\nclass PassBase: ...\nclass Rewriter: ...") == [
        "GraphManager",
        "PassBase",
    ]


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_names_say_something(file: Path) -> None:
    assert not VAGUE.search(file.stem)
    assert vague_names(file.read_text()) == []


def found(pattern: re.Pattern[str], text: str) -> list[str]:
    """The lines in which a pattern occurs."""
    return [
        f"{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (UNFINISHED, "    raise NotImplementedError"),
        (UNFINISHED, "x = 1  # TODO: more"),
        (UNREASONED, "x = f()  # type: ignore"),
        (UNREASONED, "x = f()  # type: ignore[arg-type]"),
        (TOOTHLESS, "@pytest.mark.sk" + "ip"),
        (TOOTHLESS, "    assert Tr" + "ue"),
        (MOVED, "    x = x.cuda()"),
        (JUST_IN_TIME, "    return torch.compile(module)"),
        (JUST_IN_TIME, "from torch.utils.cpp_extension import load"),
        (JUST_IN_TIME, "@torch.compile"),
        (JUST_IN_TIME, "    module.compile()"),
        (JUST_IN_TIME, "from numba import njit"),
        (WORKPLACE, "see ../sha" + "red/design"),
    ],
)
def test_the_word_checks_see_what_they_forbid(pattern: re.Pattern[str], line: str) -> None:
    assert found(pattern, line) == [f"1: {line.strip()}"]


def test_a_type_ignore_with_code_and_reason_is_allowed() -> None:
    assert found(UNREASONED, "x = f()  # type: ignore[arg-type]  # torch's stub forgets None") == []


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_nothing_is_left_unfinished_or_silenced(file: Path) -> None:
    assert found(UNFINISHED, file.read_text()) == []
    assert found(UNREASONED, file.read_text()) == []


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_the_device_is_that_of_the_program(file: Path) -> None:
    assert found(MOVED, file.read_text()) == []


def test_nothing_is_compiled_just_in_time() -> None:
    texts = {relative(file): file.read_text() for file in SOURCES}
    assert [f"{name}:{line}" for name, text in texts.items() for line in found(JUST_IN_TIME, text)] == []


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("*.py")), ids=relative)
def test_a_test_can_fail(file: Path) -> None:
    assert found(TOOTHLESS, file.read_text()) == []


def test_the_repository_speaks_of_the_software_alone() -> None:
    problems = [f"{name}:{line}" for name, text in tracked() for line in found(WORKPLACE, text)]
    assert problems == []
