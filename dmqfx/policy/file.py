"""Policies as YAML: finding the file, following `extends`, overriding, printing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dmqfx import policies
from dmqfx.errors import PolicyError, Problem
from dmqfx.policy.mark import Mark
from dmqfx.policy.marked import Entry, Listing, Section, Tree, plain_scalar, tree_of_python, tree_of_yaml
from dmqfx.policy.overrides import override
from dmqfx.policy.policy import FLOAT, CheckStep, Option, Policy, Rule, Scalar, Setting, Step
from dmqfx.policy.reading import Reader
from dmqfx.policy.schema import SCHEMA, read_policy
from dmqfx.words import suggest

__all__ = ["load_policy", "parse_policy", "print_policy"]

_SUFFIXES = (".yaml", ".yml")
_UNNAMED = "custom"


def load_policy(
    source: str | os.PathLike[str] | Mapping[str, object] | Policy,
    overrides: Sequence[str] = (),
    check_step: CheckStep | None = None,
) -> Policy:
    """A policy from a shipped name, a path, a dict or a policy; `check_step` says what is wrong with a step.

    Raises: PolicyError with every mistake at once.
    """
    reader = Reader()
    if isinstance(source, Policy):
        tree: Tree | None = tree_of_python(_plain(source), Mark(), reader.problems)
        found: _Source | None = _Source("<policy>", source.name, None, tree)
    elif isinstance(source, Mapping):
        tree = tree_of_python({"schema": SCHEMA, **source}, Mark(), reader.problems)
        found = _Source("<policy>", _UNNAMED, Path(), tree)
    elif isinstance(source, (str, os.PathLike)):
        found = _find(source, Path(), Mark(), reader)
    else:
        kinds = "a shipped name, a path, a dict or a Policy"  # type: ignore[unreachable]  # not for every caller
        reader.note(Mark(), f"a policy is {kinds}, not {source!r} ({type(source).__name__})")
        found = None
    return _finish(found, overrides, check_step, reader)


def parse_policy(text: str, file: str = "<policy>", check_step: CheckStep | None = None) -> Policy:
    """The policy in a YAML text; `file` is what errors call it, and `extends` starts from its folder.

    Raises: PolicyError with every mistake at once.
    """
    reader = Reader()
    tree = tree_of_yaml(text, Mark(file, 1, 1), reader.problems)
    name = Path(file).stem if file.endswith(_SUFFIXES) else _UNNAMED
    return _finish(_Source(file, name, Path(file).parent, tree), (), check_step, reader)


@dataclass(frozen=True)
class _Source:
    """A policy's tree before `extends` is followed: what it is called, and where relative paths start."""

    shown: str
    name: str
    folder: Path | None
    tree: Tree | None


def _finish(
    found: _Source | None, overrides: Sequence[str], check_step: CheckStep | None, reader: Reader
) -> Policy:
    tree, whole = _extended(found, (), reader) if found else (None, False)
    if found and tree:
        tree = override(tree, overrides, reader)
        policy = read_policy(tree, reader, check_step, name=found.name, whole=whole)
        if policy is not None and not reader.problems:
            return policy
    raise PolicyError(_in_order(reader.problems))


def _in_order(problems: Sequence[Problem]) -> list[Problem]:
    """Each mistake once, by place, the files in the order in which they came up."""
    files = list(dict.fromkeys(problem.file for problem in problems))
    return sorted(dict.fromkeys(problems), key=lambda each: (files.index(each.file), each.line, each.column))


def _extended(found: _Source, chain: tuple[str, ...], reader: Reader) -> tuple[Section | None, bool]:
    """The tree merged over what it extends, and whether every parent was there."""
    tree = found.tree
    if not isinstance(tree, Section):
        if tree is not None:
            reader.section(tree, "a policy", ("schema", "name", "default", "rules", "pipeline"))
        return None, False
    _check_schema(tree, reader)
    own = Section(
        {key: each for key, each in tree.entries.items() if key not in ("schema", "extends")}, tree.mark
    )
    extends = tree.get("extends")
    if extends is None:
        return own, True
    name = reader.text(extends, "extends")
    parent = _find(name, found.folder, extends.mark, reader) if name else None
    if parent is None:
        return own, False
    seen = (*chain, found.shown)
    if parent.shown in seen:
        reader.note(extends.mark, f"extends goes in a circle: {' > '.join((*seen, parent.shown))}")
        return own, False
    base, whole = _extended(parent, seen, reader)
    return (_merge(base, own), whole) if base else (own, False)


def _check_schema(tree: Section, reader: Reader) -> None:
    schema = tree.get("schema")
    if schema is None:
        reader.note(tree.mark, f"schema is missing: begin with `schema: {SCHEMA}`")
    else:
        reader.word(schema, "schema", (SCHEMA,))


def _merge(base: Section, own: Section) -> Section:
    """A policy over its parent: default and expect key by key, rules after the parent's, the rest its own."""
    merged = {key: each for key, each in base.entries.items() if key not in ("name", "description")}
    for key, entry in own.entries.items():
        old = base.get(key)
        if key in ("default", "expect") and isinstance(old, Section) and isinstance(entry.value, Section):
            merged[key] = Entry(_over(old, entry.value), entry.mark)
        elif key == "rules" and isinstance(old, Listing) and isinstance(entry.value, Listing):
            merged[key] = Entry(Listing(old.items + entry.value.items, entry.value.mark), entry.mark)
        else:
            merged[key] = entry
    return Section(merged, own.mark)


def _over(base: Section, own: Section) -> Section:
    """Sections merged key by key, all the way down."""
    merged = dict(base.entries)
    for key, entry in own.entries.items():
        old = base.get(key)
        if isinstance(old, Section) and isinstance(entry.value, Section):
            entry = Entry(_over(old, entry.value), entry.mark)
        merged[key] = entry
    return Section(merged, own.mark)


def _find(source: str | os.PathLike[str], folder: Path | None, mark: Mark, reader: Reader) -> _Source | None:
    """A policy by path or shipped name; a file beats a shipped policy only where the suffix was written."""
    word, shipped = os.fspath(source), policies.names()
    path = os.path.normpath(os.path.join(folder, word)) if folder is not None else ""
    stem = word.removesuffix(".yaml") if isinstance(source, str) else ""
    if os.path.isfile(path) and (word.endswith(_SUFFIXES) or stem not in shipped):
        text = _read(path, mark, reader)
        tree = tree_of_yaml(text, Mark(path, 1, 1), reader.problems) if text is not None else None
        return _Source(path, Path(path).stem, Path(path).parent, tree)
    if stem in shipped:
        shown = f"dmqfx/policies/{stem}.yaml"
        return _Source(
            shown, stem, None, tree_of_yaml(policies.text(stem), Mark(shown, 1, 1), reader.problems)
        )
    if "\n" in word:
        reader.note(mark, "a policy is a shipped name, a path or a dict, not YAML text")
    else:
        reader.note(
            mark, f"there is no policy {word!r}, neither as a file nor shipped: {suggest(stem, shipped)}"
        )
    return None


def _read(path: str, mark: Mark, reader: Reader) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        reader.note(mark, f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        reader.note(Mark(path, error.object.count(b"\n", 0, error.start) + 1, 1), "not UTF-8 in this line")
    return None


def print_policy(policy: Policy) -> str:
    """The YAML text of a policy, complete in itself; parse_policy gives an equal policy back."""
    return yaml.dump(
        _plain(policy),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        width=110,
        allow_unicode=True,
    )


class _Dumper(yaml.SafeDumper):
    """Repeats what occurs twice instead of naming it."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    """Text with the quotes it needs: bare, 1e3 would be read as a number; folded, U+0085 as a space."""
    tag = "tag:yaml.org,2002:str"
    style = '"' if not text.isprintable() else None if plain_scalar(text, tag) == text else "'"
    return dumper.represent_scalar(tag, text, style)


_Dumper.add_representer(str, _represent_text)


def _plain(policy: Policy) -> dict[str, object]:
    """A policy as the dict that a reader of its YAML would see."""
    default = policy.default
    expect = {} if policy.expect.sqnr_db is None else {"expect": {"sqnr_db": policy.expect.sqnr_db}}
    return {
        "schema": SCHEMA,
        "name": policy.name,
        **({"description": policy.description} if policy.description else {}),
        "default": {"weight": _plain_setting(default.weight), "input": _plain_setting(default.input)},
        **({"rules": [_plain_rule(rule) for rule in policy.rules]} if policy.rules else {}),
        "pipeline": [_plain_step(step) for step in policy.pipeline],
        **expect,
    }


def _plain_setting(setting: Setting) -> object:
    if setting == FLOAT:
        return FLOAT
    said = {key: getattr(setting, key) for key in ("bits", "grid", "per", "range", "groups")}
    return {key: _plain_option(value) for key, value in said.items() if value is not None}


def _plain_rule(rule: Rule) -> dict[str, object]:
    plain: dict[str, object] = {"name": rule.name}
    if rule.at:
        plain["at"] = rule.at[0] if len(rule.at) == 1 else list(rule.at)
    plain |= {key: word for key, word in (("kind", rule.kind), ("fed_by", rule.fed_by)) if word}
    if rule.weight == FLOAT and rule.input == FLOAT:
        plain["keep"] = FLOAT
    else:
        asked = {"weight": rule.weight, "input": rule.input}
        plain |= {arg: _plain_setting(setting) for arg, setting in asked.items() if setting is not None}
    return {**plain, "optional": True} if rule.optional else plain


def _plain_step(step: Step) -> object:
    options = {key: _plain_option(value) for key, value in step.options}
    return {step.name: options} if options else step.name


def _plain_option(value: Option) -> list[Scalar] | Scalar:
    return list(value) if isinstance(value, tuple) else value
