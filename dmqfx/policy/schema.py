"""The schema dmqfx.policy/1: from a marked tree to a Policy, with every mistake noted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from dmqfx.globs import problem_with_glob
from dmqfx.numbers.quant import Grid, Per, RangeMethod
from dmqfx.policy.mark import Mark
from dmqfx.policy.marked import Entry, Leaf, Listing, Section, Tree
from dmqfx.policy.policy import (
    FLOAT,
    CheckStep,
    Default,
    Expect,
    FedBy,
    Kind,
    PartialSpec,
    Policy,
    Rule,
    Setting,
)
from dmqfx.policy.reading import Reader
from dmqfx.policy.steps import read_pipeline

__all__ = ["KEYS", "RULE_KEYS", "SCHEMA", "SPEC_KEYS", "read_policy", "rule_name"]

SCHEMA: Final = "dmqfx.policy/1"
KEYS: Final = ("schema", "name", "extends", "description", "default", "rules", "pipeline", "expect")
RULE_KEYS: Final = ("name", "at", "kind", "fed_by", "keep", "weight", "input", "optional")
SPEC_KEYS: Final = {
    "weight": ("bits", "grid", "per", "range"),
    "input": ("bits", "grid", "per", "range", "groups"),
}
RANGES: Final[Mapping[str, tuple[RangeMethod, ...]]] = {
    "weight": ("minmax", "mse"),
    "input": get_args(RangeMethod),
}
"""A weight is at hand, and its best range is searched; an input is only sampled, and has more ways to be judged."""
_BITS: Final = {"weight": (2, 8), "input": (4, 8)}
_FLOAT_ONLY: Final[tuple[Literal["float"], ...]] = (FLOAT,)
_MOST_GROUPS: Final = 1000
_NAME = re.compile(r"\w[\w -]*")

_Arg = Literal["weight", "input"]


def read_policy(
    tree: Section, reader: Reader, check_step: CheckStep | None, *, name: str, whole: bool = True
) -> Policy | None:
    """The policy in a tree in which nothing is left to extend, or None if the reader has noted a mistake.

    `name` is for a policy that gives none; `whole` is false if a parent is missing, so that what only the
    parent could have said is not asked for.
    """
    keys = reader.section(tree, "", KEYS) or {}
    if whole:
        for key in ("default", "pipeline"):
            if key not in keys:
                reader.note(tree.mark, f"{key} is missing: give it here or extend a policy that does")
    own = reader.text(keys["name"].value, "name") if "name" in keys else name
    description = reader.text(keys["description"].value, "description") if "description" in keys else ""
    default = _Settings(reader).default(keys["default"].value, whole) if "default" in keys else None
    rules = _Rules(reader, default).read(keys["rules"].value) if "rules" in keys else ()
    pipeline = read_pipeline(keys["pipeline"].value, reader, check_step) if "pipeline" in keys else ()
    expect = _expect(keys["expect"].value, reader) if "expect" in keys else Expect()
    if reader.problems or own is None or default is None or description is None:
        return None
    return Policy(own, default, pipeline, rules, expect, description)


def rule_name(tree: Tree, position: int) -> str:
    """What a rule is called: its own name, or its place in the list, counted from 1."""
    name = tree.get("name") if isinstance(tree, Section) else None
    return name.value if isinstance(name, Leaf) and isinstance(name.value, str) else f"rule {position + 1}"


@dataclass(frozen=True)
class _Settings:
    """Reads what an argument gets: `float`, or bits and the rest."""

    reader: Reader

    def default(self, tree: Tree, whole: bool) -> Default | None:
        """The default, in which both arguments must be said in full."""
        keys = self.reader.section(tree, "default", ("weight", "input"))
        if keys is None:
            return None
        weight = self._in_full("weight", keys, tree.mark, whole)
        input_ = self._in_full("input", keys, tree.mark, whole)
        return None if weight is None or input_ is None else Default(weight, input_)

    def _in_full(self, arg: _Arg, keys: Mapping[str, Entry], mark: Mark, whole: bool) -> Setting | None:
        path = f"default.{arg}"
        if arg not in keys:
            if whole:
                self.reader.note(mark, f"{path} is missing: say float, or bits")
            return None
        tree = keys[arg].value
        setting = self.setting(tree, path, arg)
        if whole and isinstance(tree, Section) and "bits" not in tree.entries:
            self.reader.note(tree.mark, f"{path}.bits is missing")
        return setting

    def setting(self, tree: Tree, path: str, arg: _Arg) -> Setting | None:
        """`float` or a mapping of bits, grid, per, range and, for inputs, groups."""
        if not isinstance(tree, Section):
            return self._float(tree, path, arg)
        if arg == "weight" and "groups" in tree.entries:
            entry = tree.entries["groups"]
            self.reader.note(
                entry.mark, f"{path}.groups: only inputs have timestep groups, a weight is the same always"
            )
            tree = Section({key: each for key, each in tree.entries.items() if key != "groups"}, tree.mark)
        keys = self.reader.section(tree, path, SPEC_KEYS[arg]) or {}
        given = {key: entry.value for key, entry in keys.items()}
        read, word = self.reader, self.reader.word
        return PartialSpec(
            bits=read.whole(given["bits"], f"{path}.bits", *_BITS[arg]) if "bits" in given else None,
            grid=word(given["grid"], f"{path}.grid", get_args(Grid)) if "grid" in given else None,
            per=word(given["per"], f"{path}.per", get_args(Per)) if "per" in given else None,
            range=word(given["range"], f"{path}.range", RANGES[arg]) if "range" in given else None,
            groups=self._groups(given["groups"], f"{path}.groups") if "groups" in given else None,
            mark=tree.mark,
        )

    def _float(self, tree: Tree, path: str, arg: _Arg) -> Setting | None:
        if isinstance(tree, Leaf) and isinstance(tree.value, str):
            return self.reader.word(tree, path, _FLOAT_ONLY)
        self.reader.wrong(tree, path, f"float or a mapping with keys among {', '.join(SPEC_KEYS[arg])}")
        return None

    def _groups(self, tree: Tree, path: str) -> int | tuple[float, ...] | None:
        if not isinstance(tree, Listing):
            return self.reader.whole(tree, path, 1, _MOST_GROUPS)
        items = self.reader.listing(tree, path) or ()
        found = [self.reader.number(item, path) for item in items]
        for number, item in zip(found, items, strict=True):
            if number is not None and number < 0:
                mend = f"timesteps are 0 or more, so no call lies below {number:g} (leave it out)"
                self.reader.note(item.mark, f"{path}: {mend}")
        for before, after, item in zip(found, found[1:], items[1:], strict=False):
            if before is not None and after is not None and not before < after:
                self.reader.note(
                    item.mark, f"{path}: boundaries must ascend, but {after:g} follows {before:g}"
                )
        return tuple(number for number in found if number is not None)


@dataclass(frozen=True)
class _Rules:
    """Reads the list of rules; a rule leans on the default for what it leaves unsaid."""

    reader: Reader
    default: Default | None

    def read(self, tree: Tree) -> tuple[Rule, ...]:
        """The rules that can be read."""
        items = () if _is_empty(tree) else self.reader.listing(tree, "rules") or ()
        first: dict[str, Mark] = {}
        for position, item in enumerate(items):
            name = rule_name(item, position)
            if name in first:
                at = f"{first[name].file}:{first[name].line}"
                self.reader.note(item.mark, f"rules.{name}: the rule at {at} has this name already")
            first.setdefault(name, item.mark)
        rules = [self._rule(item, rule_name(item, position)) for position, item in enumerate(items)]
        return tuple(rule for rule in rules if rule is not None)

    def _rule(self, tree: Tree, name: str) -> Rule | None:
        path = f"rules.{name}"
        keys = self._keys(tree, path)
        if keys is None:
            return None
        given = {key: entry.value for key, entry in keys.items()}
        self._check_name(given.get("name"))
        settings = _Settings(self.reader)
        weight = settings.setting(given["weight"], f"{path}.weight", "weight") if "weight" in given else None
        input_ = settings.setting(given["input"], f"{path}.input", "input") if "input" in given else None
        if "keep" in given:
            weight = input_ = self.reader.word(given["keep"], f"{path}.keep", _FLOAT_ONLY)
        read = self.reader
        rule = Rule(
            name=name,
            at=self._patterns(given["at"], f"{path}.at") if "at" in given else (),
            kind=read.word(given["kind"], f"{path}.kind", get_args(Kind)) if "kind" in given else None,
            fed_by=read.word(given["fed_by"], f"{path}.fed_by", get_args(FedBy))
            if "fed_by" in given
            else None,
            weight=weight,
            input=input_,
            optional=read.truth(given["optional"], f"{path}.optional") or False
            if "optional" in given
            else False,
            mark=tree.mark,
        )
        self._check_sense(rule, keys)
        return rule

    def _keys(self, tree: Tree, path: str) -> dict[str, Entry] | None:
        """The keys of a rule; words of a specification that stand one level too high get their own advice."""
        if not isinstance(tree, Section):
            self.reader.section(tree, path, RULE_KEYS)
            return None
        astray = [key for key in tree.entries if key in SPEC_KEYS["input"]]
        for key in astray:
            self.reader.note(tree.entries[key].mark, f"{path}: {key!r} belongs inside weight or input")
        rest = {key: entry for key, entry in tree.entries.items() if key not in astray}
        return self.reader.section(Section(rest, tree.mark), path, RULE_KEYS)

    def _check_name(self, tree: Tree | None) -> None:
        name = self.reader.text(tree, "name of a rule") if tree is not None else None
        if tree is not None and name is not None and not _NAME.fullmatch(name):
            self.reader.note(
                tree.mark, f"a rule's name has letters, digits, '_', '-' and spaces only, not {name!r}"
            )

    def _patterns(self, tree: Tree, path: str) -> tuple[str, ...]:
        found: list[str] = []
        for item in self.reader.listing(tree, path) or () if isinstance(tree, Listing) else (tree,):
            pattern = self.reader.text(item, path)
            problem = problem_with_glob(pattern) if pattern is not None else None
            if problem:
                self.reader.note(item.mark, f"{path}: {problem}")
            elif pattern is not None:
                found.append(pattern)
        return tuple(found)

    def _check_sense(self, rule: Rule, keys: Mapping[str, Entry]) -> None:
        """What each key says alone may be legal, and the rule still make no sense."""
        path = f"rules.{rule.name}"
        for arg in ("weight", "input"):
            if "keep" in keys and arg in keys:
                self.reader.note(keys[arg].mark, f"{path}: keep: float decides about {arg} already")
        if not keys.keys() & {"at", "kind", "fed_by"}:
            self.reader.note(
                rule.mark, f'{path} selects nothing: say at, kind or fed_by (at: "**" is everything)'
            )
        if not keys.keys() & {"keep", "weight", "input"}:
            self.reader.note(rule.mark, f"{path} asks for nothing: say keep, weight or input")
        if rule.kind in ("attention", "softmax") and isinstance(rule.weight, PartialSpec):
            self.reader.note(keys["weight"].mark, f"{path}: {rule.kind} has no weight, only inputs")
        for arg, setting in (("weight", rule.weight), ("input", rule.input)):
            if self.default and isinstance(setting, PartialSpec) and arg in keys:
                complete = self.default.complete(arg, setting)
                if (
                    isinstance(complete, PartialSpec)
                    and complete.bits is None
                    and not _says_bits(keys[arg].value)
                ):
                    mark = keys[arg].value.mark
                    self.reader.note(
                        mark, f"{path}.{arg}.bits is missing, and default.{arg} has none to take over"
                    )


def _is_empty(tree: Tree) -> bool:
    return isinstance(tree, Listing) and not tree.items


def _says_bits(tree: Tree) -> bool:
    return isinstance(tree, Section) and "bits" in tree.entries


def _expect(tree: Tree, reader: Reader) -> Expect:
    keys = reader.section(tree, "expect", ("sqnr_db",)) or {}
    return Expect(reader.number(keys["sqnr_db"].value, "expect.sqnr_db") if "sqnr_db" in keys else None)
