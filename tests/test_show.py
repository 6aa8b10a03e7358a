"""Programs as text: exact words, because people compare, grep and quote them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import unconditional
from tiny import IN, OUT, changed, plain, planned, quantized
from toys import toy

from dmqfx.errors import DmqfxError, PolicyError
from dmqfx.graph import registry
from dmqfx.graph.address import Address, Site
from dmqfx.graph.journal import Application, PassRecord, Refusal
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Planned, Range
from dmqfx.policy.policy import Policy
from dmqfx.runtime.targets import Target
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.seeing.explain import explain, explanations
from dmqfx.seeing.picture import picture
from dmqfx.seeing.selection import AddressError
from dmqfx.seeing.show import diff, show, why
from dmqfx.seeing.why import _spans


def test_show_prints_a_line_for_each_operation_with_arguments_by_name() -> None:
    assert show(plain()).splitlines() == [
        "conv_in/conv2d  conv2d(input=sample, weight=conv_in.weight [2, 1, 2, 2], bias=conv_in.bias [2], "
        "padding=[1, 1]) -> [2, 2, 4, 4]",
        "act/silu  silu(self=conv_in/conv2d) -> [2, 2, 4, 4]",
        "out/cat  cat(tensors=[act/silu, conv_in/conv2d], dim=1) -> [2, 4, 4, 4]",
        "out/conv2d  conv2d(input=out/cat, weight=out.weight [1, 4, 1, 1]) -> [2, 1, 4, 4]",
    ]


def test_show_prints_table_entries_behind_the_operation() -> None:
    lines = show(planned(), "re:(conv_in|out)/.*").splitlines()
    assert [line.partition("  ! ")[2] for line in lines] == [
        "input: 8 bit affine per tensor minmax x2 (rule default) | range [-2, 3] | "
        "one gamma for 1 reader, stays: an input feeds it | gamma 0.5"
        "  ! weight: 4 bit symmetric per channel minmax (rule default)",
        "tensors: deep 2 + skip 2",
        "input: float (rule ends)  ! weight: 8 bit symmetric per tensor minmax (rule last)",
    ]


def test_show_names_a_dtype_only_where_it_is_not_the_usual_one() -> None:
    line = show(quantized(), "out/unpack~**")
    assert line == (
        "out/unpack~insert-qdq.1  unpack(packed=out.weight_packed [4] uint8, bits=8, signed=True, "
        "shape=[1, 4, 1, 1]) -> [1, 4, 1, 1] int8"
    )


def test_a_star_stays_inside_one_name_and_two_cross_names() -> None:
    assert len(show(quantized(), "conv_in/*").splitlines()) == 6
    assert len(show(quantized(), "conv_*/*").splitlines()) == 6
    with pytest.raises(AddressError):
        show(quantized(), "*")
    assert show(quantized(), "conv**") == show(quantized(), "conv_in/*")


@pytest.mark.parametrize("look", [show, lambda p, at: diff(p, p, at)])
def test_a_glob_that_fits_nothing_is_an_error_with_the_nearest_addresses(
    look: Callable[[Program, str], str],
) -> None:
    with pytest.raises(AddressError) as error:
        look(plain(), "conv_inn.*")
    assert error.value.nearest[0] == "conv_in/conv2d"
    assert str(error.value).startswith(
        "'conv_inn.*' fits no operation of this program; nearest: conv_in/conv2d"
    )


def test_a_glob_that_is_not_legal_is_an_error_in_words() -> None:
    with pytest.raises(AddressError, match="knows"):
        show(plain(), "conv_in/[abc]")


def test_equal_programs_say_so() -> None:
    assert diff(plain(), plain().fork()) == "equal: 4 operations, 0 table entries"
    assert diff(planned(), planned()) == "equal: 4 operations, 8 table entries"


def test_diff_prints_what_changed_in_arguments_and_table() -> None:
    assert diff(plain(), quantized(), "re:.*/(conv2d|silu)").splitlines() == [
        "~ conv_in/conv2d  input: sample => conv_in/dequantize~insert-qdq.1; "
        "weight: conv_in.weight [2, 1, 2, 2] => conv_in/dequantize~insert-qdq.2; "
        "! input: + 8 bit affine per tensor minmax x2 (rule default) | + range [-2, 3] | "
        "+ one gamma for 1 reader, stays: an input feeds it | + gamma 0.5 | "
        "+ scale 0.0098..0.0196, codes 0..255; "
        "! weight: + 4 bit symmetric per channel minmax (rule default) | + 4 bit codes, scale 0.0612..0.0714",
        "~ out/conv2d  weight: out.weight [1, 4, 1, 1] => out/dequantize~insert-qdq.1; "
        "! input: + float (rule ends); "
        "! weight: + 8 bit symmetric per tensor minmax (rule last) | + 8 bit codes, scale 0.0157",
        "2 changed, 0 new, 0 gone, 1 as before",
    ]


def test_diff_marks_new_and_lost_operations_in_their_place() -> None:
    there, back = diff(planned(), quantized()).splitlines(), diff(quantized(), planned()).splitlines()
    marks = ["+ conv_in/timestep_group~insert-qdq.1", "+ conv_in/quantize~insert-qdq.1"]
    marks += ["+ conv_in/dequantize~insert-qdq.1", "+ conv_in/unpack~insert-qdq.1"]
    marks += ["+ conv_in/dequantize~insert-qdq.2", "~ conv_in/conv2d", "+ out/unpack~insert-qdq.1"]
    marks += ["+ out/dequantize~insert-qdq.1", "~ out/conv2d"]
    assert [line.partition("  ")[0] for line in there[:-1]] == marks
    assert [line.partition("  ")[0] for line in back[:-1]] == [mark.replace("+", "-") for mark in marks]
    assert there[-1] == "2 changed, 7 new, 0 gone, 2 as before"
    assert back[-1] == "2 changed, 0 new, 7 gone, 2 as before"


def test_diff_shows_as_much_context_as_is_asked() -> None:
    lines = diff(plain(), changed(plain(), out_weight=torch.zeros(1, 4, 1, 1)), context=1).splitlines()
    assert [line[:10] for line in lines] == ["  ...", "  out/cat ", "~ out/conv", "1 changed,"]


def test_diff_sees_a_weight_whose_values_changed() -> None:
    other = changed(plain(), out_weight=plain().weights()["out.weight"] * 1.001)
    assert diff(plain(), other).splitlines() == [
        "~ out/conv2d  weight: out.weight [1, 4, 1, 1] => other values",
        "1 changed, 0 new, 0 gone, 3 as before",
    ]


def test_diff_sees_a_table_entry_whose_numbers_changed_behind_equal_words() -> None:
    site = Site(IN, "input")
    seen = planned().table.get(site, Range)
    assert seen is not None
    other = planned().with_table(planned().table.put(site, replace(seen, mean=seen.mean + 1)))
    assert (
        diff(planned(), other).splitlines()[0] == "~ conv_in/conv2d  ! input: range [-2, 3] => other values"
    )


def test_diff_sees_another_dtype() -> None:
    lines = diff(plain(), plain().astype(torch.float64), "act/*").splitlines()
    assert lines[0] == "~ act/silu  -> [2, 2, 4, 4] => [2, 2, 4, 4] float64"


def test_diff_sees_that_the_output_is_another_operation() -> None:
    other = plain()
    other.graph.output_node().args = (other.node("out/cat"),)
    other.gm.recompile()
    assert diff(plain(), other).splitlines() == [
        "~ output  out/conv2d => out/cat",
        "1 changed, 0 new, 0 gone, 4 as before",
    ]


def test_why_tells_the_life_of_an_address() -> None:
    assert why(quantized(), "conv_in/conv2d").splitlines() == [
        "conv_in/conv2d",
        "  conv2d(input=conv_in/dequantize~insert-qdq.1, weight=conv_in/dequantize~insert-qdq.2, "
        "bias=conv_in.bias [2], padding=[1, 1]) -> [2, 2, 4, 4]",
        "  input",
        "    asked  8 bit affine per tensor minmax x2, by rule 'default'",
        "    got    8 bit, quantized by conv_in/quantize~insert-qdq.1",
        "    seen    t < 500  range [-2, 3]  scale 0.0196  zero point 102  18 values",
        "    seen   500 <= t  range [-1, 1.5]  scale 0.0098  zero point 102  "
        "no rows: taken from the nearest group",
        "    pair   one gamma for 1 reader, stays: an input feeds it",
        "    gamma  0.5 over 1 channel",
        "  weight",
        "    asked  4 bit symmetric per channel minmax, by rule 'default'",
        "    got    4 bit, unpacked by conv_in/unpack~insert-qdq.1",
        "    codes  4 bit codes, scale 0.0612..0.0714, 4 B packed",
        "  passes",
        "    pair-layers        pair: 1 reader",
        "    absorb-scaling     absorb refused: an input feeds it",
        "    round-weights      nearest: 4 bit symmetric per channel minmax",
        "    insert-qdq         qdq: 8 bit affine per tensor minmax x2",
        "    insert-qdq         qdq: 4 bit symmetric per channel minmax",
    ]


def test_why_of_a_model_without_ranges_tells_the_scales_that_it_uses() -> None:
    saved = quantized().with_table(quantized().table.drop_all(Range))
    assert [line for line in why(saved, "conv_in/conv2d").splitlines() if "scale 0.0" in line][:2] == [
        "    used    t < 500  scale 0.0196  zero point 102",
        "    used   500 <= t  scale 0.0098  zero point 102",
    ]


def test_why_puts_a_timestep_into_the_group_that_the_graph_does() -> None:
    edges = (50.0, 500.0)
    for t in (0.0, 49.5, 50.0, 499.0, 500.0, 999.0):
        group = torch.ops.dmqfx.timestep_group(torch.tensor([t]), torch.tensor(edges)).item()
        said = [eval(span, {"t": t}) for span in map(str.strip, _spans(edges))]
        assert said == [k == group for k in range(3)]


def test_why_says_before_quantization_only_what_is_known() -> None:
    told = why(planned(), "out/conv2d")
    assert "asked  8 bit symmetric per tensor minmax, by rule 'last'" in told
    assert "got    float" in told
    assert "no pass says why" not in told


def test_why_says_who_refused_what_was_asked() -> None:
    refusal = Refusal(OUT, "plan weight", "the weight is computed in the graph")
    record = PassRecord("plan-sites", "bitwise", (), (refusal,), 0.0)
    table = quantized().table.put(Site(OUT, "weight"), Planned(None, "last"))
    told = why(replace(quantized(), table=table, log=(record,)), "out/conv2d")
    assert "refused by plan-sites: the weight is computed in the graph" in told


def test_why_of_a_node_that_a_pass_made_names_the_pass() -> None:
    assert "  made by the pass insert-qdq\n" in why(quantized(), "out/unpack~insert-qdq.1")


def test_why_of_an_operation_that_is_gone_tells_who_removed_it() -> None:
    record = PassRecord(
        "canonicalize", "bitwise", (Application(Address("x", "dropout"), "drop_dropout"),), (), 0.0
    )
    assert why(replace(plain(), log=(record,)), "x/dropout").splitlines() == [
        "x/dropout",
        "  is no longer in the graph",
        "  passes",
        "    canonicalize       drop_dropout",
    ]


def test_why_takes_a_site_for_its_operation() -> None:
    assert why(plain(), "conv_in/conv2d:weight") == why(plain(), "conv_in/conv2d")


def test_why_of_an_unknown_address_names_the_three_nearest() -> None:
    with pytest.raises(AddressError) as error:
        why(plain(), "out/conv")
    assert error.value.nearest == ("out/conv2d", "out/cat", "conv_in/conv2d")


# --- explain

WEIGHTS_ONLY: dict[str, object] = {
    "default": {"weight": {"bits": 4}, "input": "float"},
    "rules": [
        {"name": "ends", "at": "conv_in/*", "keep": "float"},
        {"name": "first", "at": "conv_in/*", "weight": {"bits": 8}},
    ],
    "pipeline": ["canonicalize", "plan-sites", {"round-weights": {"method": "nearest"}}, "insert-qdq"],
}


def test_explain_prints_bits_rule_and_what_it_overrides_of_every_site() -> None:
    assert explain(plain(), WEIGHTS_ONLY).splitlines() == [
        "site                   bits                                rule     overrides",
        "conv_in/conv2d:input   float                               ends",
        "conv_in/conv2d:weight  8 bit symmetric per channel minmax  first    ends",
        "out/conv2d:input       float                               default",
        "out/conv2d:weight      4 bit symmetric per channel minmax  default",
    ]


def test_explain_says_what_plan_sites_then_does() -> None:
    policy = {
        **WEIGHTS_ONLY,
        "rules": [{"name": "skips", "fed_by": "skip_concat", "weight": {"bits": 6}}],
        "pipeline": ["canonicalize", "flag-skips", "plan-sites"],
    }
    steps = registry.pipeline((name, {}) for name in ("canonicalize", "flag-skips", "plan-sites"))
    planned = steps.run(toy(), PassContext(Policy.load(policy))).table.of(Planned)
    assert "skips" in {plan.rule for plan in planned.values()}, "nothing was flagged"
    assert {e.site: Planned(e.spec, e.rule) for e in explanations(toy(), policy)} == planned


def test_explain_of_a_planned_program_takes_it_as_it_is() -> None:
    assert explain(quantized(), WEIGHTS_ONLY) == explain(plain(), WEIGHTS_ONLY)


def test_explain_of_some_sites_are_those_of_the_glob() -> None:
    lines = explain(plain(), WEIGHTS_ONLY, "out/*").splitlines()
    assert [line.split()[0] for line in lines] == ["site", "out/conv2d:input", "out/conv2d:weight"]
    with pytest.raises(AddressError, match="nearest: out/conv2d"):
        explain(plain(), WEIGHTS_ONLY, "oot/*")


def test_explain_of_a_policy_that_plans_nothing_says_so() -> None:
    with pytest.raises(PolicyError, match=r"has no step that plans sites.*plan-sites"):
        explain(plain(), {**WEIGHTS_ONLY, "pipeline": ["canonicalize"]})


# --- what may be given


def seen(view: Callable[..., str], given: object) -> str:
    """What a view says of something, with the arguments that it needs besides."""
    more = {diff: (plain(),), why: ("act/silu",), explain: ({**FLOAT_THROUGHOUT},)}
    return view(given, *more.get(view, ()))


VIEWS = (show, diff, why, explain, picture)
FLOAT_THROUGHOUT = {
    "default": {"weight": "float", "input": "float"},
    "pipeline": ["canonicalize", "flag-skips", "plan-sites"],
}


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_a_compiled_unet_is_seen_as_its_program(view: Callable[..., str]) -> None:
    compiled = CompiledUNet(plain(), config={}, target=Target("float", (), ""))
    assert seen(view, compiled) == seen(view, plain())
    assert diff(plain(), compiled).startswith("equal: ")


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (unconditional(), "or a compiled UNet, not a UNet2DModel; pass dmqfx.capture(unet)"),
        ("out/", "not a str; pass dmqfx.load(folder)"),
        (Path("out"), "; pass dmqfx.load(folder)"),
        (plain().graph, "not a Graph; pass dmqfx.capture(unet), or what dmqfx.compile gave"),
        (None, "not None; pass dmqfx.capture(unet), or what dmqfx.compile gave"),
    ],
    ids=["unet", "text", "path", "graph", "none"],
)
def test_anything_else_is_refused_with_what_to_pass_instead(
    view: Callable[..., str], given: object, told: str
) -> None:
    with pytest.raises(TypeError, match=f"^{view.__name__} is for a Program .*{re.escape(told)}$") as caught:
        seen(view, given)
    assert isinstance(caught.value, DmqfxError)


def test_diff_says_that_of_its_second_program_too() -> None:
    with pytest.raises(TypeError, match="diff is for a Program or a compiled UNet, not None"):
        diff(plain(), None)  # type: ignore[arg-type]
