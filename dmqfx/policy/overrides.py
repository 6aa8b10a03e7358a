"""Changes to a policy from the command line: `default.weight.bits=3`, `rules.ends.keep=float`."""

from __future__ import annotations

from collections.abc import Sequence

from dmqfx.policy.mark import Mark
from dmqfx.policy.marked import Entry, Leaf, Listing, Section, Tree, tree_of_yaml
from dmqfx.policy.reading import Reader
from dmqfx.policy.schema import KEYS, rule_name
from dmqfx.policy.steps import step_name
from dmqfx.words import suggest

__all__ = ["OVERRIDES", "override"]

OVERRIDES = "--set"
"""The file name in the marks of overrides; the line is the number of the override."""


def override(tree: Section, texts: Sequence[str], reader: Reader) -> Section:
    """The tree with each `a.b=c` put in place, in order; c is YAML.

    Whether the key a.b exists and c fits is for the schema to say; here a rule or step that is to be changed
    must be there.
    """
    for number, text in enumerate(texts, start=1):
        mark = Mark(OVERRIDES, number, 1)
        path, equals, value = text.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            reader.note(mark, f"expected something like default.weight.bits=4, got {text!r}")
            continue
        read = tree_of_yaml(value, Mark(OVERRIDES, number, len(path) + 2), reader.problems)
        if read is not None:
            tree = _put(tree, keys, read, mark, reader)
    return tree


def _put(tree: Section, keys: Sequence[str], value: Tree, mark: Mark, reader: Reader) -> Section:
    head, rest = keys[0], keys[1:]
    if head in ("schema", "extends"):
        reader.note(mark, f"{head} is part of the file and cannot be overridden")
    elif head not in KEYS:
        reader.note(mark, f"unknown key {head!r}: {suggest(head, KEYS)}")
    elif head == "rules" and rest:
        return _with_items(tree, head, _rules(tree.get(head), rest, value, mark, reader), mark)
    elif head == "pipeline" and rest:
        return _with_items(tree, head, _steps(tree.get(head), rest, value, mark, reader), mark)
    else:
        return _place(tree, keys, value, mark)
    return tree


def _place(tree: Tree | None, keys: Sequence[str], value: Tree, mark: Mark) -> Section:
    """The section with a value put in at a path; what is not a section on the way becomes one."""
    section = tree if isinstance(tree, Section) else Section({}, mark)
    inner = value if len(keys) == 1 else _place(section.get(keys[0]), keys[1:], value, mark)
    return section.having(keys[0], Entry(inner, mark))


def _with_items(tree: Section, key: str, items: Sequence[Tree], mark: Mark) -> Section:
    old = tree.entries.get(key)
    return tree.having(key, Entry(Listing(tuple(items), old.value.mark), old.mark)) if old else tree


def _rules(tree: Tree | None, keys: Sequence[str], value: Tree, mark: Mark, reader: Reader) -> Sequence[Tree]:
    items = tree.items if isinstance(tree, Listing) else ()
    names = [rule_name(item, position) for position, item in enumerate(items)]
    if keys[0] not in names:
        reader.note(mark, f"there is no rule {keys[0]!r}: {suggest(keys[0], names)}")
    elif len(keys) == 1:
        reader.note(mark, f"rules.{keys[0]}: say which key of the rule, as in rules.{keys[0]}.keep=float")
    else:
        return [
            _place(_making_room(item, keys[1], mark), keys[1:], value, mark) if name == keys[0] else item
            for item, name in zip(items, names, strict=True)
        ]
    return items


def _making_room(rule: Tree, key: str, mark: Mark) -> Tree:
    """A rule with `keep: float` as two settings if one of them changes, with no settings if keep does."""
    if not isinstance(rule, Section):
        return rule
    gone = {"keep": ("weight", "input"), "weight": ("keep",), "input": ("keep",)}.get(key, ())
    kept = rule.get("keep")
    rest = Section({name: entry for name, entry in rule.entries.items() if name not in gone}, rule.mark)
    if kept is None or "keep" not in gone:
        return rest
    return rest.having("weight", Entry(kept, mark)).having("input", Entry(kept, mark))


def _steps(tree: Tree | None, keys: Sequence[str], value: Tree, mark: Mark, reader: Reader) -> Sequence[Tree]:
    items = tree.items if isinstance(tree, Listing) else ()
    names = [step_name(item) for item in items]
    if keys[0] not in names:
        reader.note(
            mark, f"there is no step {keys[0]!r}: {suggest(keys[0], [name for name in names if name])}"
        )
    elif names.count(keys[0]) > 1:
        reader.note(
            mark,
            f"the step {keys[0]!r} is in the pipeline {names.count(keys[0])} times; set pipeline as a whole",
        )
    elif len(keys) != 2:
        reader.note(mark, f"pipeline.{keys[0]}: say which option, as in pipeline.{keys[0]}.option=1")
    else:
        return [
            _with_option(item, keys, value, mark) if name == keys[0] else item
            for item, name in zip(items, names, strict=True)
        ]
    return items


def _with_option(step: Tree, keys: Sequence[str], value: Tree, mark: Mark) -> Section:
    bare = Section({}, mark) if isinstance(step, Leaf) else step
    return Section(_place(bare, keys, value, mark).entries, mark)
