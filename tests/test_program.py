"""Programs, addresses, the table, facts and the registry: what everything else leans on."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import EntryPoint

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import POLICIES, bare, program_before
from tiny import IN, OUT, plain, planned
from torch import fx
from toys import rows, toy

from dmqfx.errors import RewriteError
from dmqfx.graph import facts, ops, registry
from dmqfx.graph.address import Address, Site
from dmqfx.graph.invariants import check_facts
from dmqfx.graph.journal import Journal
from dmqfx.graph.modules import build, computed, fixed_nodes, is_fixed, propagate
from dmqfx.graph.pipeline import PassContext, Pipeline
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.graph.table import Codes, Planned, Range, Table
from dmqfx.graph.timesteps import GroupIndex
from dmqfx.numbers.quant import QuantSpec

WORDS = st.from_regex(r"[\w.-]{1,12}", fullmatch=True)

# --- addresses


@given(WORDS | st.just(""), WORDS, st.integers(0, 99), WORDS | st.just(""))
def test_an_address_is_its_text(path: str, op: str, call: int, made_by: str) -> None:
    address = Address(path, op, call, made_by)
    assert Address.parse(str(address)) == address
    assert Site.parse(f"{address}:weight") == Site(address, "weight")


@pytest.mark.parametrize("text", ["conv_in", "a/b/c", "a/", "a/b#x", "a/b#1#2", "a/b~", "", "a:b/c"])
def test_what_is_no_address_is_told_what_one_looks_like(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address such as 'conv_in/conv2d' or 'mid_block/add#1'"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["a/b", "a/b:", ":weight", "weight"])
def test_what_is_no_site_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        Site.parse(text)


# --- the table


def test_a_table_is_never_changed_only_followed_by_another() -> None:
    site, first, second = Site(IN, "weight"), Planned(None, "a"), Planned(QuantSpec(4), "b")
    empty = Table()
    one = empty.put(site, first)
    two = one.put(site, second)
    assert (len(empty), one.get(site, Planned), two.get(site, Planned)) == (0, first, second)
    assert len(two.drop(site, Planned)) == 0
    assert two.get(site, Planned) == second
    assert two.get(site, Range) is None


def test_entries_of_different_kinds_live_at_one_site() -> None:
    table, site = planned().table, Site(IN, "input")
    assert {type(entry).__name__ for entry in table.at(site)} == {
        "Planned", "Range", "LayerPair", "ChannelScale",
    }  # fmt: skip
    assert table.sites().count(site) == 1
    assert len(table.drop(site, Range)) == len(table) - 1


# --- programs


def test_the_view_is_keyed_by_address_and_cannot_be_written_to() -> None:
    view = plain().digraph()
    assert set(view) == {
        "sample", "timestep", "conv_in.weight", "conv_in.bias", "out.weight", "output",
        "conv_in/conv2d", "act/silu", "out/cat", "out/conv2d",
    }  # fmt: skip
    assert view.edges["conv_in.weight", "conv_in/conv2d"]["arg"] == "weight"
    assert view.edges["act/silu", "out/cat"]["arg"] == "tensors"
    assert view.nodes["out/cat"]["op"] == "cat"
    assert nx.ancestors(view, "act/silu") == {"sample", "conv_in.weight", "conv_in.bias", "conv_in/conv2d"}
    with pytest.raises(nx.NetworkXError):
        view.remove_node("out/cat")


def test_the_view_of_a_whole_unet_has_the_edges_of_its_graph() -> None:
    view = toy().digraph()
    assert nx.is_directed_acyclic_graph(view)
    for node in toy().calls():
        assert view.in_degree(str(node.meta["address"])) == len(node.all_input_nodes)


def test_a_fork_shares_weights_and_a_twin_does_not() -> None:
    program = plain()
    there = {name: weight.data_ptr() for name, weight in program.weights().items()}
    assert {name: weight.data_ptr() for name, weight in program.fork().weights().items()} == there
    twin = program.astype(torch.float32)
    assert not {weight.data_ptr() for weight in twin.weights().values()} & set(there.values())


@pytest.mark.parametrize("source", ["get_attr", "placeholder"])
def test_what_is_computed_from_weights_alone_is_fixed_however_long_it_takes(source: str) -> None:
    """A UNet's chain of operations is longer than Python's stack is deep."""
    graph = fx.Graph()
    weight = graph.get_attr("weight")
    value = weight if source == "get_attr" else graph.placeholder("x")
    for _ in range(3000):
        value = graph.call_function(torch.ops.aten.add.Tensor, (weight, value))
    assert is_fixed(value) == (source == "get_attr")
    assert not is_fixed(graph.call_function(torch.ops.aten.empty.memory_format, ([1],)))
    fixed = fixed_nodes(graph)
    assert (value in fixed) == (source == "get_attr")
    assert weight in fixed


def test_fixed_nodes_are_those_that_are_fixed() -> None:
    graph = plain().graph
    assert fixed_nodes(graph) == {node for node in graph.nodes if is_fixed(node)}


def test_what_arrives_at_a_site_is_found_or_refused_by_name() -> None:
    program = plain()
    assert program.source(Site(OUT, "input")) is program.node("out/cat")
    assert torch.equal(program.constant_at(Site(IN, "weight")), program.weights()["conv_in.weight"])
    with pytest.raises(KeyError, match="out/conv2d has no tensor 'bias'"):
        program.source(Site(OUT, "bias"))
    with pytest.raises(TypeError, match="out/cat is computed from the inputs, it is no constant"):
        program.constant_at(Site(OUT, "input"))


def test_timestep_groups_need_a_timestep() -> None:
    program = plain()
    graph = program.fork().graph
    for node in graph.find_nodes(op="placeholder", target="timestep"):
        graph.erase_node(node)
    spec = replace(program.inputs, inputs=program.inputs.inputs[:1])
    gm = build(graph, program.weights())
    propagate(gm, spec)
    rw = Rewriter(Program(gm, spec), "my-pass", Journal())
    groups, near = GroupIndex(rw), rw.node(IN)
    assert groups.node((), near) is None
    with pytest.raises(RewriteError, match="need a program with an input named timestep"):
        groups.node((500.0,), near)


# --- facts


@pytest.mark.parametrize(
    ("fact", "kind", "told"),
    [
        (facts.PLANNED, Planned, "is not in the plan"),
        (facts.CALIBRATED, Range, "is planned, but has no Range"),
        (facts.ROUNDED, Codes, "is planned, but has no Codes"),
    ],
)
def test_a_fact_is_what_the_table_holds(fact: facts.Fact, kind: type, told: str) -> None:
    program = program_before("insert-qdq")
    check_facts(program, "step")
    site = next(iter(program.table.of(kind)))
    less = program.with_table(program.table.drop(site, kind))
    if kind is Planned:  # what is asked of nobody need not be there
        less = less.with_table(less.table.drop(site, Range).drop(site, Codes))
    with pytest.raises(
        RewriteError, match=f"after step the fact {fact.name!r} .* does not hold: {site} {told}"
    ):
        check_facts(less, "step")


def test_nothing_to_observe_or_to_quantize_breaks_no_fact() -> None:
    policy = POLICIES["layers"]
    quiet = replace(policy, rules=(), default=replace(policy.default, weight="float", input="float"))
    names = (
        "canonicalize plan-sites insert-observers freeze-observers pair-layers learn-scaling apply-scaling"
    )
    steps = tuple(map(bare, [*names.split(), "absorb-scaling", "round-weights", "insert-qdq"]))
    after = Pipeline(steps).run(toy(), PassContext(quiet, rows()))
    assert not any(ops.is_call(node, "quantize", "dequantize") for node in after.calls())


# --- the registry


def test_an_entry_point_that_leads_nowhere_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    points = [
        EntryPoint("gone", "dmqfx.nowhere:Gone", registry.GROUP),
        EntryPoint("no-pass", "dmqfx.graph.table:Table", registry.GROUP),
        EntryPoint("canonicalize", "dmqfx.passes.canonicalize:Canonicalize", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    registry.passes.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert list(registry.passes()) == ["canonicalize"]
    finally:
        registry.passes.cache_clear()
    told = [record.getMessage() for record in caplog.records if record.name == registry.__name__]
    assert told[0].startswith("pass gone (dmqfx.nowhere:Gone) cannot be loaded: ")
    assert told[1] == "entry point no-pass = dmqfx.graph.table:Table is not a subclass of dmqfx.Pass"


@pytest.mark.parametrize("policy", ["layers", "shifts", "attended"])
@pytest.mark.parametrize("step", ["round-weights", "lower-reference", "lower-cpu", "fuse"])
def test_fake_values_found_once_are_those_of_torch_for_each(policy: str, step: str) -> None:
    program = program_before(step, policy)
    for node in program.calls():
        modes = [getattr(read.meta["val"], "fake_mode", None) for read in node.all_input_nodes]
        with next(filter(None, modes), nullcontext()), torch.no_grad():
            made = computed(node, lambda read: read.meta["val"])
        assert form_of(node.meta["val"]) == form_of(made), node.meta["address"]


def form_of(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return [form_of(each) for each in value] if isinstance(value, (tuple, list)) else value
