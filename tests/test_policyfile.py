"""Policy files: reading, sources, extends, overrides and printing."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from strategies_policy import policies

from dmqfx import policies as shipped
from dmqfx.errors import PolicyError
from dmqfx.graph.address import Address
from dmqfx.policy.file import parse_policy, print_policy
from dmqfx.policy.policy import (
    FLOAT,
    Default,
    Expect,
    Operation,
    PartialSpec,
    Policy,
    Rule,
    Step,
    resolve,
)

HEAD = "schema: dmqfx.policy/1\n"
BODY = HEAD + "default: {weight: {bits: 4}, input: float}\npipeline: [canonicalize]\n"


def load_problems(source: Any, *overrides: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        Policy.load(source, overrides)
    return str(caught.value).splitlines()


# --- reading


def test_every_key_is_read() -> None:
    text = """\
schema: dmqfx.policy/1
name: mine
description: a try
default:
  weight: {bits: 4, grid: symmetric, per: channel, range: mse}
  input: {bits: 8, grid: affine, per: tensor, groups: [100, 2.5e2]}
rules:
- {name: ends, at: ["conv_in/*", "re:conv_out.*"], keep: float}
- {at: "**", kind: conv2d, fed_by: skip_concat, input: {bits: 6}, weight: float, optional: true}
pipeline: [canonicalize, {learn-scaling: {exponent: 5e-1, method: smoothquant, flags: [true, 2, x]}}]
expect: {sqnr_db: 12}
"""
    assert parse_policy(text) == Policy(
        name="mine",
        description="a try",
        default=Default(
            PartialSpec(4, "symmetric", "channel", "mse"),
            PartialSpec(8, "affine", "tensor", groups=(100.0, 250.0)),
        ),
        rules=(
            Rule("ends", ("conv_in/*", "re:conv_out.*"), weight=FLOAT, input=FLOAT),
            Rule("rule 2", ("**",), "conv2d", "skip_concat", FLOAT, PartialSpec(6), optional=True),
        ),
        pipeline=(
            Step("canonicalize"),
            Step("learn-scaling", (("exponent", 0.5), ("flags", (True, 2, "x")), ("method", "smoothquant"))),
        ),
        expect=Expect(12.0),
    )


def test_rules_and_steps_know_where_they_stand() -> None:
    policy = parse_policy(BODY + "rules:\n- {at: x, keep: float}\n", "p.yaml")
    assert (policy.rules[0].mark.file, policy.rules[0].mark.line, policy.rules[0].mark.column) == (
        "p.yaml",
        5,
        3,
    )
    assert (policy.pipeline[0].mark.line, policy.pipeline[0].mark.column) == (3, 12)


def test_a_rule_that_matches_nothing_is_reported_where_it_stands() -> None:
    policy = parse_policy(BODY + "rules:\n- {at: conv_im/*, keep: float}\n", "p.yaml")
    with pytest.raises(
        PolicyError, match=r"^p\.yaml:5:3: rule 'rule 1' matches no operation: .*conv_in/conv2d"
    ):
        resolve(policy, [Operation(Address("conv_in", "conv2d"), "conv2d")])


def test_the_name_is_by_default_the_name_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(BODY)
    assert Policy.load(tmp_path / "quick.yaml").name == "quick"


def test_anchors_are_read_like_what_they_stand_for() -> None:
    text = BODY + "rules:\n- {at: a, weight: &few {bits: 3}}\n- {at: b, weight: *few}\n"
    first, second = parse_policy(text).rules
    assert first.weight == second.weight == PartialSpec(3)


# --- sources


def plain() -> dict[str, object]:
    return {"default": {"weight": {"bits": 4}, "input": "float"}, "pipeline": ["canonicalize"]}


def test_a_dict_needs_no_schema_and_says_the_same_as_a_file() -> None:
    assert Policy.load(plain()) == replace(parse_policy(BODY), name="custom")
    assert Policy.load({**plain(), "schema": "dmqfx.policy/1", "name": "n"}).name == "n"


def test_a_dict_is_checked_like_a_file() -> None:
    weight = {"bits": 4.0, "grid": object(), "per": float("nan")}
    source = {"default": {"weight": weight, "input": "float"}, "pipeline": ("canonicalize",), 3: 4}
    assert [line.split(" at 0x")[0] for line in load_problems(source)] == [
        "<policy>:0:0: keys are text, not 3",
        "<policy>:0:0: default.weight.bits: expected a whole number from 2 to 8, got 4.0",
        "<policy>:0:0: default.weight.grid: expected symmetric or affine, got <object object",
        "<policy>:0:0: default.weight.per: expected tensor or channel, got nan, not a finite number",
    ]


def test_a_dict_inside_itself_is_refused() -> None:
    source = plain()
    source["default"] = {"weight": "float", "input": source}
    assert "<policy>:0:0: nested too deeply" in load_problems(source)


def test_a_policy_is_its_own_source() -> None:
    policy = Policy.load("w4a8-quick")
    assert Policy.load(policy) == policy
    assert Policy.load(policy, ["name=other"]) == replace(policy, name="other")


@pytest.mark.parametrize("name", shipped.names())
def test_a_shipped_policy_has_two_names(name: str) -> None:
    assert Policy.load(name) == Policy.load(f"{name}.yaml")
    assert Policy.load(name).name == name


def test_a_file_beside_you_beats_a_shipped_one_only_if_you_say_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w4a8.yaml").write_text(BODY)
    (tmp_path / "w4a6").mkdir()
    assert Policy.load("w4a8.yaml").default.input == FLOAT
    assert Policy.load("w4a8-quick").default.input != FLOAT
    assert Policy.load("w4a6-quick") != Policy.load("w4a8-quick")


def test_an_unknown_name_lists_what_is_shipped_and_the_nearest() -> None:
    assert load_problems("w4a9") == [
        "<policy>:0:0: there is no policy 'w4a9', neither as a file nor shipped: did you mean 'w4a8'? "
        "(legal: dmq-paper-w4a6, dmq-paper-w4a8, w4a16, w4a6, w4a6-quick, w4a8, w4a8-quick, w8a16, w8a8)"
    ]


@pytest.mark.parametrize("source", ["no/such.yaml", Path("w4a8"), "\0", "x" * 5000])
def test_a_file_that_is_not_there_is_a_policy_error(source: str | Path) -> None:
    assert "there is no policy" in load_problems(source)[0]


def test_yaml_text_is_not_a_source() -> None:
    assert load_problems(BODY) == [
        "<policy>:0:0: a policy is a shipped name, a path or a dict, not YAML text"
    ]


def test_a_file_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(BODY.encode() + "description: é".encode("latin-1"))
    assert load_problems(tmp_path / "latin.yaml") == [f"{tmp_path}/latin.yaml:4:1: not UTF-8 in this line"]


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "windows.yaml").write_bytes(b"\xef\xbb\xbf" + BODY.replace("\n", "\r\n").encode())
    assert Policy.load(tmp_path / "windows.yaml").default.input == FLOAT


# --- extends


def test_a_child_merges_the_default_appends_rules_and_replaces_the_pipeline(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(
        HEAD
        + "name: base\ndescription: of the base\n"
        + "default: {weight: {bits: 4, range: mse}, input: {bits: 8, groups: 20}}\n"
        + "rules: [{name: ends, at: conv_in/*, keep: float}, {at: a, keep: float}]\n"
        + "pipeline: [a, b]\nexpect: {sqnr_db: 12}\n"
    )
    (tmp_path / "sub" / "child.yaml").write_text(
        HEAD
        + "extends: ../base.yaml\ndefault: {weight: {bits: 3}, input: float}\nrules: [{at: b, keep: float}]\n"
    )
    (tmp_path / "sub" / "grandchild.yaml").write_text(
        HEAD + "extends: child.yaml\ndefault: {input: {bits: 6}}\npipeline: [c]\n"
    )
    child = Policy.load(tmp_path / "sub" / "child.yaml")
    assert (child.name, child.description) == ("child", "")
    assert child.default == Default(PartialSpec(3, range="mse"), FLOAT)
    assert [rule.name for rule in child.rules] == ["ends", "rule 2", "rule 3"]
    assert [step.name for step in child.pipeline] == ["a", "b"]
    assert child.expect == Expect(12.0)
    grandchild = Policy.load(os.fspath(tmp_path / "sub" / "grandchild.yaml"))
    assert grandchild.default.input == PartialSpec(6)
    assert grandchild.rules == child.rules
    assert grandchild.pipeline == (Step("c"),)


def test_a_dict_may_extend() -> None:
    policy = Policy.load({"extends": "w4a8-quick", "rules": [{"at": "x", "keep": "float"}]})
    assert len(policy.rules) == len(Policy.load("w4a8-quick").rules) + 1


def test_a_mistake_in_a_parent_is_reported_in_the_parent(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BODY.replace("bits: 4", "bits: 44"))
    (tmp_path / "child.yaml").write_text(HEAD + "extends: base.yaml\nrules: [{at: x}]\n")
    assert load_problems(tmp_path / "child.yaml") == [
        f"{tmp_path}/base.yaml:2:26: default.weight.bits: expected a whole number from 2 to 8, got 44",
        f"{tmp_path}/child.yaml:3:9: rules.rule 1 asks for nothing: say keep, weight or input",
    ]


def test_a_name_that_the_parent_has_is_taken(tmp_path: Path) -> None:
    (tmp_path / "child.yaml").write_text(
        HEAD + "extends: w4a8-quick\nrules: [{name: ends, at: x, keep: float}]\n"
    )
    found = load_problems(tmp_path / "child.yaml")
    assert len(found) == 1
    assert "child.yaml:3:9: rules.ends: the rule at dmqfx/policies/w4a8-quick.yaml:" in found[0]


def test_a_circle_of_parents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(HEAD + "extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text(HEAD + "extends: ./a.yaml\n")
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    assert load_problems(a) == [f"{b}:2:10: extends goes in a circle: {a} > {b} > {a}"]


# --- overrides


def test_overrides_reach_every_part_of_a_policy() -> None:
    policy = Policy.load(
        "w4a8-quick",
        [
            "default.weight.bits=3",
            "default.input.groups=[100, 500]",
            "rules.ends.at=conv_in/*",
            "rules.adaptive-norms.optional=false",
            "pipeline.learn-scaling.exponent=0.3",
            "pipeline.canonicalize.twice=true",
            "expect.sqnr_db=1e1",
            "name=mine",
        ],
    )
    assert policy.default.weight == PartialSpec(3, "symmetric", "channel", "mse")
    assert policy.default.input == PartialSpec(8, "affine", "tensor", "minmax", (100.0, 500.0))
    assert policy.rules[0].at == ("conv_in/*",)
    assert not policy.rules[2].optional
    assert Step("learn-scaling", (("exponent", 0.3), ("method", "smoothquant"))) in policy.pipeline
    assert Step("canonicalize", (("twice", True),)) in policy.pipeline
    assert policy.expect == Expect(10.0)
    assert policy.name == "mine"


def test_a_later_override_wins() -> None:
    assert Policy.load("w4a8-quick", ["default.weight.bits=3", "default.weight.bits=2"]).default.weight == (
        PartialSpec(2, "symmetric", "channel", "mse")
    )


def test_float_becomes_bits_and_bits_become_float() -> None:
    assert Policy.load("w8a16", ["default.input.bits=8"]).default.input == PartialSpec(8)
    assert Policy.load("w8a8", ["default.input=float"]).default.input == FLOAT


def test_an_override_of_one_setting_splits_keep_float() -> None:
    rule = Policy.load("w4a8-quick", ["rules.ends.weight.bits=8"]).rules[0]
    assert (rule.weight, rule.input) == (PartialSpec(8), FLOAT)
    again = Policy.load("w4a8-quick", ["rules.ends.weight.bits=8", "rules.ends.keep=float"]).rules[0]
    assert (again.weight, again.input) == (FLOAT, FLOAT)


def test_a_whole_key_can_be_replaced() -> None:
    assert Policy.load("w4a8-quick", ["pipeline=[canonicalize]", "rules=[]"]).rules == ()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("default.weight.bits=99", "21: default.weight.bits: expected a whole number from 2 to 8, got 99"),
        (
            "default.wieght.bits=3",
            "1: unknown key 'wieght' in default: did you mean 'weight'? (legal: input, weight)",
        ),
        ("defualt.weight.bits=3", "1: unknown key 'defualt': did you mean 'default'? "),
        ("rules.ens.keep=float", "1: there is no rule 'ens': did you mean 'ends'? "),
        ("rules.ends.kep=float", "1: unknown key 'kep' in rules.ends: did you mean 'keep'? "),
        ("rules.ends=float", "1: rules.ends: say which key of the rule, as in rules.ends.keep=float"),
        (
            "pipeline.learn-scalings.exponent=1",
            "1: there is no step 'learn-scalings': did you mean 'learn-scaling'?",
        ),
        (
            "pipeline.learn-scaling=1",
            "1: pipeline.learn-scaling: say which option, as in pipeline.learn-scaling.option=1",
        ),
        (
            "default.weight.bits",
            "1: expected something like default.weight.bits=4, got 'default.weight.bits'",
        ),
        ("default..bits=3", "1: expected something like default.weight.bits=4, got 'default..bits=3'"),
        ("default.weight.bits=", "21: default.weight.bits: expected a whole number from 2 to 8, got nothing"),
        ("default.weight.bits=[", "22: not YAML: expected the node content, but found '<stream end>'"),
        ("name.first=3", "1: name: expected text, got a mapping"),
        ("extends=w4a8", "1: extends is part of the file and cannot be overridden"),
        (
            "rules.time.optional=on",
            "21: rules.time.optional: expected true or false, got on, which YAML takes for true",
        ),
    ],
)
def test_a_wrong_override_is_told_with_its_number_and_place(override: str, expected: str) -> None:
    found = load_problems("w4a8-quick", "name=x", override)
    assert len(found) == 1
    assert found[0].startswith(f"--set:2:{expected}")


def test_a_step_that_runs_twice_cannot_be_meant_by_its_name() -> None:
    assert load_problems({**plain(), "pipeline": ["a", "a"]}, "pipeline.a.x=1") == [
        "--set:1:1: the step 'a' is in the pipeline 2 times; set pipeline as a whole"
    ]


def test_mistakes_of_the_file_and_of_the_overrides_are_reported_together() -> None:
    found = load_problems({**plain(), "nmae": "x"}, "default.weight.bits=1", "foo=1")
    assert [line.split(": ")[0] for line in found] == ["--set:1:21", "--set:2:1", "<policy>:0:0"]


# --- printing


@settings(max_examples=60)
@given(policies())
def test_printing_and_parsing_is_the_identity(policy: Policy) -> None:
    assert parse_policy(print_policy(policy)) == policy


@given(policies())
def test_a_policy_with_an_override_that_changes_nothing_is_the_same(policy: Policy) -> None:
    assert Policy.load(policy, ["name=x"]) == replace(policy, name="x")


def test_a_printed_policy_reads_like_one_written_by_hand() -> None:
    policy = Policy.load(
        {
            **plain(),
            "name": "1e3",
            "rules": [
                {"name": "ends", "at": ["conv_in/*", "**.x"], "keep": "float"},
                {"kind": "attention", "input": {"bits": 8}},
            ],
        },
        ["pipeline.canonicalize.twice=true", "expect.sqnr_db=12"],
    )
    assert (
        str(policy)
        == """\
schema: dmqfx.policy/1
name: '1e3'
default:
  weight: {bits: 4}
  input: float
rules:
- name: ends
  at: [conv_in/*, '**.x']
  keep: float
- name: rule 2
  kind: attention
  input: {bits: 8}
pipeline:
- canonicalize: {twice: true}
expect: {sqnr_db: 12.0}
"""
    )
