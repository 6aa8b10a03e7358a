"""Passes by name, found through the entry-point group `dmqfx.passes`: yours like the built-in ones."""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points

from dmqfx.errors import PassNotFoundError
from dmqfx.graph.pipeline import Pass, Pipeline
from dmqfx.words import suggest

GROUP = "dmqfx.passes"
logger = logging.getLogger(__name__)


@cache
def passes() -> Mapping[str, type[Pass]]:
    """Every installed pass by its YAML name; an entry point that does not lead to a Pass is left out with a warning."""
    found: dict[str, type[Pass]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            cls = point.load()
        except (ImportError, AttributeError) as error:
            logger.warning("pass %s (%s) cannot be loaded: %s", point.name, point.value, error)
            continue
        if isinstance(cls, type) and issubclass(cls, Pass):
            found[point.name] = cls
        else:
            logger.warning("entry point %s = %s is not a subclass of dmqfx.Pass", point.name, point.value)
    return found


def create(name: str, options: Mapping[str, object] | None = None) -> Pass:
    """A pass from its name and options; of those that have no effect beside the others a warning tells.

    Raises: PassNotFoundError for an unknown name or option, or a value of the wrong type, with the nearest legal word.
    """
    for problem in problems_with(name, options or {}).values():
        raise PassNotFoundError(problem)
    made = passes()[name](**(options or {}))
    for idle in idle_options(made, options or {}):
        logger.warning("%s: %s", name, idle)
    return made


def idle_options(step: Pass, given: Mapping[str, object]) -> list[str]:
    """The options among those given that change nothing, with the reason."""
    found = []
    for option in given:
        other, values = step.only_with.get(option, ("", ()))
        while other:
            if (value := getattr(step, other)) not in values:
                found.append(
                    f"{option} has no effect with {other} {value}; it belongs to {' and '.join(values)}"
                )
                break
            other, values = step.only_with.get(other, ("", ()))
    return found


def problems_with(name: str, options: Mapping[str, object]) -> Mapping[str, str]:
    """What is wrong with a step of a policy's pipeline, by the option at fault; "" is the step itself."""
    known = passes()
    if name not in known:
        return {"": f"there is no pass {name!r}; {suggest(name, list(known))}"}
    fields = {field.name: field for field in dataclasses.fields(known[name])}
    hints = typing.get_type_hints(known[name])
    found: dict[str, str] = {}
    for option, value in options.items():
        if option not in fields:
            found[option] = f"{name} has no option {option!r}; {suggest(option, list(fields))}"
        elif not _fits(value, hints[option]):
            found[option] = f"{name}: option {option} must be {_words(hints[option])}, not {value!r}"
    try:
        known[name](**{option: value for option, value in options.items() if option not in found})
    except (TypeError, ValueError) as error:
        named = str(error).partition(" ")[0]  # as in "exponent must be between 0 and 1, not 7"
        found.setdefault(named if named in options else "", f"{name}: {error}")
    return found


def pipeline(steps: typing.Iterable[tuple[str, Mapping[str, object]]]) -> Pipeline:
    """A pipeline from (name, options) pairs.

    Raises: PassNotFoundError as `create`.
    """
    return Pipeline(tuple(create(name, options) for name, options in steps))


def _fits(value: object, hint: object) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type):
        return isinstance(value, hint)
    options = typing.get_args(hint)
    return not options or any(_fits(value, option) for option in options)


def _words(hint: object) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    words: dict[object, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a word",
    }
    return words.get(hint, str(hint))
