"""The report: numbers against hand calculation, honesty about what was not done, a file that comes back."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny import IN, OUT, changed, plain, planned, quantized
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import rows, toy

from dmqfx.calibration.calibration import Calibration
from dmqfx.calibration.rows import Column, Rows
from dmqfx.errors import StoreError
from dmqfx.graph import registry
from dmqfx.graph.address import Address, Site
from dmqfx.graph.facts import SCALED
from dmqfx.graph.inputs import Input, InputSpec
from dmqfx.graph.journal import PassRecord, Refusal
from dmqfx.graph.modules import build, propagate
from dmqfx.graph.pipeline import PassContext, Pipeline, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.table import Planned
from dmqfx.policy.policy import Expect, Policy
from dmqfx.runtime import targets
from dmqfx.seeing import lockstep
from dmqfx.seeing.inventory import inventory, listing
from dmqfx.seeing.report import LayerReport, PassReport, Refused, Report, SiteReport
from dmqfx.seeing.selection import AddressError

aten = torch.ops.aten
POLICY: dict[str, object] = {
    "schema": "dmqfx.policy/1",
    "name": "toy",
    "default": {"weight": {"bits": 4, "range": "mse"}, "input": {"bits": 8, "groups": 4}},
    "rules": [{"name": "ends", "at": ["conv_in/*", "conv_out/*"], "keep": "float"}],
    "pipeline": [
        "canonicalize",
        "flag-skips",
        "plan-sites",
        "insert-observers",
        "freeze-observers",
        "pair-layers",
        "learn-scaling",
        "apply-scaling",
        "absorb-scaling",
        {"round-weights": {"method": "nearest"}},
        "insert-qdq",
    ],
}


def calibration(program: Program, timesteps: list[float]) -> Calibration:
    """Rows of noise at these timesteps."""
    inputs = program.inputs.draw(torch.Generator().manual_seed(0), B=len(timesteps))
    inputs["timestep"] = torch.tensor(timesteps)
    each = torch.arange(len(timesteps))
    return Calibration(
        (Rows({name: Column(value, each) for name, value in inputs.items()}, torch.zeros_like(each), each),)
    )


@pytest.fixture(scope="module")
def compiled() -> tuple[Program, Program, Program]:
    """The toy as captured, just before the lossy pass, and quantized."""
    policy = Policy.load(POLICY)
    steps = registry.pipeline((step.name, step.keywords()) for step in policy.pipeline).steps
    lossy = next(k for k, step in enumerate(steps) if step.preserves is Preserves.LOSSY)
    ctx = PassContext(policy=policy, calibration=rows())
    scaled = Pipeline(steps[:lossy]).run(toy(), ctx)
    return toy(), scaled, Pipeline(steps[lossy:]).run(scaled, ctx)


# --- SQNR


def test_an_output_ten_percent_off_has_20_db_at_every_timestep() -> None:
    other = changed(plain(), out_weight=plain().weights()["out.weight"] * 1.1)
    report = Report.measure(plain(), other, calibration(plain(), [900.0, 3.0, 3.0]))
    assert list(report.output_db) == [900.0, 3.0]
    assert list(report.output_db.values()) == pytest.approx([20.0, 20.0], abs=1e-4)
    assert report.layer("out/conv2d").sqnr_db == pytest.approx(20.0, abs=1e-4)


def test_a_layer_that_is_bit_equal_has_infinite_sqnr() -> None:
    other = changed(plain(), out_weight=plain().weights()["out.weight"] * 1.1)
    report = Report.measure(plain(), other, calibration(plain(), [3.0]))
    assert report.layer("conv_in/conv2d").sqnr_db == math.inf


def test_a_layer_is_measured_in_its_own_network_with_what_earlier_layers_lost() -> None:
    other = changed(plain(), conv_in_weight=plain().weights()["conv_in.weight"] * 1.1)
    report = Report.measure(plain(), other, calibration(plain(), [3.0]))
    assert report.layer("out/conv2d").sqnr_db not in (None, math.inf)


def test_the_output_at_each_timestep_is_that_of_its_own_rows() -> None:
    times = [900.0, 3.0, 900.0, 3.0]
    data = calibration(plain(), times)
    batch = next(data.batches(4))
    exact, approximate = plain()(**batch), quantized()(**batch)
    assert isinstance(exact, Tensor)
    assert isinstance(approximate, Tensor)
    report = Report.measure(plain(), quantized(), data)
    for time in (900.0, 3.0):
        chosen = batch["timestep"] == time
        noise = (exact - approximate)[chosen].double().square().sum()
        wanted = 10 * torch.log10(exact[chosen].double().square().sum() / noise)
        assert report.output_db[time] == pytest.approx(float(wanted), rel=1e-9)
    assert report.rows == 4
    assert report.mean_db == pytest.approx(sum(report.output_db.values()) / 2)
    assert report.worst == min(report.output_db.items(), key=lambda each: each[1])


def test_a_layer_has_its_sqnr_at_each_timestep_and_over_all() -> None:
    data = calibration(plain(), [900.0, 3.0, 900.0, 3.0, 3.0])
    layer = Report.measure(plain(), quantized(), data).layer("conv_in/conv2d")
    assert list(layer.timestep_db) == [900.0, 3.0]
    signal, noise, parts = 0.0, 0.0, list(data.batches(4))
    times = torch.cat([batch["timestep"] for batch in parts])
    # In the report's own batches: a convolution of fewer rows may sum in another order.
    both = [
        torch.cat([outputs(program, batch)[IN] for batch in parts]).double()
        for program in (plain(), quantized())
    ]
    for time, db in layer.timestep_db.items():
        exact, approximate = (found[times == time] for found in both)
        one, other = float(exact.square().sum()), float((exact - approximate).square().sum())
        assert db == pytest.approx(10 * math.log10(one / other), rel=1e-9)
        signal, noise = signal + one, noise + other
    assert layer.sqnr_db == pytest.approx(10 * math.log10(signal / noise), rel=1e-9)


def outputs(program: Program, batch: dict[str, Tensor]) -> dict[Address, Tensor]:
    """What every operation gives, from fx's own interpreter."""
    found: dict[Address, Tensor] = {}

    class Listening(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            value = super().run_node(node)
            if "address" in node.meta and isinstance(value, Tensor):
                found[node.meta["address"]] = value
            return value

    Listening(program.gm).run(*batch.values())
    return found


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((2, 3), {1.0: 20.0, 2.0: 0.0}),  # a batch
        ((4, 3), {1.0: 20.0, 2.0: 0.0}),  # batch and channels as one
        ((1, 3), {1.0: 20.0, 2.0: 20.0}),  # the same for every sample
    ],
)
def test_rows_of_any_layout_are_counted_at_their_timestep(
    shape: tuple[int, int], wanted: dict[float, float]
) -> None:
    exact, approximate, found = torch.ones(shape), torch.full(shape, 1.1), dict[float, lockstep.Ratio]()
    approximate[1 if len(exact) == 2 else 2 :] = 2.0
    lockstep._count(found, [1.0, 2.0], exact, approximate)
    assert {time: ratio.db for time, ratio in found.items()} == pytest.approx(wanted, abs=1e-3)


def test_every_recorded_timestep_is_measured_even_with_few_rows(
    compiled: tuple[Program, Program, Program],
) -> None:
    report = Report.measure(compiled[0], compiled[2], rows(12), rows=4)
    assert len(report.output_db) == report.rows == 12


def test_without_data_or_rows_nothing_is_measured_and_the_report_says_so() -> None:
    for report in (
        Report.measure(plain(), quantized(), None),
        Report.measure(plain(), quantized(), calibration(plain(), [3.0]), rows=0),
    ):
        assert report.mean_db is None
        assert report.worst is None
        assert {layer.sqnr_db for layer in report.layers} == {None}
        assert "loss    not measured" in report.summary()


def test_the_mean_leaves_out_timesteps_that_are_bit_equal() -> None:
    report = Report("UNet", (), {900.0: math.inf, 3.0: 12.0}, 2, 1, 1, ())
    assert report.mean_db == 12.0
    assert replace(report, output_db={3.0: math.inf}).mean_db == math.inf


def test_the_first_layer_that_is_not_finite_is_named() -> None:
    weight = plain().weights()["conv_in.weight"].clone()
    weight[0, 0, 0, 0] = math.inf
    report = Report.measure(
        plain(), changed(plain(), conv_in_weight=weight), calibration(plain(), [3.0]), rows=1
    )
    assert "NOT FINITE: conv_in/conv2d is the first layer" in report.summary()
    assert report.table(worst_first=True).splitlines()[1].startswith("conv_in/conv2d")


def test_layers_that_an_absorbed_scale_has_changed_are_measured_only_against_the_scaled_program(
    compiled: tuple[Program, Program, Program],
) -> None:
    captured, scaled, after = compiled
    assert SCALED in scaled.facts
    early, late = (Report.measure(before, after, rows(4)) for before in (captured, scaled))
    absorbed = {layer.address for layer in early.layers if layer.sqnr_db is None}
    assert absorbed == {"mid.to_v/linear", "mid/scaled_dot_product_attention", "mid.proj/linear"}
    assert all(layer.sqnr_db is not None and layer.sqnr_db > 5 for layer in late.layers)
    assert early.output_db == pytest.approx(late.output_db, rel=1e-3)


# --- two programs in step


def chain(order: str) -> Program:
    """Twenty linear layers of one width, then two independent ones in this order, added."""
    weights = {f"layer_{k}.weight": torch.eye(64) for k in range(22)}
    graph = fx.Graph()
    x, _ = graph.placeholder("sample"), graph.placeholder("timestep")

    def linear(read: fx.Node, k: int) -> fx.Node:
        node = graph.call_function(aten.linear.default, (read, graph.get_attr(f"layer_{k}.weight")))
        node.meta["address"] = Address(f"layer_{k}", "linear")
        return node

    for k in range(20):
        x = linear(x, k)
    both = {k: linear(x, 20 + k) for k in map(int, order)}
    total = graph.call_function(aten.add.Tensor, (both[0], both[1]))
    total.meta["address"] = Address("", "add")
    graph.output(total)
    inputs = (Input("sample", ("B", 64)), Input("timestep", ("B",), "timestep"))
    gm, spec = build(graph, weights), InputSpec("Chain", inputs, {"B": 2})
    propagate(gm, spec)
    return Program(gm, spec)


def test_two_programs_in_step_hold_a_few_values_and_never_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    add = lockstep.Ratio.add

    def counted(ratio: lockstep.Ratio, right: Tensor, approximate: Tensor) -> None:
        seen.extend([weakref.ref(right), weakref.ref(approximate)])
        alive.append(sum(1 for each in seen if each() is not None))
        add(ratio, right, approximate)

    monkeypatch.setattr(lockstep.Ratio, "add", counted)
    Report.measure(chain("01"), chain("01"), calibration(chain("01"), [1.0, 2.0, 3.0]))
    assert len(seen) >= 2 * 22
    assert max(alive) <= 8


def test_layers_are_matched_by_address_where_the_order_differs() -> None:
    report = Report.measure(chain("01"), chain("10"), calibration(chain("01"), [1.0]))
    assert {layer.sqnr_db for layer in report.layers} == {math.inf}


# --- asked and got


def test_bits_got_are_read_from_the_graph(compiled: tuple[Program, Program, Program]) -> None:
    report = Report.measure(compiled[0], compiled[2], None)
    conv = report.layer("down.conv1/conv2d")
    assert (conv.got("input"), conv.got("weight")) == (8, 4)
    ends = report.layer("conv_in/conv2d")
    assert (ends.got("input"), ends.got("weight")) == (None, None)
    assert report.got == report.asked == 2 * (len(report.layers) - 3)
    assert all(site.as_asked for site in report.sites)


@pytest.mark.parametrize("target", [target.name for target in targets.TARGETS])
def test_a_lowered_program_has_the_bits_it_had(target: str) -> None:
    report = Report.measure(plain(), targets.lower(quantized(), target), None)
    assert report.layer("conv_in/conv2d").got("weight") == 4
    assert report.layer("conv_in/conv2d").got("input") == 8
    assert report.layer("out/conv2d").got("weight") == 8
    assert report.layer("out/conv2d").got("input") is None


def test_a_plan_that_nobody_carried_out_is_not_reported_as_done() -> None:
    report = Report.measure(plain(), planned(), None)
    assert (report.asked, report.got) == (3, 0)
    assert "bits    0 of 3 sites as asked, 3 not" in report.summary()
    assert (
        "  ! weight: asked 8 bit symmetric per tensor minmax, got float: no pass says why" in report.table()
    )


def test_a_simulated_weight_that_is_not_on_its_grid_counts_as_float() -> None:
    lowered = targets.lower(quantized(), "simulate")
    weight = lowered.weights()["out.weight_simulated"]
    other = changed(lowered, **{"out.weight_simulated": weight + 0.001})
    assert Report.measure(plain(), other, None).layer("out/conv2d").got("weight") is None


def test_a_refusal_is_counted_and_told_at_its_layer() -> None:
    refusal = Refusal(OUT, "plan weight", "the weight is computed in the graph")
    record = PassRecord("plan-sites", "bitwise", (), (refusal,), 0.0)
    table = plain().table.put(Site(OUT, "weight"), Planned(None, "last"))
    report = Report.measure(plain(), replace(plain(), table=table, log=(record,)), None)
    assert (report.asked, report.got) == (1, 0)
    assert report.passes[0].refused == (
        Refused("out/conv2d", "plan weight", "the weight is computed in the graph"),
    )
    told = [line for line in report.table().splitlines() if line.startswith("  !")]
    assert told == ["  ! weight: asked float, got float: plan-sites: the weight is computed in the graph"]


def test_bytes_count_codes_scales_and_bias_of_a_layer_and_every_constant_of_the_program() -> None:
    report = Report.measure(plain(), quantized(), None)
    first, last = report.layer("conv_in/conv2d"), report.layer("out/conv2d")
    assert first.bytes_before == 4 * (8 + 2)
    assert first.bytes_after == 8 // 2 + 2 * (4 + 4) + 4 * 2
    assert last.bytes_before == 4 * 4
    assert last.bytes_after == 4 + (4 + 4)
    assert report.bytes_before == first.bytes_before + last.bytes_before
    activation = 2 * (4 + 4) + 4  # scale and zero point of two groups, and the boundary between them
    assert report.bytes_after == first.bytes_after + last.bytes_after + activation


def test_only_weights_quantized_is_memory_only_and_claims_no_speed() -> None:
    assert not Report.measure(plain(), quantized(), None).memory_only
    table = planned().table.put(Site(IN, "input"), Planned(None, "weights only"))
    steps = registry.pipeline([("round-weights", {"method": "nearest"}), ("insert-qdq", {})])
    report = Report.measure(plain(), steps.run(planned().with_table(table), PassContext()), None)
    assert report.memory_only
    assert "only weights are quantized: memory only, no speed claim" in report.summary()


# --- words and files


def small() -> Report:
    """A report of everything that has a word."""
    sites = (
        SiteReport("input", 8, 8, "8 bit", "default"),
        SiteReport("weight", 4, None, "4 bit", "all", ("x: no",)),
    )
    attention = (SiteReport("query", None, None),)
    layers = (
        LayerReport("a.conv/conv2d", sites, 31.25, 4000, 500, 900, 0.9),
        LayerReport(
            "b.attn/scaled_dot_product_attention", attention, 9.5, 0, 0, 100, 0.1, {981.0: 9.5, 1.0: math.inf}
        ),
        LayerReport("c/linear", (), None, 1200, 1200),
    )
    passes = (PassReport("canonicalize", "bitwise", 3, (Refused("a/cat", "flag", "no"),), 0.5, 1e-16),)
    return Report("UNet", layers, {981.0: 12.5, 1.0: math.inf}, 2, 5200, 1700, passes)


def test_the_table_has_a_line_for_each_layer_and_what_was_refused_below_it() -> None:
    assert small().table().splitlines() == [
        "layer                                input  weight   SQNR dB  before   after   MACs",
        "a.conv/conv2d                        8      float !     31.2    4 kB   500 B  90.0%",
        "  ! weight: asked 4 bit, got float: x: no",
        "b.attn/scaled_dot_product_attention  float               9.5                  10.0%",
        "c/linear                                                      1.2 kB  1.2 kB   0.0%",
    ]


def test_the_table_can_start_with_the_worst_and_stop() -> None:
    lines = small().table(worst_first=True, limit=1).splitlines()
    assert lines[1].startswith("b.attn")
    assert lines[2:] == ["... and 2 more layers"]


def test_the_summary_tells_size_bits_and_loss() -> None:
    assert small().summary().splitlines() == [
        "UNet: 5.2 kB -> 1.7 kB, 3.06x smaller",
        "bits    1 of 2 sites as asked, 1 not",
        "loss    output SQNR 12.5 dB in the mean of 2 timesteps, worst 12.5 dB at t = 981 (2 rows)",
    ]


def test_a_printed_report_is_summary_timesteps_worst_layers_and_refusals() -> None:
    parts = str(small()).split("\n\n")
    assert parts[0] == small().summary()
    assert parts[1].splitlines() == ["at t     981     1", "dB      12.5   inf"]
    assert parts[2] == small().table(worst_first=True, limit=12)
    assert parts[3].splitlines() == ["refused by       the first", "canonicalize  1  a/cat: no"]
    assert len(parts) == 4


def test_a_printed_report_has_no_part_without_content() -> None:
    assert str(replace(small(), output_db={}, passes=())).count("\n\n") == 1


def test_timesteps_are_ten_to_a_line_under_each_other() -> None:
    many = replace(small(), output_db={float(t): 20 + t / 1000 for t in range(999, 0, -90)})
    lines = str(many).split("\n\n")[1].splitlines()
    assert [len(line.split()) for line in lines] == [2 + 10, 1 + 10, 2 + 2, 1 + 2]
    assert len(lines[0]) == len(lines[1])
    assert lines[2].index("99") + 2 == lines[0].index("999") + 3, "right-aligned"


def test_where_nothing_was_asked_the_summary_says_that_all_is_float() -> None:
    report = Report.measure(plain(), plain(), None)
    assert "nothing was asked to be quantized: every layer is float" in report.summary()
    assert "nothing was asked" not in small().summary()


def test_a_report_comes_back_from_json_as_it_was(compiled: tuple[Program, Program, Program]) -> None:
    for report in (small(), Report.measure(compiled[1], compiled[2], rows(4))):
        assert Report.from_json(report.to_json()) == report


def test_inf_and_nan_survive_json_that_any_reader_accepts() -> None:
    layer = replace(small().layers[0], sqnr_db=math.nan)
    report = replace(small(), layers=(layer,), output_db={1.0: math.inf, 2.0: -math.inf})
    text = report.to_json()
    assert "Infinity" not in text
    assert "NaN" not in text
    back = Report.from_json(text)
    assert back.output_db == report.output_db
    assert back.layers[0].sqnr_db is not None
    assert math.isnan(back.layers[0].sqnr_db)


def damaged() -> Iterator[str]:
    text = small().to_json()
    yield from ("", "[]", "{}", text[:-20], text.replace("report/1", "report/2"))
    yield from (text.replace('"rows"', '"row"'), text.replace('"sqnr_db": 31.25', '"sqnr_db": "many"'))


@pytest.mark.parametrize("text", list(damaged()))
def test_a_damaged_report_is_a_store_error(text: str) -> None:
    with pytest.raises(StoreError, match="report"):
        Report.from_json(text)


def test_an_expectation_is_missed_in_words_and_reached_in_silence() -> None:
    assert small().misses(Expect()) == small().misses(Expect(12.5)) == []
    assert small().misses(Expect(13.0)) == ["the output has 12.5 dB SQNR, 13 dB are wanted"]
    broken = replace(small(), output_db={1.0: math.nan})
    assert broken.misses(Expect(1.0)) == ["the output has nan dB SQNR, 1 dB are wanted"]
    unmeasured = replace(small(), output_db={})
    assert unmeasured.misses(Expect(1.0)) == ["nothing was measured, and 1 dB are wanted"]


def test_a_layer_that_is_not_there_is_an_error_with_the_nearest() -> None:
    with pytest.raises(AddressError) as error:
        small().layer("c/conv2d")
    assert "c/linear" in error.value.nearest


# --- inventory


def test_macs_agree_with_the_flop_counter_of_torch() -> None:
    program = registry.pipeline([("canonicalize", {})]).run(toy(), PassContext())
    batch = program.inputs.draw(torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        program(**batch)
    assert (
        2 * program.inputs.sizes["B"] * sum(item.macs for item in inventory(program))
        == counter.get_total_flops()
    )


def test_macs_of_products_without_sites_are_counted_too() -> None:
    graph = fx.Graph()
    x, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    spread = graph.call_function(aten.conv_transpose2d.input, (x, graph.get_attr("w"), None, [2, 2]))
    product = graph.call_function(aten.matmul.default, (spread, spread))
    graph.output(product)
    for node, at in ((spread, Address("up", "conv_transpose2d")), (product, Address("", "matmul"))):
        node.meta["address"] = at
    inputs = (Input("sample", ("B", 3, "H", "W")), Input("timestep", ("B",), "timestep"))
    gm, spec = build(graph, {"w": torch.ones(3, 5, 2, 2)}), InputSpec("Odd", inputs, {"B": 2, "H": 4, "W": 4})
    propagate(gm, spec)
    program = Program(gm, spec)
    with FlopCounterMode(display=False) as counter:
        program(**spec.draw(torch.Generator()))
    items = inventory(program)
    assert 4 * sum(item.macs for item in items) == counter.get_total_flops()
    assert [item.sites for item in items] == [(), ()]


def test_the_inventory_lists_shapes_weights_and_shares() -> None:
    assert listing(inventory(plain())).splitlines() == [
        "layer           output  weight   parameters  MACs   share",
        "conv_in/conv2d  2x4x4   2x1x2x2          10   128   66.7%",
        "out/conv2d      1x4x4   1x4x1x1           4    64   33.3%",
        "2 layers                                 14   192  100.0%",
    ]


@pytest.mark.parametrize("program", [planned, quantized], ids=["planned", "quantized"])
def test_the_inventory_of_a_planned_program_has_bits_and_rules(program: object) -> None:
    assert callable(program)
    line = listing(inventory(program(), "out/*")).splitlines()[1]
    assert line.endswith("33.3%  input float (ends)  weight 8 (last)")
