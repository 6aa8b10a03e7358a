"""From marked trees to typed values: a reader returns a value, or None after noting what is wrong where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from dmqfx.errors import Problem
from dmqfx.policy.mark import Mark
from dmqfx.policy.marked import Entry, Leaf, Listing, Odd, Section, Tree
from dmqfx.words import suggest

__all__ = ["Reader"]

_Word = TypeVar("_Word", bound=str)


@dataclass(frozen=True)
class Reader:
    """Reads values and collects every mistake; `path` is the value's name as `--set` spells it."""

    problems: list[Problem] = field(default_factory=list)

    def note(self, mark: Mark, message: str) -> None:
        """Add a mistake."""
        self.problems.append(mark.problem(message))

    def section(self, tree: Tree, path: str, legal: Sequence[str]) -> dict[str, Entry] | None:
        """The legal keys of a mapping."""
        if not isinstance(tree, Section):
            self.wrong(tree, path, f"a mapping with keys among {', '.join(legal)}")
            return None
        for key, entry in tree.entries.items():
            if key not in legal:
                inside = f" in {path}" if path else ""
                self.note(entry.mark, f"unknown key {key!r}{inside}: {suggest(key, legal)}")
        return {key: entry for key, entry in tree.entries.items() if key in legal}

    def listing(self, tree: Tree, path: str) -> tuple[Tree, ...] | None:
        """The items of a list that is not empty."""
        if isinstance(tree, Listing) and tree.items:
            return tree.items
        self.wrong(tree, path, "a list with at least one entry")
        return None

    def word(self, tree: Tree, path: str, legal: Sequence[_Word]) -> _Word | None:
        """One of the legal words."""
        if not isinstance(tree, Leaf) or not isinstance(tree.value, str):
            self.wrong(tree, path, " or ".join(legal))
            return None
        for word in legal:
            if word == tree.value:
                return word
        self.note(tree.mark, f"{path}: unknown word {tree.value!r}: {suggest(tree.value, legal)}")
        return None

    def text(self, tree: Tree, path: str) -> str | None:
        """Text that is not empty."""
        if isinstance(tree, Leaf) and isinstance(tree.value, str) and tree.value.strip():
            return tree.value
        bare = isinstance(tree, Leaf) and isinstance(tree.value, (bool, int, float, Odd))
        self.wrong(tree, path, "text", "put it in quotes" if bare else "")
        return None

    def whole(self, tree: Tree, path: str, low: int, high: int) -> int | None:
        """A whole number within bounds."""
        value = tree.value if isinstance(tree, Leaf) else None
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        quoted = isinstance(value, str) and value.strip().isdecimal()
        self.wrong(tree, path, f"a whole number from {low} to {high}", "remove the quotes" if quoted else "")
        return None

    def number(self, tree: Tree, path: str) -> float | None:
        """A finite number."""
        if (
            isinstance(tree, Leaf)
            and isinstance(tree.value, (int, float))
            and not isinstance(tree.value, bool)
        ):
            return float(tree.value)
        self.wrong(tree, path, "a number")
        return None

    def truth(self, tree: Tree, path: str) -> bool | None:
        """True or false."""
        if isinstance(tree, Leaf) and isinstance(tree.value, bool):
            return tree.value
        self.wrong(tree, path, "true or false")
        return None

    def wrong(self, tree: Tree, path: str, expected: str, mend: str = "") -> None:
        """Note what was expected, what was found and how to mend it."""
        label = f"{path}: " if path else ""
        self.note(
            tree.mark, f"{label}expected {expected}, got {_describe(tree)}" + (f" ({mend})" if mend else "")
        )


def _describe(tree: Tree) -> str:
    if isinstance(tree, Section):
        return "a mapping" if tree.entries else "an empty mapping"
    if isinstance(tree, Listing):
        return "a list" if tree.items else "an empty list"
    if isinstance(tree.value, Odd):
        return f"{tree.value.text}, {tree.value.why}"
    if tree.value is None:
        return "nothing"
    if isinstance(tree.value, bool):
        return str(tree.value).lower()
    return f"the text {tree.value!r}" if isinstance(tree.value, str) else str(tree.value)
