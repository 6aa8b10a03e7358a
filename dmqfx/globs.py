"""Patterns on addresses: `*` stays inside one name, `**` crosses names, `re:` starts a regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["matcher", "problem_with_glob"]

_WILD = re.compile(r"\*\*|\*|\?")
_MEANING = {"**": ".*", "*": "[^{}]*", "?": "[^{}]"}
_FOREIGN = re.compile(r"[\[\]{}()|^$+\\\s,;:!]")


def matcher(pattern: str) -> Callable[[str], bool]:
    """The test of whether a whole address (or any dotted name) fits the pattern.

    Raises: ValueError if the pattern is not legal, in words.
    Example:
        >>> matcher("down_blocks.*.resnets.**")("down_blocks.0.resnets.1.conv1/conv2d")
        True
        >>> matcher("down_blocks.*")("down_blocks.0.resnets.1.conv1/conv2d")
        False
        >>> matcher("re:.*conv[12]/conv2d")("down_blocks.0.resnets.1.conv1/conv2d")
        True
    """
    problem = problem_with_glob(pattern)
    if problem:
        raise ValueError(problem)
    fits = re.compile(pattern[3:] if pattern.startswith("re:") else _expression(pattern)).fullmatch
    return lambda text: fits(text) is not None


def problem_with_glob(pattern: str) -> str | None:
    """What is wrong with a pattern, or None."""
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            return f"{pattern!r} is not a regular expression: {error}"
        return None if len(pattern) > 3 else "the regular expression after 're:' is empty"
    foreign = _FOREIGN.search(pattern)
    if foreign:
        return (
            f"{foreign[0]!r} in {pattern!r} fits no address: a glob knows *, ** and ?, "
            "all else needs a regular expression that starts with 're:'"
        )
    return None if pattern else "an empty glob fits no address"


def _expression(glob: str) -> str:
    """The regular expression that says the same as a glob.

    Behind the slash a dot is part of the name: `conv_in/*` fits conv_in/conv2d~split-concat.1.
    """
    path, slash, name = glob.partition("/")
    return _translated(path, "./") + slash + _translated(name, "/")


def _translated(glob: str, separators: str) -> str:
    literals = map(re.escape, _WILD.split(glob))
    wild = [_MEANING[found].replace("{}", separators) for found in _WILD.findall(glob)]
    return "".join(text + meaning for text, meaning in zip(literals, [*wild, ""], strict=True))
