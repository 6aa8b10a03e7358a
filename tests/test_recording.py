"""Layouts of inputs that come again are replayed, to the bits that the graph gives."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import context, program_before
from test_hoisting import TIMES, fresh, inputs
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmqfx.graph.pipeline import run_step
from dmqfx.graph.registry import create
from dmqfx.runtime import arena, hoisted, recording
from dmqfx.runtime.arena import Arena, UnlikeError
from dmqfx.runtime.hoisted import HoistedModule
from dmqfx.runtime.kernels.native import Library, library
from dmqfx.runtime.operators import OPS
from dmqfx.runtime.recording import Recorder, Replays
from dmqfx.runtime.replay import Call, Row, tensors


def flat(module: HoistedModule, given: dict[str, Tensor]) -> Tensor:
    """The graph as it stands."""
    made = module._flat(module, **given)
    assert isinstance(made, Tensor)
    return made


def known(module: HoistedModule) -> Replays:
    assert module._again is not None
    return module._again


# --- the same bits


def test_a_layout_is_recorded_at_its_second_call_and_replayed_from_then_on() -> None:
    module, made = fresh(), list[tuple[Tensor, Tensor]]()
    for k in range(6):
        each = inputs(2, k % 2, TIMES[k % 4], k)
        result = module(**each)
        assert torch.equal(result, flat(module, each))
        assert len(known(module)) == min(k, 1)
        made.append((result, result.clone()))
    assert all(torch.equal(now, then) for now, then in made), "a later call wrote into an earlier result"


def test_between_calls_of_torch_the_kernels_are_called_in_a_row() -> None:
    module = fresh()
    for k in range(2):
        module(**inputs(seed=k))
    (replay,) = known(module)._known.values()
    assert replay is not None
    rows = [len(step.calls) for step in replay.steps if isinstance(step, Row)]
    torch_s = [step for step in replay.steps if isinstance(step, Call)]
    kernels = [n for n in known(module)._graph.nodes if recording.is_native(n)]
    assert sum(rows) == len(kernels) > 3 * len(rows)
    assert len(torch_s) < len(known(module)._graph.nodes) / 4
    assert not any(a is b for a, b in zip(replay.steps, replay.steps[1:], strict=False))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 1), st.sampled_from(TIMES), st.booleans()),
        min_size=4,
        max_size=10,
    )
)
def test_layouts_that_take_turns_do_not_get_in_each_others_way(
    calls: list[tuple[int, int, float, bool]],
) -> None:
    module = fresh()
    for seed, (batch, prompt, time, turned) in enumerate(calls):
        each = inputs(batch, prompt, time, seed)
        if turned:
            each["sample"] = each["sample"].to(memory_format=torch.channels_last)
        assert torch.equal(module(**each), flat(module, each))


def test_the_number_of_threads_may_change_between_calls() -> None:
    module, before = fresh(), torch.get_num_threads()
    try:
        for threads in (1, 1, 2, 2, 1, 2):
            torch.set_num_threads(threads)
            each = inputs(3, seed=threads)
            assert torch.equal(module(**each), flat(module, each))
    finally:
        torch.set_num_threads(before)


def test_in_inference_mode_and_without() -> None:
    module = fresh()
    for k in range(8):
        each = inputs(seed=k)
        with torch.inference_mode(k % 4 < 2):
            assert torch.equal(module(**each), flat(module, each))


def test_shifted_input_channels_are_replayed_too() -> None:
    program = program_before("hoist-invariants", "shifts")
    found = run_step(create("hoist-invariants"), program, context("shifts")).fork().gm
    assert isinstance(found, HoistedModule)
    sample = inputs()["sample"]
    for k in range(4):
        each = {"sample": sample + k, "timestep": torch.full((2,), TIMES[k])}
        assert torch.equal(found(**each), flat(found, each))


def test_while_a_layout_is_replayed_other_threads_run_the_graph() -> None:
    module = fresh()
    every = [inputs(2, k % 3, TIMES[k % 4], k) for k in range(8)]
    right = [flat(module, each) for each in every]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda k: module(**every[k % 8]), range(64)))
    assert all(torch.equal(result, right[k % 8]) for k, result in enumerate(got))
    assert len(known(module)) == 1


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_that_torch_lays_out_in_another_way_is_not_taken_for_the_same(
    backend: SDPBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for told_apart in (True, False):
        if not told_apart:  # as of a switch of torch's that nobody thought of
            monkeypatch.setattr(hoisted, "_settings", lambda: ())
        step = create("hoist-invariants")
        before = program_before("lower-float", "many prompts")  # whose attention is still torch's
        left = run_step(step, before, context("many prompts"))
        assert list(left.calls("scaled_dot_product_attention"))
        module = left.fork().gm
        assert isinstance(module, HoistedModule)
        for k in range(8):
            each = inputs(seed=k)
            with sdpa_kernel(backend) if k > 3 else nullcontext():
                assert torch.equal(module(**each), flat(module, each))


# --- what is noticed


def test_constants_that_are_written_into_or_replaced_are_noticed() -> None:
    module, each = fresh(), inputs()
    before = [module(**each) for _ in range(3)][-1]
    constants = [each for each in module.constants(module._rest.weights) if each.is_floating_point()]
    for constant in (constants[0], constants[-1]):
        with torch.no_grad():
            constant.mul_(1.5)
        changed = [module(**each) for _ in range(3)]
        assert all(torch.equal(one, flat(module, each)) for one in changed)
    assert not torch.equal(changed[0], before)
    assert len(known(module)) == 1, "replays of constants that are there no more are dropped"


def test_a_kernel_that_fails_is_called_by_the_graph_which_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    module, each = fresh(), inputs()
    right = [module(**each) for _ in range(3)][-1]
    monkeypatch.setattr(Library, "run_all", lambda *_: False)
    assert torch.equal(module(**each), right)


@pytest.mark.parametrize("limit", [1000, 5000, 13_000])
def test_more_memory_than_the_limit_is_not_kept(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "LIMIT", limit)
    module = fresh()
    for k in range(4):
        each = inputs(seed=k)
        assert torch.equal(module(**each), flat(module, each))
    assert len(known(module)) == 0


def test_a_call_that_turns_out_too_large_goes_on_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "LIMIT", 13_000)
    module, each, ran = fresh(), inputs(), list[object]()
    module(**each)
    run = Library.run
    monkeypatch.setattr(Library, "run", lambda *args: (ran.append(args[1]), run(*args))[1])
    monkeypatch.setattr(
        module, "_rest", replace(module._rest, run=lambda *_: pytest.fail("it was run from the start"))
    )
    found, once = module(**each), len(ran)
    layers = (OPS.kernel_conv2d.default, OPS.kernel_linear.default)
    assert once == sum(n.target in layers for n in known(module)._graph.nodes)
    assert torch.equal(found, flat(module, each))
    assert len(known(module)) == 0


def test_layouts_beyond_the_most_are_forgotten_the_oldest_first() -> None:
    module = fresh()
    for batch in range(1, recording._MOST + 3):
        for _ in range(2):
            module(**inputs(batch))
    assert len(known(module)) == recording._MOST


def test_blocks_are_written_again_when_nobody_reads_them_any_more() -> None:
    module = fresh()
    for k in range(2):
        module(**inputs(8, seed=k))
    (replay,) = known(module)._known.values()
    assert replay is not None
    blocks = replay.held[0]
    assert isinstance(blocks, Arena)
    made = sum(recording.is_native(n) for n in known(module)._graph.nodes)
    assert len(blocks.blocks) < made / 2
    assert blocks.size == replay.size > 0


def test_layouts_that_take_the_places_of_each_other_are_not_recorded_at_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, honest = [0], Recorder.record

    def counted(self: Recorder, graph: fx.Graph) -> object:
        count[0] += 1
        return honest(self, graph)

    monkeypatch.setattr(Recorder, "record", counted)
    monkeypatch.setattr(recording, "_MOST", 2)
    module = fresh()
    for k in range(24):
        each = inputs(1 + k % 3)
        assert torch.equal(module(**each), flat(module, each))
    assert count[0] == 3
    for _ in range(40):
        module(**inputs(3))
    assert count[0] <= 4


def test_constants_that_change_at_every_call_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "record", lambda *_: pytest.fail("recorded"))
    module, each = fresh(), inputs()
    constant = next(x for x in module.constants(module._rest.weights) if x.is_floating_point())
    for _ in range(4):
        with torch.no_grad():
            constant.mul_(1.01)
        assert torch.equal(module(**each), flat(module, each))


# --- what cannot be done again


def recorder(*reads: Tensor) -> Recorder:
    found = library()
    assert found is not None
    return Recorder(found, reads, ())


def graph_of(*operations: object) -> fx.Graph:
    """x through operations of one tensor, one behind the other."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    for operation in operations:
        node = graph.call_function(operation, (node,))  # type: ignore[arg-type]  # an operator
    graph.output(node)
    return graph


@pytest.mark.parametrize("operation", [torch.ops.aten.relu_.default, torch.ops.aten.zero_.default])
def test_what_writes_into_its_input_is_not_recorded(operation: object) -> None:
    with pytest.raises(UnlikeError, match="may write"):
        recorder(torch.ones(3)).record(graph_of(operation))


def test_numbers_that_depend_on_what_is_in_a_tensor_are_not_recorded() -> None:
    assert recorder(torch.full((1,), 3.0)).record(graph_of(torch.ops.aten._local_scalar_dense.default)) == (
        None,
        3,
    )


def test_a_graph_that_is_not_recorded_is_run() -> None:
    replays, each = Replays(graph_of(torch.ops.aten.relu_.default)), torch.ones(2)
    assert [replays(iter([k]).__next__, 0, (), [each], []) for k in range(4)] == [0, 1, 2, 3]
    assert len(replays) == 0


def coding(wrap: Callable[[fx.Node], object]) -> fx.Graph:
    """Codes of x, whose scale is a constant and the zero point what stands between, and x."""
    graph = fx.Graph()
    x, *grid = (graph.placeholder(name) for name in ("x", "zero_point", "scale"))
    node = graph.call_function(OPS.kernel_quantize.default, (x, grid[1], grid[0], None, 1, 0, 255))
    graph.output((wrap(node), x))
    return graph


@pytest.mark.parametrize("wrap", [lambda codes: codes, lambda codes: {"codes": [codes]}])
def test_a_result_that_a_kernel_wrote_is_the_callers_own(wrap: Callable[[fx.Node], object]) -> None:
    found, held = library(), [torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)]
    assert found is not None
    replay, first = Recorder(found, [torch.full((2, 8), 3.0)], held).record(coding(wrap))
    made = [first, *(replay([torch.full((2, 8), value)]) for value in (5.0, 7.0))]
    assert [int(next(tensors(each))[0, 0]) for each in made] == [3, 5, 7]
    assert float(made[1][1][0, 0]) == 5.0


def test_a_table_that_is_no_constant_is_read_anew() -> None:
    found, scale = library(), torch.ones(1, 1)
    assert found is not None
    reads = [
        [torch.full((2, 8), 3.0), torch.full((1, 1), zero)] for zero in (0, 10)
    ]  # int64: the kernel reads a copy
    replay, first = Recorder(found, reads[0], [scale]).record(coding(lambda codes: codes))
    assert [int(each[0][0, 0]) for each in (first, replay(reads[1]), replay(reads[0]))] == [3, 13, 3]


# --- bugs that must show


def replayed_wrongly() -> bool:
    module = fresh()
    calls = [inputs(2, k % 2, TIMES[k % 4], k) for k in range(4)]
    return any(not torch.equal(module(**each), flat(module, each)) for each in calls)


def test_a_block_that_is_given_back_too_early_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not replayed_wrongly()
    monkeypatch.setattr(Recorder, "_starts", lambda self, value: iter(()))  # nobody is counted
    take = Arena.take

    def from_all(self: Arena, like: Tensor) -> Tensor:
        self._free = list(self.blocks.values())
        return take(self, like)

    monkeypatch.setattr(Arena, "take", from_all)
    assert replayed_wrongly()


def test_a_pointer_that_is_not_moved_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "_patches", lambda *_: iter(()))
    assert replayed_wrongly()


def test_another_layout_taken_for_the_same_is_found_out_by_the_first_result_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recording, "_layout", lambda reads: ())
    module, each = fresh(), inputs(3)
    for _ in range(3):
        assert torch.equal(module(**inputs(2)), flat(module, inputs(2)))
    assert torch.equal(module(**each), flat(module, each))
    assert len(known(module)) == 0
