"""YAML and Python data as trees in which every value knows where it was written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from dmqfx.errors import Problem
from dmqfx.policy.mark import Mark
from dmqfx.policy.policy import Scalar

__all__ = [
    "Entry",
    "Leaf",
    "Listing",
    "Odd",
    "Section",
    "Tree",
    "plain_scalar",
    "tree_of_python",
    "tree_of_yaml",
]

_DEEPEST = 16
_LARGEST = 1e18
_YAML = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(
    _YAML + kind for kind in "null bool int float str timestamp value merge map seq".split()
)
_SWITCH = "which YAML takes for true or false"
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Odd:
    """A value that no key of a policy takes, with the reason."""

    text: str
    why: str


@dataclass(frozen=True)
class Leaf:
    """A single value."""

    value: Scalar | Odd
    mark: Mark


@dataclass(frozen=True)
class Listing:
    """A list."""

    items: tuple[Tree, ...]
    mark: Mark


@dataclass(frozen=True)
class Entry:
    """The value of a key, and where the key stands."""

    value: Tree
    mark: Mark


@dataclass(frozen=True)
class Section:
    """A mapping, in the order of the file."""

    entries: Mapping[str, Entry]
    mark: Mark

    def get(self, key: str) -> Tree | None:
        """The value of a key, or None."""
        entry = self.entries.get(key)
        return entry.value if entry else None

    def having(self, key: str, entry: Entry) -> Section:
        """This section with one key more, or another value for it."""
        return Section({**self.entries, key: entry}, self.mark)


Tree = Leaf | Listing | Section


def tree_of_yaml(text: str, start: Mark, problems: list[Problem]) -> Tree | None:
    """The tree of a YAML text whose first character stands at `start`, or None if it has no tree."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        where = _shift(start, at.line, at.column) if at else start
        problems.append(where.problem(f"not YAML: {_words_of(error)}"))
        return None
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        where = _shift(start, len(before) - 1, len(before[-1]))
        character = f"U+{ord(text[error.position]):04X}"
        problems.append(where.problem(f"not YAML: the character {character} must be escaped"))
        return None
    except RecursionError:
        problems.append(start.problem("nested too deeply"))
        return None
    if node is None:
        return Leaf(None, start)
    return _Composed(start, problems).tree(node, 0)


def tree_of_python(value: object, mark: Mark, problems: list[Problem], depth: int = 0) -> Tree:
    """The tree of a dict, list or scalar, all of it marked alike."""
    if depth > _DEEPEST:
        problems.append(mark.problem("nested too deeply"))
    elif isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                problems.append(mark.problem(f"keys are text, not {key!r}"))
        named = {key: item for key, item in value.items() if isinstance(key, str)}
        trees = {key: tree_of_python(item, mark, problems, depth + 1) for key, item in named.items()}
        return Section({key: Entry(tree, mark) for key, tree in trees.items()}, mark)
    elif isinstance(value, (list, tuple)):
        return Listing(tuple(tree_of_python(item, mark, problems, depth + 1) for item in value), mark)
    elif isinstance(value, (int, float)) and not abs(value) < _LARGEST:
        return Leaf(Odd(str(value), "not a finite number"), mark)
    elif value is None or isinstance(value, (bool, int, float, str)):
        return Leaf(value, mark)
    return Leaf(Odd(repr(value), f"a {type(value).__name__}"), mark)


def _words_of(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's half sentences as one, with the mend for a glob that was taken for an alias."""
    problem = error.problem or ""
    whole = f"{error.context}, {problem}" if error.context and problem.startswith("but ") else problem
    alias = "alias" in f"{error.context} {problem}"
    return whole + (" (put a glob that begins with * in quotes)" if alias else "")


def plain_scalar(text: str, tag: str) -> Scalar | Odd:
    """What an unquoted YAML scalar means here; `tag` is what YAML 1.1 takes it for.

    Stricter than YAML 1.1, whose `on` is true, `010` eight and `1:30` ninety; kinder where 1e-3 is text.
    """
    kind = tag.removeprefix(_YAML)
    if kind == "null":
        return None
    if kind == "bool":
        return text == "true" if text in ("true", "false") else Odd(text, _SWITCH)
    if _NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    if kind == "int":
        return (
            int(text)
            if _WHOLE.fullmatch(text)
            else Odd(text, "not a decimal number: other notations are not read")
        )
    if kind == "float":
        return Odd(text, "not a finite decimal number")
    return text


@dataclass(frozen=True)
class _Composed:
    """The walk over PyYAML's nodes."""

    start: Mark
    problems: list[Problem]

    def tree(self, node: yaml.Node, depth: int) -> Tree:
        mark = _shift(self.start, node.start_mark.line, node.start_mark.column)
        if depth > _DEEPEST:
            self.problems.append(mark.problem("nested too deeply"))
            return Leaf(None, mark)
        if node.tag not in _PLAIN_TAGS:
            self.problems.append(mark.problem(f"tags such as {node.tag!r} are not read"))
        if isinstance(node, yaml.MappingNode):
            return self._section(node, mark, depth)
        if isinstance(node, yaml.SequenceNode):
            return Listing(tuple(self.tree(item, depth + 1) for item in node.value), mark)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return Leaf(plain_scalar(node.value, node.tag) if plain else node.value, mark)

    def _section(self, node: yaml.MappingNode, mark: Mark, depth: int) -> Section:
        entries: dict[str, Entry] = {}
        for key, value in node.value:
            at = _shift(self.start, key.start_mark.line, key.start_mark.column)
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(at.problem("a key must be a single word"))
            elif key.value in entries:
                first = entries[key.value].mark
                self.problems.append(at.problem(f"key {key.value!r} is already given in line {first.line}"))
            else:
                entries[key.value] = Entry(self.tree(value, depth + 1), at)
        return Section(entries, mark)


def _shift(start: Mark, line: int, column: int) -> Mark:
    """A place counted from `start`; PyYAML counts from 0."""
    return Mark(start.file, start.line + line, column + (start.column if line == 0 else 1))
