"""Bounds of a pass's options, in words that begin with the option at fault: see `registry.problems_with`."""

from __future__ import annotations

__all__ = ["above", "at_least", "between"]


def at_least(step: object, least: float, *names: str) -> None:
    """Refuse options below a bound.

    Raises: ValueError naming the first.
    Example:
        >>> from types import SimpleNamespace
        >>> at_least(SimpleNamespace(rows=0), 1, "rows")
        Traceback (most recent call last):
        ...
        ValueError: rows must be at least 1, not 0
    """
    for name in names:
        if not getattr(step, name) >= least:
            raise ValueError(f"{name} must be at least {least:g}, not {getattr(step, name)}")


def above(step: object, bound: float, *names: str) -> None:
    """Refuse options at a bound or below it.

    Raises: ValueError naming the first.
    """
    for name in names:
        if not getattr(step, name) > bound:
            raise ValueError(f"{name} must be above {bound:g}, not {getattr(step, name)}")


def between(step: object, least: float, most: float, *names: str) -> None:
    """Refuse options beyond two bounds, which are themselves legal.

    Raises: ValueError naming the first.
    """
    for name in names:
        if not least <= getattr(step, name) <= most:
            raise ValueError(f"{name} must be between {least:g} and {most:g}, not {getattr(step, name)}")
