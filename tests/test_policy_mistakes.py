"""Every mistake of a policy file is told with its place and the nearest legal word, all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmqfx import policies as shipped
from dmqfx.errors import PolicyError, Problem
from dmqfx.graph import registry
from dmqfx.policy.file import parse_policy
from dmqfx.policy.mark import Mark
from dmqfx.policy.policy import Policy, Rule

HEAD = "schema: dmqfx.policy/1\n"
BODY = HEAD + "default: {weight: {bits: 4}, input: float}\npipeline: [canonicalize]\n"


def problems(text: str, **more: Any) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml", **more)
    return str(caught.value).splitlines()


MISTAKES = {
    "a misspelt key": (
        BODY + "expext: {sqnr_db: 3}",
        "4:1: unknown key 'expext': did you mean 'expect'? "
        "(legal: default, description, expect, extends, name, pipeline, rules, schema)",
    ),
    "a misspelt key inside": (
        HEAD + "default: {wieght: {bits: 4}, weight: float, input: float}\npipeline: [a]",
        "2:11: unknown key 'wieght' in default: did you mean 'weight'? (legal: input, weight)",
    ),
    "bits in quotes": (
        HEAD + 'default: {weight: {bits: "8"}, input: float}\npipeline: [a]',
        "2:26: default.weight.bits: expected a whole number from 2 to 8, "
        "got the text '8' (remove the quotes)",
    ),
    "too many weight bits": (
        HEAD + "default: {weight: {bits: 16}, input: float}\npipeline: [a]",
        "2:26: default.weight.bits: expected a whole number from 2 to 8, got 16",
    ),
    "too few input bits": (
        HEAD + "default:\n  weight: float\n  input: {bits: 3}\npipeline: [a]",
        "4:17: default.input.bits: expected a whole number from 4 to 8, got 3",
    ),
    "half a bit": (
        HEAD + "default: {weight: {bits: 4.0}, input: float}\npipeline: [a]",
        "2:26: default.weight.bits: expected a whole number from 2 to 8, got 4.0",
    ),
    "truth for bits": (
        HEAD + "default: {weight: {bits: true}, input: float}\npipeline: [a]",
        "2:26: default.weight.bits: expected a whole number from 2 to 8, got true",
    ),
    "an octal number": (
        HEAD + "default: {weight: {bits: 010}, input: float}\npipeline: [a]",
        "2:26: default.weight.bits: expected a whole number from 2 to 8, "
        "got 010, not a decimal number: other notations are not read",
    ),
    "bits left empty": (
        HEAD + "default: {weight: {bits: }, input: float}\npipeline: [a]",
        "2:25: default.weight.bits: expected a whole number from 2 to 8, got nothing",
    ),
    "no bits": (
        HEAD + "default: {weight: {grid: affine}, input: float}\npipeline: [a]",
        "2:19: default.weight.bits is missing",
    ),
    "an unknown word": (
        HEAD + "default: {weight: {bits: 4, range: mes}, input: float}\npipeline: [a]",
        "2:36: default.weight.range: unknown word 'mes': did you mean 'mse'? (legal: minmax, mse)",
    ),
    "another tool's word": (
        HEAD + "default: {weight: {bits: 4, grid: asymmetric}, input: float}\npipeline: [a]",
        "2:35: default.weight.grid: unknown word 'asymmetric': did you mean 'affine'? "
        "(legal: affine, symmetric)",
    ),
    "off for float": (
        HEAD + "default: {weight: {bits: 4}, input: off}\npipeline: [a]",
        "2:37: default.input: expected float or a mapping with keys among bits, grid, per, range, groups, "
        "got off, which YAML takes for true or false",
    ),
    "a misspelt float": (
        HEAD + "default: {weight: {bits: 4}, input: flaot}\npipeline: [a]",
        "2:37: default.input: unknown word 'flaot': did you mean 'float'? (legal: float)",
    ),
    "groups of a weight": (
        HEAD + "default: {weight: {bits: 4, groups: 2}, input: float}\npipeline: [a]",
        "2:29: default.weight.groups: only inputs have timestep groups, a weight is the same always",
    ),
    "no groups": (
        HEAD + "default: {weight: float, input: {bits: 8, groups: 0}}\npipeline: [a]",
        "2:51: default.input.groups: expected a whole number from 1 to 1000, got 0",
    ),
    "boundaries that do not ascend": (
        HEAD + "default: {weight: float, input: {bits: 8, groups: [100, 300, 200]}}\npipeline: [a]",
        "2:62: default.input.groups: boundaries must ascend, but 200 follows 300",
    ),
    "boundaries that repeat": (
        HEAD + "default: {weight: float, input: {bits: 8, groups: [100, 100]}}\npipeline: [a]",
        "2:57: default.input.groups: boundaries must ascend, but 100 follows 100",
    ),
    "a boundary below every timestep": (
        HEAD + "default: {weight: float, input: {bits: 8, groups: [-5, 100]}}\npipeline: [a]",
        "2:52: default.input.groups: timesteps are 0 or more, so no call lies below -5 (leave it out)",
    ),
    "an infinite boundary": (
        HEAD + "default: {weight: float, input: {bits: 8, groups: [100, .inf]}}\npipeline: [a]",
        "2:57: default.input.groups: expected a number, got .inf, not a finite decimal number",
    ),
    "half a default": (
        HEAD + "default: {weight: {bits: 4}}\npipeline: [a]",
        "2:10: default.input is missing: say float, or bits",
    ),
    "no default": (
        HEAD + "pipeline: [a]",
        "1:1: default is missing: give it here or extend a policy that does",
    ),
    "no pipeline": (
        HEAD + "default: {weight: float, input: float}",
        "1:1: pipeline is missing: give it here or extend a policy that does",
    ),
    "an empty pipeline": (
        HEAD + "default: {weight: float, input: float}\npipeline: []",
        "3:11: pipeline: expected a list with at least one entry, got an empty list",
    ),
    "two steps in one": (
        HEAD + "default: {weight: float, input: float}\npipeline:\n- {a: {}, b: {}}",
        "4:3: pipeline: a step is a name, or one name with its options as in {name: {option: 1}}",
    ),
    "options that are none": (
        HEAD + "default: {weight: float, input: float}\npipeline:\n- learn-scaling: 0.5",
        "4:18: pipeline.learn-scaling: options are a mapping such as {option: 1}",
    ),
    "a nested option": (
        HEAD + "default: {weight: float, input: float}\npipeline:\n- a: {x: {y: 1}}",
        "4:10: pipeline.a.x: an option is a number, a word, true, false or a flat list of these, not nested",
    ),
    "no schema": (
        "default: {weight: float, input: float}\npipeline: [a]",
        "1:1: schema is missing: begin with `schema: dmqfx.policy/1`",
    ),
    "a newer schema": (
        "schema: dmqfx.policy/2\ndefault: {weight: float, input: float}\npipeline: [a]",
        "1:9: schema: unknown word 'dmqfx.policy/2': did you mean 'dmqfx.policy/1'? (legal: dmqfx.policy/1)",
    ),
    "a name that YAML takes for truth": (
        BODY + "name: on",
        "4:7: name: expected text, got on, which YAML takes for true or false (put it in quotes)",
    ),
    "a description that is a number": (
        BODY + "description: 8",
        "4:14: description: expected text, got 8 (put it in quotes)",
    ),
    "an unknown gate": (
        BODY + "expect: {sqnr: 3}",
        "4:10: unknown key 'sqnr' in expect: did you mean 'sqnr_db'? (legal: sqnr_db)",
    ),
    "a gate without a number": (
        BODY + "expect: {sqnr_db: high}",
        "4:19: expect.sqnr_db: expected a number, got the text 'high'",
    ),
    "rules that are no list": (
        BODY + "rules: {at: x, keep: float}",
        "4:8: rules: expected a list with at least one entry, got a mapping",
    ),
    "bits of a rule one level too high": (
        BODY + "rules:\n- {at: x, weight: float, bits: 4}",
        "5:26: rules.rule 1: 'bits' belongs inside weight or input",
    ),
    "another tool's key": (
        BODY + "rules:\n- {kind: conv2d, pattern: x, keep: float}",
        "5:18: unknown key 'pattern' in rules.rule 1: did you mean 'at'? "
        "(legal: at, fed_by, input, keep, kind, name, optional, weight)",
    ),
    "a rule that keeps something else": (
        BODY + "rules:\n- {at: x, keep: fp16}",
        "5:17: rules.rule 1.keep: unknown word 'fp16': did you mean 'float'? (legal: float)",
    ),
    "a rule that says it twice": (
        BODY + "rules:\n- {at: x, keep: float, weight: {bits: 4}}",
        "5:24: rules.rule 1: keep: float decides about weight already",
    ),
    "a rule that selects nothing": (
        BODY + "rules:\n- {keep: float}",
        '5:3: rules.rule 1 selects nothing: say at, kind or fed_by (at: "**" is everything)',
    ),
    "a rule that asks for nothing": (
        BODY + "rules:\n- {at: x}",
        "5:3: rules.rule 1 asks for nothing: say keep, weight or input",
    ),
    "a rule without bits over a float default": (
        BODY + "rules:\n- {at: x, input: {grid: affine}}",
        "5:18: rules.rule 1.input.bits is missing, and default.input has none to take over",
    ),
    "an unknown kind": (
        BODY + "rules:\n- {kind: sdpa, input: {bits: 8}}",
        "5:10: rules.rule 1.kind: unknown word 'sdpa': did you mean 'attention'? "
        "(legal: attention, conv2d, linear, softmax)",
    ),
    "an unknown feeder": (
        BODY + "rules:\n- {fed_by: skip, input: {bits: 8}}",
        "5:12: rules.rule 1.fed_by: unknown word 'skip': did you mean 'skip_concat'? (legal: skip_concat)",
    ),
    "weights of attention": (
        BODY + "rules:\n- {kind: attention, weight: {bits: 8}}",
        "5:21: rules.rule 1: attention has no weight, only inputs",
    ),
    "weights of a softmax": (
        BODY + "rules:\n- {kind: softmax, weight: {bits: 8}}",
        "5:19: rules.rule 1: softmax has no weight, only inputs",
    ),
    "a kind that others call otherwise": (
        BODY + "rules:\n- {kind: attention_probs, input: {bits: 8}}",
        "5:10: rules.rule 1.kind: unknown word 'attention_probs': did you mean 'softmax'? "
        "(legal: attention, conv2d, linear, softmax)",
    ),
    "a glob with brackets": (
        BODY + 'rules:\n- {at: ["a", "conv[12]"], keep: float}',
        "5:14: rules.rule 1.at: '[' in 'conv[12]' fits no address: a glob knows *, ** and ?, "
        "all else needs a regular expression that starts with 're:'",
    ),
    "a broken regular expression": (
        BODY + 'rules:\n- {at: "re:a(", keep: float}',
        "5:8: rules.rule 1.at: 're:a(' is not a regular expression: "
        "missing ), unterminated subpattern at position 1",
    ),
    "a glob that YAML reads as an alias": (
        BODY + "rules:\n- {at: **, keep: float}",
        "5:9: not YAML: expected alphabetic or numeric character, but found '*' "
        "(put a glob that begins with * in quotes)",
    ),
    "on for true": (
        BODY + "rules:\n- {at: x, keep: float, optional: on}",
        "5:34: rules.rule 1.optional: expected true or false, got on, which YAML takes for true or false",
    ),
    "a name with a dot": (
        BODY + "rules:\n- {name: a.b, at: x, keep: float}",
        "5:10: a rule's name has letters, digits, '_', '-' and spaces only, not 'a.b'",
    ),
    "a name twice": (
        BODY + "rules:\n- {name: a, at: x, keep: float}\n- {name: a, at: y, keep: float}",
        "6:3: rules.a: the rule at p.yaml:5 has this name already",
    ),
    "a rule that is a word": (
        BODY + "rules:\n- conv_in/*",
        "5:3: rules.rule 1: expected a mapping with keys among "
        "name, at, kind, fed_by, keep, weight, input, optional, got the text 'conv_in/*'",
    ),
    "a key twice": (BODY + "rules: []\npipeline: [b]", "5:1: key 'pipeline' is already given in line 3"),
    "a key that is a list": (BODY + "[a]: 3", "4:1: a key must be a single word"),
    "a tag": (BODY + "name: !mine x", "4:7: tags such as '!mine' are not read"),
    "an empty file": (
        "",
        "1:1: a policy: expected a mapping with keys among "
        "schema, name, default, rules, pipeline, got nothing",
    ),
    "a list": (
        "- a",
        "1:1: a policy: expected a mapping with keys among "
        "schema, name, default, rules, pipeline, got a list",
    ),
    "an open bracket": (
        HEAD + "pipeline: [a, b",
        "2:16: not YAML: expected ',' or ']', but got '<stream end>'",
    ),
    "a tab": (
        HEAD + "default:\n\tweight: float",
        "3:1: not YAML: found character '\\t' that cannot start any token",
    ),
    "two documents": (
        BODY + "---\na: b",
        "4:1: not YAML: expected a single document in the stream, but found another document",
    ),
    "a control character": (HEAD + "name: a\x07", "2:8: not YAML: the character U+0007 must be escaped"),
    "endless brackets": (BODY + "name: " + "[" * 40 + "]" * 40, "4:23: nested too deeply"),
    "more brackets than Python can follow": (HEAD + "name: " + "[" * 600, "1:1: nested too deeply"),
    "a list inside itself": (BODY + "name: &a [*a]", "4:7: nested too deeply"),
    "a missing parent": (
        HEAD + "extends: w8a4",
        "2:10: there is no policy 'w8a4', neither as a file nor shipped: did you mean 'w8a8'? "
        "(legal: dmq-paper-w4a6, dmq-paper-w4a8, w4a16, w4a6, w4a6-quick, w4a8, w4a8-quick, w8a16, w8a8)",
    ),
    "a parent that is a list": (HEAD + "extends: [w8a8]", "2:10: extends: expected text, got a list"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_place_and_the_nearest_legal_word(mistake: str) -> None:
    text, expected = MISTAKES[mistake]
    found = problems(text)
    assert f"p.yaml:{expected}" in found
    assert len(found) == (2 if "nested too deeply" in expected and "Python" not in mistake else 1)


def test_all_mistakes_of_a_file_are_reported_at_once_in_their_order() -> None:
    text = """\
schema: dmqfx.policy/1
nmae: x
default:
  weight: {bits: "4", grid: sym}
  input: {bits: 9}
rules:
- {name: ends, at: "conv[1]", keep: flot}
- {name: ends, optional: on}
pipeline: [4]
default: 3
"""
    assert [line.split(": ")[0] for line in problems(text)] == [
        "p.yaml:2:1",  # nmae
        "p.yaml:4:18",  # bits
        "p.yaml:4:29",  # grid
        "p.yaml:5:17",  # bits
        "p.yaml:7:20",  # at
        "p.yaml:7:37",  # keep
        "p.yaml:8:3",  # the name again
        "p.yaml:8:3",  # selects nothing
        "p.yaml:8:3",  # asks for nothing
        "p.yaml:8:26",  # optional
        "p.yaml:9:12",  # step
        "p.yaml:10:1",  # default again
    ]


def test_an_expression_that_begins_with_a_star_must_be_quoted() -> None:
    assert "put a glob that begins with * in quotes" in problems(BODY + "rules: [{at: *x, keep: float}]")[0]


# --- what a step means is for others to say


def only_canonicalize(name: str, options: Mapping[str, object]) -> Mapping[str, str]:
    if name != "canonicalize":
        return {"": f"there is no pass {name!r}"}
    return {option: f"canonicalize has no option {option!r}" for option in options}


def test_the_check_of_steps_is_told_names_and_options_and_its_words_are_reported_with_the_place() -> None:
    text = (
        HEAD
        + "default: {weight: float, input: float}\n"
        + "pipeline:\n- canonicalize\n- x\n- canonicalize: {fast: true, slow: 1}\n"
    )
    assert problems(text, check_step=only_canonicalize) == [
        "p.yaml:5:3: there is no pass 'x'",
        "p.yaml:6:18: canonicalize has no option 'fast'",
        "p.yaml:6:30: canonicalize has no option 'slow'",
    ]


def test_every_wrong_option_of_a_real_pass_is_told_at_once_where_it_stands() -> None:
    step = "{learn-scaling: {exponent: 7, metod: x, method: smooth}}"
    assert problems(
        f"{HEAD}extends: w4a8-quick\npipeline: [{step}]\n", check_step=registry.problems_with
    ) == [
        "p.yaml:3:29: learn-scaling: exponent must be between 0 and 1, not 7",
        "p.yaml:3:42: learn-scaling has no option 'metod'; did you mean 'method'? (legal: batch, exponent, groups,"
        " iterations, method, rate, rows, start, strength, weighting, weights)",
        "p.yaml:3:52: learn-scaling: option method must be one of smoothquant, surrogate, les, not 'smooth'",
    ]


@pytest.mark.parametrize("source", [["w4a8"], 5, None])
def test_what_is_no_policy_at_all_is_told_what_is(source: object) -> None:
    with pytest.raises(PolicyError, match="a policy is a shipped name, a path, a dict or a Policy, not "):
        Policy.load(source)  # type: ignore[arg-type]  # that is the mistake


def test_a_step_that_an_override_changed_is_reported_there() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.load(
            {"default": {"weight": "float", "input": "float"}, "pipeline": ["canonicalize"]},
            ["pipeline.canonicalize.fast=1"],
            check_step=only_canonicalize,
        )
    assert str(caught.value) == "--set:1:1: canonicalize has no option 'fast'"


def place_of(found: Rule | Problem) -> Mark | Problem:
    return found.mark if isinstance(found, Rule) else found


@settings(max_examples=40)
@given(st.data())
def test_a_damaged_file_is_a_policy_or_a_policy_error(data: st.DataObject) -> None:
    text = shipped.text(data.draw(st.sampled_from(["w4a6", "w8a16"])))
    for _ in range(data.draw(st.integers(1, 3))):
        at, gone = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 3))
        piece = data.draw(
            st.sampled_from([*"{}[]:,-*&!|>'\"#%@`\n\t? 0~", "on", "<<", "- ", "!!", "\x85", "\x00"])
        )
        text = text[:at] + piece + text[at + gone :]
    try:
        found: Sequence[Rule | Problem] = parse_policy(text).rules
    except PolicyError as error:
        found = error.problems
    assert all(place.line > 0 and place.column > 0 for place in map(place_of, found))
