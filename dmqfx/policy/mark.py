"""Where a policy says something."""

from __future__ import annotations

from dataclasses import dataclass

from dmqfx.errors import Problem

__all__ = ["Mark", "Said"]


@dataclass(frozen=True)
class Mark:
    """Where something was said.

    Units: line and column count from 1; 0 means that it did not come from a file.
    """

    file: str = "<policy>"
    line: int = 0
    column: int = 0

    @property
    def shipped(self) -> bool:
        """Whether a policy of this package says it, which no user can mend."""
        return self.file.startswith("dmqfx/policies/")

    def problem(self, message: str) -> Problem:
        """A mistake at this place."""
        return Problem(message, self.file, self.line, self.column)


@dataclass(frozen=True)
class Said:
    """Words of a policy, and where they stand."""

    words: str
    mark: Mark

    def __str__(self) -> str:
        return self.words
