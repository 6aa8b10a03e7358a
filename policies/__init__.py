"""The policies that come with dmqfx: one YAML file each, its reasons in its comments."""

from __future__ import annotations

from importlib.resources import files

__all__ = ["names", "text"]


def names() -> tuple[str, ...]:
    """The shipped policies, in alphabetical order."""
    found = [entry.name for entry in files(__name__).iterdir() if entry.name.endswith(".yaml")]
    return tuple(sorted(name.removesuffix(".yaml") for name in found))


def text(name: str) -> str:
    """The YAML text of a shipped policy.

    Raises: FileNotFoundError if there is no policy of that name.
    """
    return files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
