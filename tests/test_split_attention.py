"""split-attention: two products for one operation, exactly; its softmax is a site like others."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from handmade import program_of
from hypothesis import given
from hypothesis import strategies as st
from models import captured
from mutants_attention import AVERAGE, WHOLE
from planting import POLICIES, bare, context, edited, program_before
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.nn import functional as F
from toys import toy

from dmqfx.checking.judges import distance
from dmqfx.checking.probes import draw, outputs
from dmqfx.checking.shrink import randomize
from dmqfx.checking.verify import checking, verify
from dmqfx.errors import PolicyError, RewriteError, VerifyError
from dmqfx.frontend import exported
from dmqfx.graph import ops, registry
from dmqfx.graph.address import Site
from dmqfx.graph.inputs import Input, InputSpec
from dmqfx.graph.modules import build, propagate
from dmqfx.graph.pipeline import PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.graph.rewrite import Rewriter
from dmqfx.graph.table import LayerPair, Planned
from dmqfx.numbers.quant import QParams
from dmqfx.policy.policy import Policy
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.seeing.bits import site_bits
from dmqfx.seeing.explain import explain
from dmqfx.seeing.inventory import inventory
from dmqfx.seeing.picture import picture
from dmqfx.storage.store import load

aten = torch.ops.aten
SOFTMAX = Site.parse(f"{AVERAGE}:softmax")


def split(program: Program) -> Program:
    """The program with its attention split."""
    return registry.pipeline([("canonicalize", {}), ("split-attention", {})]).run(program, PassContext())


def attending(heads: int = 2, keys: int = 3, mask: Tensor | None = None, **how: object) -> Program:
    """Attention of the pixels of `sample`, four channels in some heads, to the first few of them."""
    graph = fx.Graph()
    call, (sample, _) = graph.call_function, (graph.placeholder("sample"), graph.placeholder("timestep"))
    pixels = call(aten.transpose.int, (call(aten.flatten.using_ints, (sample, 2)), 1, 2))
    query = pixels
    if heads:
        parted = call(aten.unflatten.int, (pixels, 2, [heads, 4 // heads]))
        query = call(aten.transpose.int, (parted, 1, 2))
    key = call(aten.slice.Tensor, (call(aten.sin.default, (query,)), -2, 0, keys))
    value = call(aten.cos.default, (key,))
    constants = {} if mask is None else {"mask": mask}
    given = None if mask is None else graph.get_attr("mask")
    named = {"attn_mask": given, **how}
    attended = call(aten.scaled_dot_product_attention.default, (query, key, value), named)
    graph.output(call(aten.transpose.int, (attended, 1, 2)))
    return program_of(graph, constants)


def distance_of(before: Program, after: Program) -> float:
    """The greatest relative distance over the probes, in float64."""
    one, two = before.astype(torch.float64), after.astype(torch.float64)
    probes = draw(one, torch.Generator().manual_seed(0))
    return max(distance(outputs(two, inputs)[0], outputs(one, inputs)[0]) for inputs in probes)


class Masked(nn.Module):
    """A transformer block of diffusers that leaves out the part of its context that begins with a negative number."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = BasicTransformerBlock(8, 2, 4, cross_attention_dim=6)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        pixels = sample.flatten(2).transpose(1, 2)
        mask = (encoder_hidden_states[:, None, :, 0] < 0).to(sample.dtype) * -10000.0
        made: Tensor = self.unet(
            pixels, encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=mask
        )
        return made.transpose(1, 2) + timestep[:, None, None]


@cache
def masked() -> Program:
    """The block as a canonical program of any batch, size and context."""
    model = Masked().eval().requires_grad_(False)
    randomize(model)
    free = (
        {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},
        {0: Dim.DYNAMIC},
        {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
    )
    examples = (torch.zeros(3, 8, 4, 5), torch.zeros(3), torch.zeros(3, 7, 6))
    with torch.no_grad():
        found = export(model, examples, dynamic_shapes=free, strict=False)
    names = ("sample", "timestep", "encoder_hidden_states")
    graph, weights = exported.read(found, names, "unet.")
    dims = (("B", 8, "H", "W"), ("B",), ("B", "T", 6))
    spec = InputSpec("Masked", tuple(map(Input, names, dims)), {"B": 2, "H": 4, "W": 6, "T": 5})
    gm = build(graph, weights)
    propagate(gm, spec)
    return run_step(create("canonicalize"), Program(gm, spec), PassContext())


def refusals(program: Program) -> Mapping[str, str]:
    return {str(refusal.at): refusal.reason for refusal in program.log[-1].refused}


# --- what is split


@given(
    heads=st.sampled_from((1, 2, 4)),
    keys=st.integers(1, 5),
    scale=st.none() | st.floats(0.01, 3),
    kind=st.sampled_from(("none", "float", "infinite", "boolean")),
    seed=st.integers(0, 99),
)
def test_any_heads_keys_scale_and_mask_are_split_exactly(
    heads: int, keys: int, scale: float | None, kind: str, seed: int
) -> None:
    numbers = torch.randn(1, 1, 1, keys, generator=torch.Generator().manual_seed(seed))
    masks = {
        "none": None,
        "float": numbers,
        "infinite": torch.where(numbers > 0, 0.0, -torch.inf),  # perhaps of all keys
        "boolean": numbers > 0,
    }
    program = attending(heads, keys, masks[kind], scale=scale)
    result = split(program)
    assert not list(result.calls("scaled_dot_product_attention"))
    assert distance_of(program, result) < 1e-12


@pytest.mark.slow
def test_every_attention_of_a_real_unet_is_split_and_no_multiplication_is_lost() -> None:
    canonical = run_step(create("canonicalize"), captured("conditional")[1], PassContext())
    assert verify(canonical, create("split-attention"), PassContext()).error < 1e-13
    result = split(canonical)
    whole = list(canonical.calls("scaled_dot_product_attention"))
    assert len(whole) == len(list(result.calls("attention_average"))) > 2
    costs = [sum(item.macs for item in inventory(each)) for each in (canonical, result)]
    assert costs[0] == costs[1]
    paths = [node.meta["address"].path for node in whole]
    assert [node.meta["address"].path for node in result.calls("attention_softmax")] == paths


def test_a_cross_attention_of_diffusers_with_a_mask_is_split_exactly() -> None:
    result = run_step(create("split-attention"), masked(), PassContext())
    masks = [ops.args(node)["attn_mask"] is not None for node in result.calls("attention_softmax")]
    assert masks == [False, True]
    assert verify(masked(), create("split-attention"), PassContext()).error < 1e-13


def test_a_mask_that_is_forgotten_is_found() -> None:
    def forgotten(rw: Rewriter, node: fx.Node) -> fx.Node | None:
        return None if ops.args(node)["attn_mask"] is None else rw.like(node, attn_mask=None)

    with pytest.raises(VerifyError) as caught:
        verify(masked(), edited("attention_softmax", forgotten)("split-attention"), PassContext())
    assert str(caught.value.address) == "attn2/scaled_dot_product_attention"


def test_the_operators_have_the_derivatives_of_torchs_own() -> None:
    q, k, v = (torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.where(torch.rand(5, 5) > 0.5, 0.0, -torch.inf).double()
    mask[1] = -torch.inf
    whole = F.scaled_dot_product_attention(q, k, v, mask)
    softmax = torch.ops.dmqfx.attention_softmax(q, k, mask)
    parted = torch.ops.dmqfx.attention_average(softmax, v)
    assert torch.allclose(whole, parted)
    for one, two in zip(
        *(torch.autograd.grad(each.sin().sum(), (q, k, v)) for each in (whole, parted)), strict=True
    ):
        assert torch.allclose(one, two)


# --- what is refused


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"is_causal": True}, "it is causal: its mask is not a tensor"),
        ({"dropout_p": 0.25}, "it drops 0.25 of the softmax at random"),
        ({"enable_gqa": True}, "groups of heads share keys"),
        ({"heads": 0}, "its operands have 3 axes, not batch, heads, tokens and channels"),
    ],
)
def test_what_cannot_be_split_exactly_stays_and_says_why(how: dict[str, object], reason: str) -> None:
    program = attending(**how)  # type: ignore[arg-type]  # some are arguments of torch's operator
    result = split(program)
    assert list(refusals(result).values()) == [reason]
    assert len(list(result.calls("scaled_dot_product_attention"))) == 1


def test_what_is_planned_as_a_whole_is_refused_and_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = program_before("insert-observers", "attention")
    step = create("split-attention")
    reason = "it is planned as a whole already; put split-attention before plan-sites"
    assert refusals(run_step(step, planned, context("attention"))) == {WHOLE: reason}
    monkeypatch.setattr(sys.modules[type(step).__module__], "_unfit", lambda attention, table: None)
    with pytest.raises(
        RewriteError, match=r"mid/scaled_dot_product_attention:query, but that operation is gone"
    ):
        run_step(step, planned, context("attention"))


def test_a_rule_about_a_softmax_without_the_pass_is_a_mistake_that_names_it() -> None:
    policy = Policy.load(POLICIES["attention"])
    rule = next(rule for rule in POLICIES["softmax"].rules if rule.kind == "softmax")
    asking = replace(policy, rules=(*policy.rules, replace(rule, at=("mid/**",), optional=False)))
    with pytest.raises(PolicyError, match="once the step split-attention has run"):
        run_step(create("plan-sites"), program_before("plan-sites"), PassContext(asking))


# --- what becomes of the softmax


def per_tensor(name: str) -> Policy:
    """The policy with one step for all heads, found by `name`."""
    rules = POLICIES["softmax"].rules
    changed = [
        replace(r, input=replace(r.input, per="tensor", range=name)) if r.kind == "softmax" else r
        for r in rules
    ]  # type: ignore[arg-type]  # it asks for bits
    return replace(POLICIES["softmax"], rules=tuple(changed))


def test_the_channels_of_a_softmax_are_its_heads_and_its_codes_begin_at_zero() -> None:
    params = program_before("round-weights", "softmax").table.get(SOFTMAX, QParams)
    assert params is not None
    assert (params.axis, tuple(params.scale.shape)) == (1, (4, 2))
    assert not params.zero_point.any()
    assert float(params.scale.amax()) * 255 <= 1 + 1e-6


@pytest.mark.parametrize("found", ["mse", "percentile", "ema"])
def test_every_range_of_a_softmax_is_searched_for_and_learned_on(found: str) -> None:
    ctx = PassContext(per_tensor(found), context().calibration)
    program = program_before("plan-sites", "softmax")
    for name in ("plan-sites", "fit-ranges", "round-weights"):
        program = run_step(bare(name), program, ctx)
    fitted = program.table.get(SOFTMAX, QParams)
    assert fitted is not None
    assert (fitted.axis, tuple(fitted.scale.shape), bool(fitted.zero_point.any())) == (None, (4, 1), False)
    learning = create("learn-steps", {"iterations": 2, "rows": 8, "batch": 4})
    learned = run_step(learning, program, ctx).table.get(SOFTMAX, QParams)
    assert learned is not None
    assert not torch.equal(learned.scale, fitted.scale)
    assert torch.equal(learned.zero_point, fitted.zero_point)


def test_scales_go_through_the_average_into_the_values_projection_unless_values_are_quantized() -> None:
    pair, whole = Site.parse("mid.to_out/linear:input"), POLICIES["softmax"]
    kept = replace(whole, rules=tuple(rule for rule in whole.rules if rule.kind != "attention"))
    order = [(step.name, step.keywords()) for step in whole.pipeline]
    through = registry.pipeline(order[: [name for name, _ in order].index("fit-ranges")])
    result = through.run(toy(), PassContext(kept, context().calibration), observe=checking())
    assert str(result.table.of(LayerPair)[pair].producer) == "mid.to_v/linear"
    assert "mid.to_out/div~apply-scaling.1" not in {str(node.meta["address"]) for node in result.calls("div")}
    refused = program_before("learn-scaling", "softmax").table.of(LayerPair)[pair]
    assert f"{AVERAGE}:value is quantized" in refused.reason


@cache
def quantized() -> Program:
    """The toy with its softmax in 8 bits."""
    order = [(step.name, step.keywords()) for step in POLICIES["softmax"].pipeline]
    return registry.pipeline(order).run(toy(), context("softmax"))


def test_attention_in_codes_is_said_to_compute_in_float_and_has_its_bits() -> None:
    result = quantized()
    for name in ("lower-reference", "lower-cpu", "fuse"):
        verify(result, create(name), context("softmax"))
        result = run_step(create(name), result, context("softmax"))
        if name == "lower-reference":
            softmax = AVERAGE.replace("average", "softmax")
            said = "it computes in float on dequantized operands"
            assert refusals(result)[softmax] == f"{said}: query, key"
            assert refusals(result)[AVERAGE] == f"{said}: softmax, value"
    for arg in ("softmax", "value"):
        found = site_bits(result, Site(SOFTMAX.at, arg))
        assert (found.got, found.as_asked) == (8, True)
    assert AVERAGE in picture(result)
    (item,) = (item for item in inventory(result) if item.address == SOFTMAX.at)
    assert [site.site.arg for site in item.sites] == ["softmax", "value"]


def test_a_softmax_comes_back_from_a_file_bit_by_bit(tmp_path: Path) -> None:
    result = quantized()
    unet = CompiledUNet(
        replace(result, inputs=replace(result.inputs, root="UNet2DModel")),
        config={"_class_name": "UNet2DModel", "in_channels": 3},
    )
    unet.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved").program
    assert again.table.get(SOFTMAX, Planned) == result.table.get(SOFTMAX, Planned)
    for inputs in draw(result, torch.Generator().manual_seed(0)):
        assert torch.equal(outputs(again, inputs)[0], outputs(result, inputs)[0])


def test_explain_tells_what_a_softmax_would_get() -> None:
    lines = explain(toy(), POLICIES["softmax"], "mid/*").splitlines()
    assert [line.split()[0] for line in lines[1:] if "softmax" in line.split()] == [str(SOFTMAX)]
    (line,) = (line for line in lines if str(SOFTMAX) in line)
    assert "8 bit affine per channel minmax" in line
