"""The picture, read back as XML: what stands where, and in which colour."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
import torch
from tiny import OUT, plain, planned, quantized
from torch import fx
from toys import toy

import dmqfx
from dmqfx import emoji
from dmqfx.graph import registry
from dmqfx.graph.address import Address, Site
from dmqfx.graph.inputs import Input, InputSpec
from dmqfx.graph.journal import PassRecord, Refusal
from dmqfx.graph.modules import build, propagate
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Planned, SkipConcat
from dmqfx.numbers.quant import QuantSpec
from dmqfx.seeing.bits import layers
from dmqfx.seeing.picture import picture
from dmqfx.seeing.report import LayerReport, Report
from dmqfx.seeing.ushape import u_shape

SVG = "{http://www.w3.org/2000/svg}"


@cache
def flagged() -> Program:
    """The toy with its skips found."""
    return registry.pipeline([("canonicalize", {}), ("flag-skips", {})]).run(toy(), PassContext())


def glyphs(text: str) -> dict[str, Element]:
    """The drawn layers of a picture by address: what has a tooltip of more than one line and is no skip."""
    found = {}
    for element in ElementTree.fromstring(text).iter():
        title = element.find(f"{SVG}title")
        if title is not None and "\n" in (title.text or "") and element.tag != f"{SVG}g":
            found[(title.text or "").splitlines()[0]] = element
    return found


def tooltip(text: str, address: str) -> list[str]:
    title = glyphs(text)[address].find(f"{SVG}title")
    assert title is not None
    return (title.text or "").splitlines()


def colours(text: str, address: str) -> list[str]:
    """The colours of a layer from top to bottom."""
    fill = glyphs(text)[address].attrib["fill"]
    name = fill.removeprefix("url(#").removesuffix(")")
    gradients = ElementTree.fromstring(text).iter(f"{SVG}linearGradient")
    stops = next(list(each) for each in gradients if each.attrib["id"] == name)
    return list(dict.fromkeys(stop.attrib["stop-color"] for stop in stops))


def legend(text: str) -> set[str]:
    return {each.text or "" for each in ElementTree.fromstring(text).iter(f"{SVG}text")}


def test_every_layer_is_drawn_once() -> None:
    text = picture(flagged())
    assert list(glyphs(text)) == [str(at) for at in layers(flagged())]


def test_shapes_tell_convolutions_linear_layers_and_attention_apart() -> None:
    drawn = glyphs(picture(flagged()))
    assert drawn["conv_in/conv2d"].tag == f"{SVG}rect"
    assert drawn["mid.to_q/linear"].tag == f"{SVG}circle"
    assert drawn["mid/scaled_dot_product_attention"].tag == f"{SVG}path"


def test_x_is_execution_order_and_nothing_overlaps_or_leaves_the_picture() -> None:
    shape = u_shape(flagged())
    assert [at for unit in shape.units for at in unit.layers] == list(layers(flagged()))
    for one, two in pairwise(shape.units):
        assert one.x + one.width < two.x
    for above, below in pairwise(shape.lanes):
        assert above.bottom == below.top
    root = ElementTree.fromstring(picture(flagged()))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    bottoms = {lane.size: lane.bottom for lane in shape.lanes}
    for unit in shape.units:
        assert unit.x + unit.width < width
        assert unit.y + unit.height < bottoms[unit.size] < height
        for _, x, y in unit.cells():
            assert unit.x < x < unit.x + unit.width
            assert unit.y < y < unit.y + unit.height


def test_y_is_resolution_with_linear_layers_at_that_of_their_block() -> None:
    shape = u_shape(flagged())
    sizes = {str(at): unit.size for unit in shape.units for at in unit.layers}
    assert [lane.size for lane in shape.lanes] == [None, (8, 8), (4, 4)]
    assert sizes["time_embedding.linear_1/linear"] is None
    assert sizes["conv_in/conv2d"] == sizes["down.conv1/conv2d"] == sizes["up.1.conv2/conv2d"] == (8, 8)
    assert sizes["downsample/conv2d"] == sizes["mid.to_q/linear"] == sizes["mid.out/linear"] == (4, 4)
    assert sizes["down.time_emb_proj/linear"] == (8, 8)


def test_long_skips_are_arcs_from_where_they_are_made_to_where_they_are_read() -> None:
    arcs = u_shape(flagged()).arcs
    ends = {(arc.source.layers[-1], arc.target.layers[0]) for arc in arcs}
    assert {(str(a), str(b)) for a, b in ends} == {
        ("conv_in/conv2d", "up.1.conv1/conv2d"),
        ("down.conv2/conv2d", "up.0.conv1/conv2d"),
    }
    inner, outer = sorted(arcs, key=lambda arc: arc.target.x - arc.source.x)
    assert outer.y < inner.y < min(inner.source.y, inner.target.y)
    drawn = ElementTree.fromstring(picture(flagged())).findall(f"{SVG}g")
    assert len(drawn) == 2


def test_a_program_whose_skips_are_not_flagged_has_no_arcs() -> None:
    assert u_shape(toy()).arcs == ()
    assert not [words for words in legend(picture(toy())) if "skips" in words]


def test_the_names_of_blocks_do_not_run_into_each_other() -> None:
    """In a wide font, where a letter of size 9 takes 6 pixels."""
    root = ElementTree.fromstring(picture(dmqfx.capture(emoji.load_unet())))
    names = [each for each in root.iter(f"{SVG}text") if each.attrib.get("text-anchor") == "middle"]
    assert {"conv_in", "down_blocks.0", "mid_block", "up_blocks.2", "conv_out"} <= {e.text for e in names}
    spans = [(float(e.attrib["y"]), float(e.attrib["x"]), 3 * len(e.text or "")) for e in names]
    for (y, x, half), (v, u, other) in combinations(spans, 2):
        assert y != v or abs(x - u) >= half + other


def test_an_uneven_skip_has_a_colour_of_its_own() -> None:
    def strokes(program: Program) -> set[str]:
        return {arc.attrib["stroke"] for arc in ElementTree.fromstring(picture(program)).findall(f"{SVG}g")}

    uneven = {site: replace(entry, uneven=True) for site, entry in flagged().table.of(SkipConcat).items()}
    other = flagged().with_table(flagged().table.put_all(uneven))
    assert strokes(flagged()).isdisjoint(strokes(other))


def test_bits_are_colours_with_the_input_above_the_weight() -> None:
    text = picture(quantized())
    first, last = colours(text, "conv_in/conv2d"), colours(text, "out/conv2d")
    eight, four = first
    grey, also_eight = last
    assert also_eight == eight
    assert len({eight, four, grey}) == 3
    assert colours(picture(plain()), "conv_in/conv2d") == [grey]
    assert {"8 bit", "4 bit", "float"} <= legend(text)
    assert {"8 bit", "4 bit"}.isdisjoint(legend(picture(plain())))


def test_before_quantization_colours_are_the_plan() -> None:
    for at in ("conv_in/conv2d", "out/conv2d"):
        assert colours(picture(planned()), at) == colours(picture(quantized()), at)


def test_a_layer_that_did_not_get_what_was_asked_has_a_red_edge() -> None:
    table = quantized().table.put(Site(OUT, "input"), Planned(QuantSpec(6), "default"))
    drawn = glyphs(picture(quantized().with_table(table)))
    assert "stroke" in drawn["out/conv2d"].attrib
    assert "stroke" not in drawn["conv_in/conv2d"].attrib
    assert not any("stroke" in each.attrib for each in glyphs(picture(quantized())).values())
    refusal = PassRecord("plan-sites", "bitwise", (), (Refusal(OUT, "plan weight", "computed"),), 0.0)
    text = picture(replace(quantized(), log=(refusal,)))
    assert "stroke" in glyphs(text)["out/conv2d"].attrib
    assert "refused: plan-sites: computed" in tooltip(text, "out/conv2d")


def test_a_tooltip_tells_shape_share_bits_and_rule_and_with_a_report_the_sqnr() -> None:
    layer = LayerReport("out/conv2d", (), 12.34, timestep_db={900.0: 15.0, 1.0: 9.87})
    report = Report("Tiny", (layer,), {1.0: 20.0}, 1, 2000, 500, ())
    text = picture(quantized(), report)
    assert tooltip(text, "out/conv2d") == [
        "out/conv2d",
        "output 1x4x4, weight 1x4x1x1, 33.3% of MACs",
        "input: float (rule ends)",
        "weight: 8 bit (rule last)",
        "SQNR 12.3 dB, worst 9.9 dB at t = 1",
    ]
    assert not any("SQNR" in line for line in tooltip(text, "conv_in/conv2d"))
    assert any("2 kB to 500 B" in words and "output SQNR 20.0 dB" in words for words in legend(text))


@pytest.mark.parametrize("words", ["<b>&\"'", "]]>"])
def test_words_that_xml_would_read_are_escaped(words: str) -> None:
    table = planned().table.put(Site(OUT, "weight"), Planned(None, words))
    text = picture(planned().with_table(table))
    assert f"weight: float (rule {words})" in tooltip(text, "out/conv2d")


def test_the_picture_needs_nothing_from_elsewhere() -> None:
    text = picture(flagged())
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert "<script" not in text
    assert len(text) < 40_000


def test_programs_without_feature_maps_or_layers_have_a_picture_too() -> None:
    graph = fx.Graph()
    x, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    last = graph.call_function(torch.ops.aten.silu.default, (x,))
    last.meta["address"] = Address("", "silu")
    graph.output(last)
    inputs = (Input("sample", ("B", 3)), Input("timestep", ("B",), "timestep"))
    gm, spec = build(graph, {}), InputSpec("Nothing", inputs, {"B": 2})
    propagate(gm, spec)
    assert glyphs(picture(Program(gm, spec))) == {}
