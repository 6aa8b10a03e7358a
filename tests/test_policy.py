"""What a policy gives every site: globs, the last match, the default, and rules that decide nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies_policy import PARTS, globs, operations, policies

from dmqfx.errors import PolicyError
from dmqfx.globs import matcher
from dmqfx.graph.address import Address, Site
from dmqfx.graph.table import Planned
from dmqfx.numbers.quant import QuantSpec
from dmqfx.policy.policy import (
    FLOAT,
    KIND_OF_OPERATOR,
    OPERANDS,
    Default,
    Kind,
    Operation,
    PartialSpec,
    Policy,
    Rule,
    Step,
    explain,
    resolve,
)

DEFAULT = Default(PartialSpec(4, range="mse"), PartialSpec(8, groups=2))
ADDRESSES = (
    "conv_in/conv2d",
    "time_embedding.linear_1/linear",
    "down_blocks.0.resnets.0.conv1/conv2d",
    "down_blocks.0.resnets.0.time_emb_proj/linear",
    "mid_block.attentions.0.to_q/linear",
    "mid_block.attentions.0/scaled_dot_product_attention",
    "up_blocks.0.resnets.0.conv_shortcut/conv2d",
)


def operation(address: str) -> Operation:
    at = Address.parse(address)
    return Operation(at, KIND_OF_OPERATOR[at.op], fed_by_skip="conv_shortcut" in address)


OPERATIONS = [operation(address) for address in ADDRESSES]


def policy(*rules: Rule, default: Default = DEFAULT) -> Policy:
    return Policy("test", default, (Step("canonicalize"),), rules)


def spec(site: str, *rules: Rule, default: Default = DEFAULT) -> QuantSpec | None:
    return resolve(policy(*rules, default=default), OPERATIONS)[Site.parse(site)].spec


# --- globs


def naive_match(glob: str, text: str, ends: str = "./") -> bool:
    """By trying every length for every star, one character after the other."""
    if not glob:
        return not text
    if glob.startswith("**"):
        return any(naive_match(glob[2:], text[n:], ends) for n in range(len(text) + 1))
    if glob[0] == "*":
        inside = next((n for n, letter in enumerate(text) if letter in ends), len(text))
        return any(naive_match(glob[1:], text[n:], ends) for n in range(inside + 1))
    if not text:
        return False
    fits = text[0] not in ends if glob[0] == "?" else text[0] == glob[0]
    return fits and naive_match(glob[1:], text[1:], "/" if glob[0] == "/" else ends)


@settings(max_examples=100)
@given(globs(), operations())
@example("conv*", [operation("conv_in/conv2d")])
@example("**conv2d", [operation("conv_in/conv2d")])
def test_a_glob_matches_what_a_naive_matcher_matches(glob: str, found: list[Operation]) -> None:
    for each in found:
        assert matcher(glob)(str(each.address)) == naive_match(glob, str(each.address))


@settings(max_examples=100)
@given(st.data())
def test_a_glob_made_from_an_address_matches_it(data: st.DataObject) -> None:
    """Random globs seldom match anything: this one always does, until a star is where only two will do."""
    path = data.draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4))
    starred = [data.draw(st.sampled_from([part, "*", "?*", part[:1] + "*"])) for part in path]
    assert matcher(".".join(starred) + "/*")(".".join(path) + "/conv2d")
    assert matcher("**/conv2d")(".".join(path) + "/conv2d")
    assert matcher("*/conv2d")(".".join(path) + "/conv2d") == (len(path) == 1)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("conv_in/*", ["conv_in/conv2d"]),
        ("time_embedding.**", ["time_embedding.linear_1/linear"]),
        ("**.time_emb_proj/*", ["down_blocks.0.resnets.0.time_emb_proj/linear"]),
        ("conv_in", []),
        ("*", []),
        ("down_blocks.*/*", []),
        ("re:.*conv(1|_in)/conv2d", ["conv_in/conv2d", "down_blocks.0.resnets.0.conv1/conv2d"]),
        ("re:conv", []),
    ],
)
def test_a_pattern_matches_whole_addresses(pattern: str, matches: list[str]) -> None:
    assert [address for address in ADDRESSES if matcher(pattern)(address)] == matches


def test_an_operation_that_a_pass_made_is_matched_like_others_of_its_layer() -> None:
    made = str(Address("conv_in", "conv2d", 0, "split-concat.1"))
    assert made == "conv_in/conv2d~split-concat.1"
    assert matcher("conv_in/*")(made)
    assert not matcher("*.1")(made)
    assert not matcher("conv_in.*")(made)


@pytest.mark.parametrize("pattern", ["", "re:", "re:(", "conv[12]", "{a,b}", "conv in", "a|b", "!x"])
def test_what_is_neither_glob_nor_expression_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"regular expression|empty glob"):
        matcher(pattern)
    with pytest.raises(PolicyError, match="rule 'bad'"):
        resolve(policy(Rule("bad", (pattern,), weight=FLOAT)), OPERATIONS)


# --- who decides


def oracle(policy: Policy, each: Operation, arg: str) -> tuple[dict[str, object] | None, str, list[str]]:
    """Rule by rule: what the winner gives (None is float), its name, and the losers."""
    key = "weight" if arg == "weight" else "input"
    base = getattr(policy.default, key)
    mine = "softmax" if arg == "softmax" else each.kind
    got, rule_name, losers = (FLOAT if mine in ("attention", "softmax") else base), "default", []
    for rule in policy.rules:
        said = getattr(rule, key)
        at = not rule.at or any(naive_match(glob, str(each.address)) for glob in rule.at)
        kind = rule.kind is None or rule.kind == mine
        fed = rule.fed_by is None or each.fed_by_skip
        if not (at and kind and fed) or said is None:
            continue
        if mine in ("attention", "softmax") and rule.kind is None and said != FLOAT:
            continue
        if rule_name != "default":
            losers.append(rule_name)
        got, rule_name = said, rule.name
    if got == FLOAT:
        return None, rule_name, losers
    values = {}
    for name in ("bits", "grid", "per", "range"):
        fallback = {"grid": "affine", "per": "tensor", "range": "minmax"}
        if key == "weight":
            fallback = {"grid": "symmetric", "per": "channel", "range": "minmax"}
        values[name] = getattr(got, name) or getattr(base, name, None) or fallback[name]
    return values, rule_name, losers


@settings(max_examples=50)
@given(policies(globs() | st.sampled_from(["**", "**", "*/*", "**conv2d", "conv_in**"])), operations())
def test_the_last_rule_that_speaks_of_an_argument_decides(drawn: Policy, found: list[Operation]) -> None:
    drawn = replace(drawn, rules=tuple(replace(rule, optional=True) for rule in drawn.rules))
    explained = explain(drawn, found)
    assert [each.site for each in explained] == [
        Site(op.address, arg) for op in found for arg in OPERANDS[op.address.op]
    ]
    for each in explained:
        op = next(op for op in found if op.address == each.site.at)
        values, rule, losers = oracle(drawn, op, each.site.arg)
        assert (each.rule, list(each.overridden)) == (rule, losers)
        assert (each.spec is None) == (values is None)
        for name, value in (values or {}).items():
            assert getattr(each.spec, name) == value


@given(policies(), operations())
def test_resolve_and_explain_agree(drawn: Policy, found: list[Operation]) -> None:
    def outcome(function: Callable[[Policy, list[Operation]], object]) -> object:
        try:
            return function(drawn, found)
        except PolicyError as error:
            return error.problems

    explained = outcome(explain)
    if isinstance(explained, list):
        explained = {each.site: Planned(each.spec, each.rule) for each in explained}
    assert outcome(resolve) == explained


def test_a_rule_changes_only_what_it_says() -> None:
    fine = Rule("fine", ("**.conv1/*",), input=PartialSpec(bits=6))
    assert spec("down_blocks.0.resnets.0.conv1/conv2d:input", fine) == QuantSpec(6, boundaries=(500.0,))
    weight = spec("down_blocks.0.resnets.0.conv1/conv2d:weight", fine)
    assert weight == QuantSpec(4, "symmetric", "channel", "mse")


def test_a_rule_takes_nothing_over_from_the_rules_before_it() -> None:
    first = Rule("first", ("conv_in/*",), weight=PartialSpec(bits=8, range="minmax"))
    second = Rule("second", ("conv_in/*",), weight=PartialSpec(per="tensor"))
    assert spec("conv_in/conv2d:weight", first, second) == QuantSpec(4, "symmetric", "tensor", "mse")


def test_weight_and_input_of_one_operation_may_be_decided_by_different_rules() -> None:
    both = Rule("both", ("conv_in/*",), weight=FLOAT, input=FLOAT)
    weight = Rule("weight", ("**",), kind="conv2d", weight=PartialSpec(8))
    found = {each.site: each for each in explain(policy(both, weight), OPERATIONS)}
    assert found[Site.parse("conv_in/conv2d:input")].rule == "both"
    decided = found[Site.parse("conv_in/conv2d:weight")]
    assert (decided.rule, decided.overridden) == ("weight", ("both",))


def test_an_empty_setting_gives_back_what_an_earlier_rule_kept_float() -> None:
    off = Rule("off", ("**",), weight=FLOAT, input=FLOAT)
    on = Rule("on", ("conv_in/*",), weight=PartialSpec())
    assert spec("conv_in/conv2d:weight", off, on) == QuantSpec(4, "symmetric", "channel", "mse")


def test_a_weight_has_no_timestep_groups() -> None:
    grouped = Default(PartialSpec(4, groups=5), PartialSpec(8, groups=5))
    assert spec("conv_in/conv2d:weight", default=grouped) == QuantSpec(4, "symmetric", "channel")


def test_fed_by_selects_what_reads_a_skip_concatenation() -> None:
    rule = Rule("skips", fed_by="skip_concat", input=PartialSpec(per="channel"))
    by_rule = [str(each.site) for each in explain(policy(rule), OPERATIONS) if each.rule == "skips"]
    assert by_rule == ["up_blocks.0.resnets.0.conv_shortcut/conv2d:input"]


# --- attention


QUERY = "mid_block.attentions.0/scaled_dot_product_attention:query"


def test_attention_has_three_operands_and_they_are_float() -> None:
    found = [each for each in explain(policy(), OPERATIONS) if each.site.at.op.startswith("scaled")]
    assert [(each.site.arg, each.spec, each.rule) for each in found] == [
        ("query", None, "default"),
        ("key", None, "default"),
        ("value", None, "default"),
    ]


def test_a_rule_for_everything_does_not_quantize_attention() -> None:
    assert spec(QUERY, Rule("all", ("**",), input=PartialSpec(8))) is None


def test_a_rule_of_kind_attention_quantizes_its_operands_on_top_of_the_default() -> None:
    rule = Rule("products", kind="attention", input=PartialSpec(grid="symmetric"))
    assert spec(QUERY, rule) == QuantSpec(8, "symmetric", boundaries=(500.0,))


def test_a_later_rule_for_everything_can_keep_attention_float() -> None:
    products = Rule("products", kind="attention", input=PartialSpec(8))
    keep = Rule("mid", ("mid_block.**",), weight=FLOAT, input=FLOAT)
    assert spec(QUERY, products, keep) is None


SPLIT = [operation(f"mid/{op}~split-attention.1") for op in ("attention_softmax", "attention_average")]


@pytest.mark.parametrize(
    ("kind", "quantized"), [("softmax", ["softmax"]), ("attention", ["query", "key", "value"])]
)
def test_a_softmax_has_a_kind_of_its_own_and_attention_is_all_but_it(
    kind: Kind, quantized: list[str]
) -> None:
    planned = resolve(policy(Rule("one", kind=kind, input=PartialSpec(8))), SPLIT)
    assert [site.arg for site in planned] == ["query", "key", "softmax", "value"]
    assert [site.arg for site, plan in planned.items() if plan.spec is not None] == quantized
    back = policy(
        Rule("one", kind=kind, input=PartialSpec(8)), Rule("all", ("**",), weight=FLOAT, input=FLOAT)
    )
    assert {plan.rule for plan in resolve(back, SPLIT).values()} == {"all"}


def test_a_rule_about_a_softmax_that_is_not_there_names_the_step_that_makes_it() -> None:
    rule = Rule("s", ("mid_block.**",), kind="softmax", input=PartialSpec(8))
    assert "a softmax can be seen once the step split-attention has run" in idle(rule)[0]


# --- timestep groups


@pytest.mark.parametrize(
    ("groups", "steps", "boundaries"),
    [
        (1, 1000, ()),
        (None, 1000, ()),
        (4, 1000, (250.0, 500.0, 750.0)),
        (2, 50, (25.0,)),
        (3, 100, (100 / 3, 200 / 3)),
        ((10.0, 900.0), 50, (10.0, 900.0)),
    ],
)
def test_groups_become_boundaries(
    groups: int | tuple[float, ...] | None, steps: int, boundaries: tuple[float, ...]
) -> None:
    default = Default(FLOAT, PartialSpec(8, groups=groups))
    planned = resolve(policy(default=default), OPERATIONS[:1], train_timesteps=steps)
    found = planned[Site.parse("conv_in/conv2d:input")].spec
    assert found is not None
    assert found.boundaries == pytest.approx(boundaries)


@given(st.integers(1, 40), st.integers(1, 2000))
def test_uniform_groups_are_equal_and_leave_none_out(groups: int, steps: int) -> None:
    edges = (0.0, *PartialSpec(groups=groups).boundaries(steps), float(steps))
    widths = [after - before for before, after in pairwise(edges)]
    assert len(widths) == groups
    assert min(widths) == pytest.approx(max(widths))


# --- rules that decide nothing


def idle(*rules: Rule) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        resolve(policy(*rules), OPERATIONS)
    return [problem.message for problem in caught.value.problems]


def test_a_rule_that_matches_nothing_names_the_three_nearest_addresses() -> None:
    assert idle(Rule("time", ("time_embeding.**",), weight=FLOAT)) == [
        "rule 'time' matches no operation: the nearest are time_embedding.linear_1/linear, "
        "down_blocks.0.resnets.0.time_emb_proj/linear, conv_in/conv2d; "
        "`optional: true` allows that"
    ]


def test_a_module_name_without_its_operator_is_led_to_the_address() -> None:
    assert "the nearest are conv_in/conv2d, " in idle(Rule("first", ("conv_in",), weight=FLOAT))[0]


def test_every_rule_that_matches_nothing_is_reported_at_once() -> None:
    rules = (
        Rule("a", ("nowhere",), weight=FLOAT),
        Rule("b", ("**",), weight=FLOAT),
        Rule("c", ("re:x+",), weight=FLOAT),
    )
    assert [message[:8] for message in idle(*rules)] == ["rule 'a'", "rule 'c'"]


def test_a_rule_that_finds_the_address_and_not_the_kind_says_so() -> None:
    assert idle(Rule("q", ("**.to_q/*",), kind="conv2d", weight=FLOAT)) == [
        "rule 'q' matches no operation: none of the 1 at its addresses is kind: conv2d; "
        "`optional: true` allows that"
    ]


def test_a_rule_for_skips_that_finds_none_names_the_step_that_flags_them() -> None:
    message = idle(Rule("s", ("conv_in/*",), fed_by="skip_concat", weight=FLOAT))[0]
    assert "fed_by is known once the step flag-skips has run" in message


def test_a_rule_that_matches_only_attention_and_does_not_mean_it_is_idle() -> None:
    assert idle(Rule("p", ("**/scaled*",), input=PartialSpec(8))) == [
        "rule 'p' matches only attention, which it says nothing about: "
        "say `kind: attention` to quantize its operands; `optional: true` allows that"
    ]
    assert "attention has no weight" in idle(Rule("p", ("**/scaled*",), weight=PartialSpec(8)))[0]


def test_an_optional_rule_may_match_nothing() -> None:
    rules = (Rule("a", ("nowhere",), weight=FLOAT, optional=True), Rule("b", kind="linear", weight=FLOAT))
    assert resolve(policy(*rules), OPERATIONS) == resolve(policy(rules[1]), OPERATIONS)


def test_no_operation_at_all_leaves_a_rule_without_neighbours() -> None:
    with pytest.raises(PolicyError, match="there is none to choose from"):
        resolve(policy(Rule("a", ("x",), weight=FLOAT)), [])


def test_a_policy_built_without_bits_is_refused_when_it_is_resolved() -> None:
    with pytest.raises(PolicyError, match="default: weight has no bits"):
        resolve(policy(default=Default(PartialSpec(), FLOAT)), OPERATIONS)


# --- values


def test_a_policy_can_be_copied_pickled_and_hashed() -> None:
    original = policy(Rule("a", ("x",), weight=FLOAT))
    assert copy.deepcopy(original) == original
    assert pickle.loads(pickle.dumps(original)) == original
    assert len({original, copy.deepcopy(original)}) == 1


def test_a_policy_is_frozen() -> None:
    with pytest.raises(AttributeError):
        policy().name = "other"  # type: ignore[misc]  # the point of the test
