"""The policies that ship: what they promise, a reason for each rule, and how they fit diffusers' models."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from dmqfx import policies as shipped
from dmqfx.errors import PolicyError
from dmqfx.graph import registry
from dmqfx.graph.address import Address
from dmqfx.policy.file import parse_policy
from dmqfx.policy.policy import FLOAT, Default, Expect, Operation, PartialSpec, Policy, explain
from dmqfx.policy.schema import KEYS, RULE_KEYS, SPEC_KEYS


def test_the_shipped_policies_are_these() -> None:
    assert shipped.names() == (
        "dmq-paper-w4a6",
        "dmq-paper-w4a8",
        "w4a16",
        "w4a6",
        "w4a6-quick",
        "w4a8",
        "w4a8-quick",
        "w8a16",
        "w8a8",
    )


@pytest.mark.parametrize(
    ("name", "weight", "input_"),
    [
        (
            "w8a8",
            PartialSpec(8, "symmetric", "channel", "minmax"),
            PartialSpec(8, "affine", "tensor", "minmax", 20),
        ),
        (
            "w4a8-quick",
            PartialSpec(4, "symmetric", "channel", "mse"),
            PartialSpec(8, "affine", "tensor", "minmax", 20),
        ),
        (
            "w4a6-quick",
            PartialSpec(4, "symmetric", "channel", "mse"),
            PartialSpec(6, "affine", "tensor", "minmax", 20),
        ),
        (
            "w4a8",
            PartialSpec(4, "symmetric", "channel", "mse"),
            PartialSpec(8, "affine", "tensor", "mse", 20),
        ),
        (
            "w4a6",
            PartialSpec(4, "symmetric", "channel", "mse"),
            PartialSpec(6, "affine", "tensor", "mse", 20),
        ),
        ("w8a16", PartialSpec(8, "symmetric", "channel", "minmax"), FLOAT),
        ("w4a16", PartialSpec(4, "symmetric", "channel", "mse"), FLOAT),
    ],
)
def test_a_shipped_policy_does_what_its_name_says(name: str, weight: PartialSpec, input_: Any) -> None:
    policy = Policy.load(name)
    assert policy.default == Default(weight, input_)
    assert policy.description


def test_the_shipped_policies_keep_the_same_layers_float() -> None:
    assert len({Policy.load(name).rules for name in shipped.names()}) == 1


@pytest.mark.parametrize("name", shipped.names())
def test_every_rule_of_a_shipped_policy_has_its_reason_above_it(name: str) -> None:
    lines = shipped.text(name).splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith(("  - {name:", "  - name:"))]
    assert len(rules) == (0 if "extends:" in shipped.text(name) else 5)
    assert all(lines[number - 1].startswith("  # ") for number in rules)


def operations_of(model: nn.Module) -> list[Operation]:
    """What capture finds in a model, by its modules alone."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found.append(Operation(Address(name, "conv2d"), "conv2d"))
        elif isinstance(module, nn.Linear):
            found.append(Operation(Address(name, "linear"), "linear"))
        elif isinstance(module, Attention):
            found.append(Operation(Address(name, "scaled_dot_product_attention"), "attention"))
    return found


SMALL: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
CROSS = {"cross_attention_dim": 16, "attention_head_dim": 4, **SMALL}
DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any], set[str]]] = {
    "unconditional": (
        UNet2DModel,
        {
            **SMALL,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        {"conv_in", "conv_out", "time_embedding", "time_emb_proj"},
    ),
    "class labels": (
        UNet2DModel,
        {
            **SMALL,
            "down_block_types": DOWN[1:] * 2,
            "up_block_types": ("UpBlock2D",) * 2,
            "class_embed_type": "timestep",
        },
        {"conv_in", "conv_out", "time_embedding", "time_emb_proj", "class_embedding"},
    ),
    "projected classes and text": (
        UNet2DConditionModel,
        {
            **CROSS,
            "down_block_types": DOWN,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 8,
            "encoder_hid_dim": 12,
        },
        {"conv_in", "conv_out", "time_embedding", "time_emb_proj", "class_embedding", "encoder_hid_proj"},
    ),
    "SDXL": (
        UNet2DConditionModel,
        {
            **CROSS,
            "down_block_types": DOWN,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
            "transformer_layers_per_block": (1, 2),
        },
        {"conv_in", "conv_out", "time_embedding", "time_emb_proj", "add_embedding"},
    ),
    "adaptive norms": (
        UNet2DConditionModel,
        {
            **CROSS,
            "down_block_types": ("KCrossAttnDownBlock2D", "KDownBlock2D"),
            "up_block_types": ("KUpBlock2D", "KCrossAttnUpBlock2D"),
            "mid_block_type": None,
            "resnet_time_scale_shift": "ada_group",
        },
        {"conv_in", "conv_out", "time_embedding", "norm1", "norm2"},
    ),
    "ControlNet": (
        ControlNetModel,
        {**CROSS, "down_block_types": DOWN, "conditioning_embedding_out_channels": (8, 16)},
        {
            "conv_in",
            "time_embedding",
            "time_emb_proj",
            "controlnet_down_blocks",
            "controlnet_mid_block",
            "controlnet_cond_embedding",
        },
    ),
}


def family(site_path: str, known: set[str]) -> str:
    return next((part for part in site_path.split(".") if part in known), site_path)


@pytest.mark.parametrize("which", MODELS)
def test_a_shipped_policy_fits_a_diffusers_model_and_keeps_float_what_it_says(which: str) -> None:
    make, config, kept = MODELS[which]
    explained = explain(Policy.load("w4a8-quick"), operations_of(make(**config)))
    float_weights = {
        each.site.at.path for each in explained if each.site.arg == "weight" and each.spec is None
    }
    assert {family(path, kept) for path in float_weights} == kept
    quantized = [each for each in explained if each.spec is not None]
    assert {each.site.arg for each in quantized} == {"input", "weight"}
    assert len(quantized) > len(float_weights)
    assert all(
        each.spec == quantized[-1].spec for each in quantized if each.site.arg == quantized[-1].site.arg
    )


PAGE = (Path(__file__).parent.parent / "docs" / "policies.md").read_text(encoding="utf-8")


def test_the_first_example_of_the_reference_is_a_policy() -> None:
    example = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
    policy = parse_policy(example)
    assert [rule.name for rule in policy.rules][-2:] == ["skips", "mid"]


@pytest.mark.parametrize("key", [*KEYS, *RULE_KEYS, *SPEC_KEYS["input"], *(f.name for f in fields(Expect))])
def test_every_key_has_a_row_in_the_reference(key: str) -> None:
    assert f"\n| `{key}` | " in PAGE


@pytest.mark.parametrize("name", [*shipped.names(), *(rule.name for rule in Policy.load("w4a8-quick").rules)])
def test_every_shipped_policy_and_every_rule_of_theirs_has_a_row_in_the_reference(name: str) -> None:
    assert f"\n| `{name}` | " in PAGE


TOLD = "learn-scaling vote-shifts fit-ranges measure-sensitivity round-weights reconstruct-blocks learn-steps".split()


@pytest.mark.parametrize("step", TOLD)
def test_every_option_of_a_pass_that_learns_or_measures_has_a_row_in_one_table_of_the_reference(
    step: str,
) -> None:
    """But for `method`, which may have a table of its own."""
    options = {each.name for each in fields(registry.passes()[step])} - {"method"}
    tables = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    rows = [set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\|([^|]*)", t, re.MULTILINE)))) for t in tables]
    assert any(options <= row for row in rows)


def test_the_mistakes_in_the_reference_are_those_that_dmqfx_reports() -> None:
    text = (
        "schema: dmqfx.policy/1\nextends: w4a8-quick\ndefault:\n  weight: {bit: 4}\n"
        "rules:\n  - {name: mid, kind: conv, keep: float}\n"
    )
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "mine.yaml")
    told = str(caught.value).splitlines()
    with pytest.raises(PolicyError) as caught:
        Policy.load("w4a8-quick", ["default.weight.bits=16"])
    assert "\n".join([*told, str(caught.value)]) in PAGE


@pytest.mark.parametrize(
    ("step", "given", "told"),
    [
        (
            "round-weights",
            {"method": "nearest", "iterations": 40},
            "iterations has no effect with method nearest; it belongs to adaround",
        ),
        ("round-weights", {"method": "gptq", "rows": 5, "rate": 0.1}, "rate has no effect with method gptq"),
        ("learn-scaling", {"method": "surrogate", "batch": 9}, "batch has no effect with method surrogate"),
        ("learn-scaling", {"rows": 9}, "it belongs to surrogate and les"),
        ("vote-shifts", {"method": "mse", "agree": 0.5}, "agree has no effect with method mse"),
    ],
)
def test_options_that_change_nothing_are_told(
    step: str, given: dict[str, object], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry.create(step, given)
    (warned,) = [record.getMessage() for record in caplog.records]
    assert warned.startswith(f"{step}: ")
    assert told in warned


ABLATION = sorted((Path(__file__).parents[1] / "benchmarks" / "ablation").glob("*.yaml"))


@pytest.mark.parametrize("policy", [*shipped.names(), *map(str, ABLATION)], ids=lambda each: Path(each).stem)
def test_no_policy_of_ours_has_options_that_change_nothing(
    policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = registry.pipeline((step.name, step.keywords()) for step in Policy.load(policy).pipeline)
    assert made.steps
    assert not caplog.records
