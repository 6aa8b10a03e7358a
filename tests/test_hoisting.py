"""hoist-invariants: the same bits as without it, whatever callers do; what is kept, for how long, and what is not."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import handmade
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import captured
from planting import context, program_before
from torch import Tensor, fx

from dmqfx.errors import PipelineError, RewriteError
from dmqfx.graph import ops
from dmqfx.graph.address import Address
from dmqfx.graph.facts import HOISTED, INTEGER
from dmqfx.graph.hoisting import hoisted_in, misplaced
from dmqfx.graph.journal import Journal
from dmqfx.graph.modules import build, clone
from dmqfx.graph.pipeline import PassContext, Pipeline, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.graph.rewrite import Rewriter
from dmqfx.runtime.hoisted import HoistedModule
from dmqfx.runtime.memory import Memory, content
from dmqfx.runtime.operators import OPS
from dmqfx.storage.graphfile import read_program, write_graph

STEP = create("hoist-invariants")
TIMES = (0.0, 250.0, 500.0, 999.0)


def before(policy: str = "many prompts") -> Program:
    return program_before("hoist-invariants", policy)


@cache
def hoisted(policy: str = "many prompts") -> Program:
    return run_step(STEP, before(policy), context(policy))


def fresh(policy: str = "many prompts") -> HoistedModule:
    """A module of its own, which has kept nothing yet."""
    found = hoisted(policy).fork().gm
    assert isinstance(found, HoistedModule)
    return found


def inputs(batch: int = 2, prompt: int = 0, time: float = 500.0, seed: int = 0) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    words = torch.Generator().manual_seed(prompt + 100)
    return {
        "sample": torch.randn(batch, 3, 8, 8, generator=noise),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": torch.randn(batch, 4, 6, generator=words),
    }


def calls_of(program: Program, name: str) -> list[fx.Node]:
    return list(program.calls(name))


class Counted:
    """How often each part of a module is computed."""

    def __init__(self, module: HoistedModule) -> None:
        self.runs = [0] * len(module._parts)
        module._parts = [
            replace(part, run=self._counting(k, part.run)) for k, part in enumerate(module._parts)
        ]

    def _counting(self, k: int, run: object) -> object:
        def counting(*given: object) -> object:
            self.runs[k] += 1
            assert callable(run)
            return run(*given)

        return counting


# --- what is hoisted


def test_the_embedding_of_the_timestep_and_the_keys_and_values_leave_the_loop() -> None:
    program = hoisted("one prompt")
    marked = {str(ops.tensor(m, "x").meta["address"]): ops.args(m)["by"] for m in hoisted_in(program.graph)}
    assert {at: [node.target for node in by] for at, by in marked.items()} == {
        "time_embedding.linear_1/timestep_group~insert-qdq.1": ["timestep"],
        "down/unsqueeze#1": ["timestep"],
        "/transpose#1": ["encoder_hidden_states"],
        "/transpose#2": ["encoder_hidden_states"],
    }
    told = "24 of 49 operations are hoisted: 16 by timestep, 8 by encoder_hidden_states"
    assert str(program.log[-1]).endswith(f" s  {told}")
    assert HOISTED in program.facts


def test_what_is_the_same_in_all_timestep_groups_does_not_depend_on_the_timestep() -> None:
    alike, uneven = hoisted("one prompt"), hoisted("many prompts")
    assert {str(a.at) for a in alike.log[-1].applied if a.rule == "ungroup"} == {
        "to_k/quantize~insert-qdq.1",
        "to_k/linear",
    }
    (refused,) = uneven.log[-1].refused
    assert str(refused.at) == "to_k/quantize~insert-qdq.1"
    assert refused.reason == "scale and zero_point differ between timestep groups; kept for each group"
    keys = uneven.node("/transpose#1")
    (mark,) = [user for user in keys.users if ops.is_call(user, "hoisted")]
    assert len(ops.args(mark)["by"]) == 2


def test_it_stands_behind_a_lowering_and_runs_once() -> None:
    with pytest.raises(PipelineError, match="step 1, hoist-invariants, requires 'integer'"):
        Pipeline((STEP,)).run(program_before("lower-reference", "one prompt"), PassContext())
    with pytest.raises(PipelineError, match="step 1, hoist-invariants, comes too late: 'hoisted'"):
        Pipeline((STEP,)).run(hoisted(), PassContext())


def test_simulated_programs_are_hoisted_too() -> None:
    program = run_step(
        create("lower-simulate"), program_before("lower-simulate", "one prompt"), PassContext()
    )
    after = run_step(STEP, program, PassContext())
    assert "time_embedding" in str(after.log[-1].applied)
    assert torch.equal(after(**inputs()), program(**inputs()))
    assert torch.equal(after(**inputs()), program(**inputs()))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            "stable-diffusion-xl",
            "14 by timestep, 13 by time_ids, 4 by text_embeds and time_ids, "
            "39 by text_embeds and time_ids and timestep, 48 by encoder_hidden_states",
        ),
        ("control", "11 by controlnet_cond, 34 by timestep, 18 by encoder_hidden_states"),
    ],
)
def test_other_conditions_than_a_prompt_are_hoisted_too(model: str, told: str) -> None:
    plain = run_step(create("canonicalize"), captured(model)[1], PassContext())
    plain = replace(plain, facts=plain.facts | {INTEGER})
    after = run_step(STEP, plain, PassContext())
    assert after.log[-1].note.endswith(told)
    for seed in (0, 1, 0):
        given = plain.inputs.draw(torch.Generator().manual_seed(seed))
        for right, found in zip(*map(results, (plain, after), (given, given)), strict=True):
            assert torch.equal(right, found)


def results(program: Program, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    found = program(**given)
    return found if isinstance(found, tuple) else (found,)


def lowered(graph: fx.Graph) -> Program:
    return replace(handmade.program_of(graph, {}), facts=frozenset({INTEGER}))


def test_nothing_to_hoist_is_refused_with_the_reason() -> None:
    graph = fx.Graph()
    sample, timestep = graph.placeholder("sample"), graph.placeholder("timestep")
    spread = graph.call_function(torch.ops.aten.view.default, (timestep, [-1, 1, 1, 1]))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (sample, spread)))
    viewed = run_step(STEP, lowered(graph), PassContext())
    assert [r.reason for r in viewed.log[-1].refused] == ["it is a view of timestep, which costs nothing"]
    assert not isinstance(viewed.gm, HoistedModule)
    assert viewed.log[-1].note == "0 of 2 operations are hoisted"
    graph = fx.Graph()
    sample, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    graph.output(graph.call_function(torch.ops.aten.silu.default, (sample,)))
    alone = run_step(STEP, lowered(graph), PassContext())
    assert [r.reason for r in alone.log[-1].refused] == ["nothing is computed without sample"]


def test_what_the_caller_gets_is_not_kept() -> None:
    graph = fx.Graph()
    sample, timestep = graph.placeholder("sample"), graph.placeholder("timestep")
    waves = graph.call_function(torch.ops.aten.sin.default, (timestep,))
    both = graph.call_function(
        torch.ops.aten.add.Tensor, (sample, graph.call_function(torch.ops.aten.sum.default, (waves,)))
    )
    graph.output((both, graph.call_function(torch.ops.aten.unsqueeze.default, (waves, 0))))
    program = lowered(graph)
    after = run_step(STEP, program, PassContext())
    reasons = {str(r.at): r.reason for r in after.log[-1].refused}
    assert reasons == {"block/unsqueeze#3": "the caller gets it, and may write into it"}
    assert [str(a.at) for a in after.log[-1].applied] == ["block/sum#1"]
    given = {"sample": torch.randn(2, 4, 3, 3), "timestep": torch.tensor([1.0, 2.0])}
    _, waves_given = after(**given)
    waves_given.zero_()
    assert torch.equal(after(**given)[1], program(**given)[1])


@pytest.mark.parametrize("policy", ["one prompt", "many prompts"])
def test_with_less_fuel_it_does_the_first_part_of_the_same(policy: str) -> None:
    whole, plain, given = hoisted(policy).log[-1].applied, before(policy)(**inputs()), inputs()
    for fuel in range(len(whole) + 1):
        journal = Journal(fuel=fuel)
        program = STEP.run(before(policy), replace(context(policy), journal=journal))
        assert tuple(journal.applied) == whole[:fuel]
        assert all(torch.equal(program(**given), plain) for _ in range(2))


# --- the same bits


CALLS = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 2), st.sampled_from(TIMES), st.integers(0, 2), st.booleans()),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(policy=st.sampled_from(["one prompt", "many prompts"]), calls=CALLS)
def test_any_calls_in_any_order_give_the_bits_of_the_program_without_it(
    policy: str, calls: list[tuple[int, int, float, int, bool]]
) -> None:
    plain, module = before(policy), fresh(policy)
    held: dict[int, dict[str, Tensor]] = {}
    for batch, prompt, time, seed, in_place in calls:
        given = inputs(batch, prompt, time, seed)
        if in_place and batch in held:  # other contents in the tensors of an earlier call
            for name, value in held[batch].items():
                value.copy_(given[name])
            given = held[batch]
        held[batch] = given
        assert torch.equal(module(**given), plain(**given))


def test_every_sample_of_a_batch_may_have_a_timestep_and_a_prompt_of_its_own() -> None:
    module, plain = fresh(), before()
    given = inputs(3) | {"timestep": torch.tensor([1.0, 400.0, 800.0])}
    for order in ([0, 1, 2], [2, 1, 0], [0, 0, 2], [0, 1, 2]):
        turned = {name: value[order] for name, value in given.items()}
        assert torch.equal(module(**turned), plain(**turned))


def test_zeros_of_either_sign_and_layouts_are_told_apart() -> None:
    zero = torch.zeros(2)
    assert content(zero) != content(-zero)
    assert content(zero.fill_(torch.nan)) == content(torch.full((2,), torch.nan))
    square = torch.zeros(2, 2)
    assert content(square) != content(square.mT)
    assert content(square) != content(square.double())
    module, plain = fresh(), before()
    given = inputs()
    turned = given["encoder_hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
    for states in (given["encoder_hidden_states"], turned):
        each = given | {"encoder_hidden_states": states}
        assert torch.equal(module(**each), plain(**each))


def test_threads_that_share_a_module_get_their_own_results() -> None:
    module, plain = fresh(), before()
    every = [inputs(1 + k % 2, k % 3, TIMES[k % 4], k) for k in range(12)]
    right = [plain(**each) for each in every]
    module.memory.limit = 9_000  # so that there is forgetting, too
    order = [(7 * k) % 12 for k in range(120)]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda k: module(**every[k]), order))
    assert all(torch.equal(result, right[k]) for k, result in zip(order, got, strict=True))


# --- what is computed again, and what is not


def test_a_part_is_computed_once_for_each_content_of_what_it_reads() -> None:
    module = fresh()
    counted = Counted(module)
    for _ in range(2):
        for time in (0.0, 10.0, 999.0):  # the first two are in one group
            module(**inputs(time=time))
    assert counted.runs == [3, 2, 1]
    module(**inputs(time=10.0, prompt=1, seed=5))
    assert counted.runs == [3, 3, 2]
    module(**inputs(time=10.0, prompt=1, batch=1))
    assert counted.runs == [4, 4, 3]


def test_memory_is_bounded_and_what_was_used_last_stays() -> None:
    module, plain = fresh(), before()
    module.memory.limit = limit = 20_000
    for k in range(60):
        given = inputs(prompt=k, time=float(k))
        assert torch.equal(module(**given), plain(**given))
        assert 0 < module.memory.size <= limit
    counted = Counted(module)
    module(**given)
    assert counted.runs == [0, 0, 0]
    module(**inputs(prompt=0, time=0.0))
    assert counted.runs == [1, 1, 1]


@given(sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 900)), max_size=30))
def test_the_size_of_a_memory_is_that_of_what_it_holds(sizes: list[tuple[int, int]]) -> None:
    memory = Memory(limit=6_000)
    for key, numbers in sizes:
        memory.keep(key, (torch.zeros(numbers),))
        assert memory.size <= memory.limit
    held = [values for values, _ in memory._held.values()]
    assert memory.size == sum(1024 + 4 * values[0].numel() for values in held)


def unkept(module: HoistedModule, given: dict[str, Tensor]) -> Tensor:
    """What the graph gives as it stands."""
    found: Tensor = module._flat(module, **given)
    return found


def test_weights_that_are_written_or_replaced_are_noticed() -> None:
    module, given = fresh(), inputs()
    module = clone(module, {name: value.clone() for name, value in hoisted().weights().items()})
    owner = module.get_submodule("down.time_emb_proj")
    results = [module(**given)]
    owner.bias.mul_(3.0)
    results.append(module(**given))
    owner._buffers["bias"] = owner.bias * 2.0
    results.append(module(**given))
    module.load_state_dict(
        {k: v * 2.0 if k == "down.time_emb_proj.bias" else v for k, v in module.state_dict().items()}
    )
    results.append(module(**given))
    module.load_state_dict({k: v.clone() for k, v in hoisted().weights().items()}, assign=True)
    results.append(module(**given))
    assert torch.equal(results[0], results[4])
    assert not any(torch.equal(results[k], results[k + 1]) for k in range(4))
    assert torch.equal(results[4], unkept(module, given))


def test_learned_weights_get_their_gradients() -> None:
    program = hoisted("one prompt")
    own = {k: v.clone() for k, v in program.weights().items()}
    own["conv_out.weight"] = torch.nn.Parameter(own["conv_out.weight"])
    module = clone(program.gm, own)
    assert isinstance(module, HoistedModule)
    for _ in range(2):
        module(**inputs()).sum().backward()
    assert len(module.memory) == 2
    assert module.get_parameter("conv_out.weight").grad is not None
    own["down.time_emb_proj.weight_scale"] = torch.nn.Parameter(own["down.time_emb_proj.weight_scale"])
    learned = clone(program.gm, own)
    assert isinstance(learned, HoistedModule)
    learned(**inputs())
    assert len(learned.memory) == 0


def test_nothing_is_kept_where_gradients_are_wanted() -> None:
    module, given = fresh(), inputs()
    given["sample"].requires_grad_()
    module(**given)
    assert len(module.memory) == 0
    with torch.no_grad():
        module(**given)
    assert len(module.memory) == 3


def test_gradients_of_a_hoisted_value_pass() -> None:
    x = torch.randn(3, requires_grad=True)
    OPS.hoisted(x.sin(), [x]).sum().backward()
    assert torch.equal(x.grad, x.detach().cos())
    assert set(torch.library.opcheck(OPS.hoisted.default, (torch.randn(3), [torch.randn(2)])).values()) == {
        "SUCCESS"
    }


def test_inference_mode_leaves_nothing_that_other_calls_stumble_over() -> None:
    module, plain, given = fresh(), before(), inputs()
    with torch.inference_mode():
        module(**given)
    assert torch.equal(module(**given), plain(**given))
    assert len(module.memory) == 6


def test_nothing_is_kept_under_autocast_and_of_fake_tensors() -> None:
    module, given = fresh(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        module(**given)
    mode = next(iter(module.graph.nodes)).meta["val"].fake_mode
    with mode:
        faked = module(**{name: mode.from_tensor(value) for name, value in given.items()})
    assert faked.shape == given["sample"].shape
    assert len(module.memory) == 0


def test_nothing_is_kept_while_a_graph_is_exported_or_compiled() -> None:
    module, plain, given = fresh(), before(), inputs()
    exported = torch.export.export(module, (), given, strict=False).module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for each in (given, inputs(time=3.0, prompt=4)):
        assert torch.equal(exported(**each), plain(**each))
        assert torch.equal(compiled(**each), plain(**each))
    assert len(module.memory) == 0


# --- copies and files


def test_copies_start_with_nothing_kept() -> None:
    module, plain, given = fresh(), before(), inputs()
    module(**given)
    twin = copy.deepcopy(module)
    assert isinstance(twin, HoistedModule)
    assert (len(module.memory), len(twin.memory)) == (3, 0)
    assert torch.equal(twin(**given), plain(**given))
    assert (len(module.memory), len(twin.memory)) == (3, 3)
    pickled = pickle.loads(pickle.dumps(module))
    assert torch.equal(pickled(**given), plain(**given))
    assert len(pickle.loads(pickle.dumps(module.memory))) == 0


def test_a_stored_graph_comes_back_hoisted() -> None:
    program = hoisted()
    again = read_program(write_graph(program), program.weights())
    assert isinstance(again.gm, HoistedModule)
    assert write_graph(again) == write_graph(program)
    assert len(again.gm.memory) == 0
    for _ in range(2):
        assert torch.equal(again(**inputs()), before()(**inputs()))


def test_a_compiled_unet_keeps_and_forgets() -> None:
    q = handmade.compiled("cpu")
    expected = handmade.outputs(handmade.compiled("reference"))
    assert isinstance(q.runner, HoistedModule)
    assert torch.equal(handmade.outputs(q), expected)
    assert len(q.runner.memory) > 0
    assert not any("hoisted" in str(node.target) for node in q.program.graph.nodes)
    assert len(copy.deepcopy(q).runner.memory) == 0
    moved = copy.deepcopy(q).to("meta")
    assert len(moved.runner.memory) == 0


# --- marks


def test_a_mark_that_does_not_say_all_is_told() -> None:
    program = before()
    rw = Rewriter(program, "edit", Journal())
    node = rw.node(Address.parse("/scaled_dot_product_attention"))
    timestep = next(each for each in rw.graph.nodes if each.target == "timestep")
    query = ops.tensor(node, "query")
    with rw.before(node):
        mark = rw.call(OPS.hoisted.default, near=query, x=query, by=[timestep])
    rw.redirect(node, query, mark)
    after = rw.finish()
    ((found, why),) = misplaced(after.graph)
    assert str(found.meta["address"]) == "/hoisted~edit.1"
    assert (
        why == "is computed from sample, encoder_hidden_states too, not from timestep alone"
        or "sample" in why
    )
    assert HOISTED.broken(after) == f"/hoisted~edit.1 {why}"
    assert torch.equal(after(**inputs()), program(**inputs()))  # kept by all that it reads, all the same
    assert torch.equal(after(**inputs(seed=9)), program(**inputs(seed=9)))


def test_hoisted_values_that_wait_for_each_other_are_refused() -> None:
    graph = fx.Graph()
    sample, timestep = graph.placeholder("sample"), graph.placeholder("timestep")
    sine = graph.call_function(torch.ops.aten.sin.default, (timestep,))
    first = graph.call_function(OPS.hoisted.default, (sine, [timestep]))
    third = graph.call_function(
        OPS.hoisted.default, (graph.call_function(torch.ops.aten.add.Tensor, (sample, first)), [sample])
    )
    fourth = graph.call_function(
        OPS.hoisted.default, (graph.call_function(torch.ops.aten.cos.default, (third,)), [timestep])
    )
    graph.output(fourth)
    with pytest.raises(RewriteError, match="hoisted values wait for each other"):
        build(graph, {})
