"""quantize-attention: what it takes, what it leaves, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from models import captured
from mutants_attention import WHOLE, with_a_bit_less
from planting import context, edited, program_before
from test_split_attention import attending, masked
from toys import prompted

from dmqfx.checking.verify import checking, verify
from dmqfx.errors import PassNotFoundError, PipelineError
from dmqfx.graph import ops, registry
from dmqfx.graph.address import Site
from dmqfx.graph.facts import QDQ
from dmqfx.graph.pipeline import PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.runtime.targets import TARGETS, lower
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.seeing.bits import site_bits
from dmqfx.seeing.explain import explain
from dmqfx.seeing.inventory import inventory
from dmqfx.seeing.why import why
from dmqfx.storage.store import load

STEP = create("quantize-attention", {"keys": 1})
QUERY = Site.parse(f"{WHOLE}:query")


def coded(program: Program, **options: object) -> Program:
    """The program with its attention in codes, if nothing else."""
    return run_step(create("quantize-attention", {"keys": 1, **options}), ready(program), PassContext())


def ready(program: Program) -> Program:
    """As if insert-qdq had found nothing to do."""
    return replace(program, facts=program.facts | {QDQ})


def refusals(program: Program) -> Mapping[str, str]:
    return {str(refusal.at): refusal.reason for refusal in program.log[-1].refused}


@cache
def quantized() -> Program:
    """The toy with all layers and its attention in codes."""
    return run_step(STEP, program_before("quantize-attention", "attended"), context("attended"))


def test_every_attention_of_a_real_unet_becomes_one_of_codes_and_no_multiplication_is_lost() -> None:
    canonical = run_step(create("canonicalize"), captured("conditional")[1], PassContext())
    result = coded(canonical)
    whole = list(canonical.calls("scaled_dot_product_attention"))
    assert [n.meta["address"] for n in result.calls("qattention")] == [n.meta["address"] for n in whole]
    assert len(whole) > 2
    costs = [sum(item.macs for item in inventory(each)) for each in (canonical, result)]
    assert costs[0] == costs[1]
    assert verify(ready(canonical), STEP, PassContext()).error < 0.05


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"is_causal": True}, "it is causal"),
        ({"dropout_p": 0.25}, "it drops 0.25 of the softmax at random"),
        ({"enable_gqa": True}, "groups of heads share keys"),
        ({"scale": -2.0}, "its scale -2 is below 0"),
        (
            {"heads": 0},
            "its operands are not [batch, heads, tokens, channels], alike but for the tokens of queries",
        ),
    ],
)
def test_what_has_no_codes_stays_float_and_says_why(how: dict[str, object], reason: str) -> None:
    result = coded(attending(**how))  # type: ignore[arg-type]  # some are arguments of torch's operator
    assert list(refusals(result).values()) == [reason]
    assert len(list(result.calls("scaled_dot_product_attention"))) == 1


def test_attention_with_a_mask_stays_float_beside_one_without() -> None:
    result = coded(masked())
    assert list(refusals(result)) == ["attn2/scaled_dot_product_attention"]
    assert "it has a mask" in next(iter(refusals(result).values()))
    assert [n.meta["address"].path for n in result.calls("qattention")] == ["attn1"]


def test_few_keys_stay_float() -> None:
    assert list(refusals(coded(attending(keys=3), keys=3))) == []
    assert list(refusals(coded(attending(keys=3), keys=4)).values()) == [
        "it has 3 keys, fewer than the 4 that codes are made for (keys: 4)"
    ]


def test_what_a_rule_quantizes_keeps_its_grid() -> None:
    result = run_step(STEP, program_before("lower-reference", "attention"), context("attention"))
    assert refusals(result) == {WHOLE: "the policy quantizes its query and key and value already"}


def test_a_glob_chooses_and_must_fit() -> None:
    program = prompted()
    assert len(list(coded(program, at="**").calls("qattention"))) == 1
    with pytest.raises(PipelineError, match=r"at: nowhere\.\*\* fits none of 1 attentions"):
        coded(program, at="nowhere.**")
    with pytest.raises(PassNotFoundError, match="bits must be 2 to 8, not 9"):
        create("quantize-attention", {"bits": 9})


def test_every_target_computes_what_the_program_does() -> None:
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([10.0, 800.0])}
    before = quantized()
    lowered = {target.name: lower(before, target) for target in TARGETS}
    counts = {
        name: [len(list(each.calls(op))) for op in ("qattention", "kernel_attention")]
        for name, each in lowered.items()
    }
    assert counts == {"simulate": [1, 0], "reference": [1, 0], "cpu": [0, 1]}
    with torch.no_grad():
        expected = before.gm(*inputs.values())
        for name, each in lowered.items():
            found = each.gm(*inputs.values())
            assert float((found - expected).norm() / expected.norm()) < 2e-3, name  # a tie, perhaps


def test_each_lowering_is_verified() -> None:
    program = quantized()
    for name in ("lower-reference", "lower-cpu", "fuse", "lower-float", "hoist-invariants"):
        assert verify(program, create(name), context("attended")).step == name
        program = run_step(create(name), program, context("attended"), observe=checking())


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_number_of_bits_is_verified(bits: int) -> None:
    step = create("quantize-attention", {"keys": 1, "bits": bits})
    program = program_before("quantize-attention", "attended")
    assert verify(program, step, context("attended")).step == "quantize-attention"


def test_a_program_that_the_kernel_cannot_take_stays_in_plain_torch_and_says_why() -> None:
    lowered = lower(quantized().astype(torch.float64), "cpu")
    record = next(done for done in lowered.log if done.name == "lower-cpu")
    said = {str(each.at): each.reason for each in record.refused}
    assert said[WHOLE].startswith("the kernel takes float32 and heads of up to 1024 channels, not float64 of")
    assert len(list(lowered.calls("qattention"))) == 1


def test_bits_are_told_as_what_they_are() -> None:
    for program in (quantized(), lower(quantized(), "cpu")):
        bits = site_bits(program, QUERY)
        assert (bits.got, bits.asked_bits, bits.as_asked, bits.asked) == (8, 8, True, None)
        told = why(program, WHOLE)
        assert "asked  8 bit, by step quantize-attention" in told
        assert "got    8 bit, dynamic codes, made at every call" in told
    altered = edited("kernel_attention", with_a_bit_less)("lower-cpu").run(
        lower(quantized(), "reference"), PassContext()
    )
    bits = site_bits(altered, QUERY)
    assert (bits.got, bits.asked_bits, bits.as_asked) == (7, 8, False)
    fewer = run_step(
        create("quantize-attention", {"bits": 7, "keys": 1}),
        program_before("quantize-attention", "attended"),
        PassContext(),
    )
    assert [site_bits(fewer, Site(QUERY.at, arg)).got for arg in ("query", "key", "value")] == [7, 8, 8]


def test_a_saved_model_has_the_bits_of_before(tmp_path: Path) -> None:
    result = quantized()
    named = replace(result, inputs=replace(result.inputs, root="UNet2DModel"))
    unet = CompiledUNet(named, config={"_class_name": "UNet2DModel", "in_channels": 3}, target="cpu")
    unet.save_pretrained(tmp_path / "toy")
    again = load(tmp_path / "toy", target="cpu")
    sample, timestep = torch.randn(1, 3, 8, 8), torch.tensor([500.0])
    assert torch.equal(unet(sample, timestep)[0], again(sample, timestep)[0])


def test_it_needs_no_calibration_and_explain_shows_attention_as_the_plan_has_it() -> None:
    assert "mid/scaled_dot_product_attention" in explain(program_before("plan-sites"), context().policy)
    assert not STEP.needs_calibration


def test_attention_is_the_only_thing_that_changed() -> None:
    before, after = program_before("quantize-attention", "attended"), quantized()
    names = {str(n.meta["address"]): ops.name(n) for n in before.calls()}
    others = {str(n.meta["address"]): ops.name(n) for n in after.calls()}
    assert {at for at in names | others if names.get(at) != others.get(at)} == {WHOLE}


def test_it_stands_in_a_pipeline_where_it_belongs() -> None:
    with pytest.raises(PipelineError, match="qdq"):
        registry.pipeline([("canonicalize", {}), ("quantize-attention", {})]).run(
            program_before("plan-sites"), PassContext()
        )
