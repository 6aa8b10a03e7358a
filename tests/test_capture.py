"""A captured program computes what diffusers computes, at every size, and leaves the model alone."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet3DConditionModel
from diffusers.models.attention_processor import (
    ADDED_KV_ATTENTION_PROCESSORS,
    CROSS_ATTENTION_PROCESSORS,
    AttnAddedKVProcessor,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    SlicedAttnProcessor,
)
from diffusers.models.unets import unet_2d_blocks
from exporting import afresh
from models import (
    MODELS,
    captured,
    conditional,
    control,
    eager,
    model,
    one_level,
    randomize,
    relative,
    tiny_conditional,
    tiny_unconditional,
    unconditional,
)
from torch import Tensor, nn

from dmqfx.errors import CaptureError
from dmqfx.frontend.call import bind
from dmqfx.frontend.capture import capture
from dmqfx.frontend.exclusions import refuse
from dmqfx.frontend.signature import SUPPORTED, demanded, signature
from dmqfx.graph.program import Program
from dmqfx.runtime.targets import Target
from dmqfx.runtime.unet import CompiledUNet

RARE = (
    "stable-diffusion-1",
    "kandinsky-2.1",
    "k-diffusion",
    "self-attention",
    "learned-time",
    "gligen",
    "only-cross",
    "hinted",
    "control-xl",
    "control-text",
    "plain",
    "stable-diffusion-2",
    "resnet-sampling",
    "deep-floyd",
    "audio",
)
COMMON = tuple(name for name in MODELS if name not in RARE)
LONG = ("stable-diffusion-xl", "fir-sampling")  # of COMMON: at all sizes among the slow ones

# Units of the program's multiple_of; none of them is a size that was exported.
SIZES = (
    {"B": 1, "H": 4, "W": 7, "T": 3},
    {"B": 4, "H": 5, "W": 3, "T": 11},
    {"B": 2, "H": 8, "W": 8, "T": 1},
)

NOT_COVERED: Mapping[str, str] = {
    "DownEncoderBlock2D": "a block of the autoencoder: it takes no time embedding, and no UNet can call it",
    "AttnDownEncoderBlock2D": "a block of the autoencoder",
    "UpDecoderBlock2D": "a block of the autoencoder",
    "AttnUpDecoderBlock2D": "a block of the autoencoder",
}

OPTIONS_NOT_COVERED: Mapping[tuple[str, str], str] = {
    ("UNet2DConditionModel", "num_attention_heads"): "diffusers refuses it",
    ("UNet2DConditionModel", "dual_cross_attention"): "diffusers cannot run it",
}


@pytest.fixture(autouse=True, scope="module")
def exported_afresh() -> Iterator[None]:
    """Nothing here comes from the export of another model."""
    with afresh():
        yield


def assert_equals_eager(unet: nn.Module, program: Program, sizes: Mapping[str, int]) -> None:
    unit = program.inputs.multiple_of
    scaled = {name: size * unit if name in "HW" else size for name, size in sizes.items()}
    inputs = program.inputs.draw(torch.Generator().manual_seed(1), **scaled)
    got = program(**inputs)
    expected = eager(unet, inputs)
    for ours, theirs in zip(got if isinstance(got, tuple) else (got,), expected, strict=True):
        assert ours.isfinite().all()
        assert relative(ours, theirs) <= 1e-6, scaled


def slowly(*case: object, **more: Any) -> object:
    """A case among the slow ones."""
    return pytest.param(*case, marks=pytest.mark.slow, **more)


def assert_equals_eager_at_all_sizes(name: str) -> None:
    unet, program = captured(name)
    for sizes in SIZES:
        assert_equals_eager(unet, program, sizes)


@pytest.mark.parametrize("name", [*(name for name in COMMON if name not in LONG), *map(slowly, LONG)])
def test_a_captured_model_equals_eager_at_sizes_it_was_not_captured_at(name: str) -> None:
    assert_equals_eager_at_all_sizes(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RARE)
def test_a_rare_captured_model_equals_eager_too(name: str) -> None:
    assert_equals_eager_at_all_sizes(name)


@pytest.mark.parametrize("name", [*COMMON, "plain", *map(slowly, ("self-attention", "audio"))])
def test_what_a_graph_reads_is_known_before_it_is_captured(name: str) -> None:
    unet, program = captured(name)
    assert [i.name for i in demanded(unet).inputs] == [i.name for i in program.inputs.inputs]


def test_the_comparison_with_eager_notices_one_bias_that_is_off_by_a_thousandth() -> None:
    unet, program = tiny_unconditional()
    other = MODELS["unconditional"]()
    other.load_state_dict(unet.state_dict())
    with torch.no_grad():
        other.mid_block.resnets[0].norm1.bias[0] += 1e-3
    with pytest.raises(AssertionError):
        assert_equals_eager(other.eval(), program, SIZES[0])


def test_a_conditional_program_takes_odd_and_tiny_latents() -> None:
    unet, program = tiny_conditional()
    assert program.inputs.multiple_of == 1
    for height, width in ((1, 1), (2, 1), (7, 9), (15, 4), (33, 2)):
        assert_equals_eager(unet, program, {"B": 1, "H": height, "W": width, "T": 2})


def test_a_program_takes_more_than_64_samples() -> None:
    unet, program = tiny_conditional()
    assert_equals_eager(unet, program, {"B": 65, "H": 3, "W": 2, "T": 2})


@pytest.mark.parametrize("levels", [2, slowly(3)])
def test_blocks_that_cannot_double_to_an_odd_size_say_so_in_multiple_of(levels: int) -> None:
    assert tiny_unconditional()[1].inputs.multiple_of == 2
    later = conditional(
        block_out_channels=(8,) * levels,
        down_block_types=("DownBlock2D",) * levels,
        mid_block_type=None,
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")[-levels:],
    )
    assert capture(later.eval()).inputs.multiple_of == 2 ** (levels - 1)


@pytest.mark.slow
def test_blocks_of_resnets_that_cannot_double_to_an_odd_size_say_so_too() -> None:
    assert captured("deep-floyd")[1].inputs.multiple_of == 4


def test_a_timestep_may_differ_for_every_sample_of_a_batch() -> None:
    _, program = tiny_conditional()
    inputs = program.inputs.draw(torch.Generator().manual_seed(2), B=3)
    whole = program(**inputs)
    alone = [program(**{name: tensor[k : k + 1] for name, tensor in inputs.items()}) for k in range(3)]
    assert len(set(inputs["timestep"].tolist())) == 3
    assert relative(torch.cat(alone), whole) <= 1e-6  # type: ignore[arg-type]  # one output


def test_fourier_embeddings_of_time_are_those_of_a_float32_timestep() -> None:
    unet, program = captured("fir-sampling")
    inputs = program.inputs.draw(torch.Generator().manual_seed(6), B=1)
    precise = inputs["timestep"] = torch.tensor([250.25], dtype=torch.float64)
    found = program(**bind(program.inputs, (), inputs))
    assert torch.equal(found, eager(unet, {**inputs, "timestep": precise.float()})[0])  # type: ignore[arg-type]  # one output
    assert 0 < relative(found, eager(unet, inputs)[0]) < 1e-3  # type: ignore[arg-type]  # one output


# What a graph looks like


def test_every_operation_has_its_own_address() -> None:
    _, program = tiny_conditional()
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert len({n.meta["address"] for n in calls}) == len(calls)
    assert {
        "conv_in/conv2d",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2/scaled_dot_product_attention",
    } <= {str(n.meta["address"]) for n in calls}


def test_a_module_that_runs_twice_counts_on() -> None:
    _, program = captured("class-timestep")
    assert {str(n.meta["address"]) for n in program.calls("sin")} == {"time_proj/sin", "time_proj/sin#1"}


def test_nodes_know_an_address_and_a_value_and_nothing_else() -> None:
    _, program = captured("plain", residuals=True)
    for node in program.graph.nodes:
        assert set(node.meta) <= {"address", "val"}
        assert ("address" in node.meta) == (node.op == "call_function")


def test_weights_have_their_names_in_the_model_and_share_its_memory() -> None:
    unet, program = tiny_conditional()
    state = unet.state_dict()
    assert set(program.weights()) == set(state)
    for name, tensor in program.weights().items():
        assert tensor.data_ptr() == state[name].data_ptr()
        assert not tensor.requires_grad


def test_placeholders_are_the_inputs_in_order() -> None:
    for name in ("unconditional", "conditional", "control", "stable-diffusion-xl"):
        _, program = captured(name)
        placeholders = [str(n.target) for n in program.graph.nodes if n.op == "placeholder"]
        assert placeholders == [i.name for i in program.inputs.inputs]


def test_a_graph_never_changes_a_tensor() -> None:
    _, program = captured("fir-sampling")
    assert not [n for n in program.calls() if hasattr(n.target, "_schema") and n.target._schema.is_mutable]


def test_an_input_that_nothing_reads_is_not_an_input() -> None:
    assert "encoder_hidden_states" not in {i.name for i in captured("kandinsky-2.2")[1].inputs.inputs}


def test_example_values_have_the_sizes_of_the_input_specification() -> None:
    _, program = captured("stable-diffusion-xl")
    for node in program.graph.nodes:
        if node.op == "placeholder":
            wanted = next(i for i in program.inputs.inputs if i.name == node.target)
            assert tuple(node.meta["val"].shape) == wanted.shape(program.inputs.sizes)


def test_a_control_net_names_its_outputs_after_the_inputs_they_become() -> None:
    _, control = captured("control")
    _, unet = captured("plain", residuals=True)
    assert control.inputs.outputs == tuple(i.name for i in unet.inputs.inputs if i.optional)


# Residuals


def test_residuals_of_a_control_net_reach_the_skips() -> None:
    unet, program = captured("plain", residuals=True)
    for sizes in SIZES:
        assert_equals_eager(unet, program, sizes)


def test_a_missing_residual_is_a_zero_that_changes_nothing() -> None:
    unet, program = captured("plain", residuals=True)
    inputs = program.inputs.draw(torch.Generator().manual_seed(3), B=3, H=7, W=5)
    inputs.update({i.name: torch.zeros(1, 1, 1, 1) for i in program.inputs.inputs if i.optional})
    without = {name: tensor for name, tensor in inputs.items() if "residual" not in name}
    without["encoder_hidden_states"] = torch.zeros(3, 1, 16)  # which nothing reads
    assert torch.equal(program(**inputs), eager(unet, without)[0])  # type: ignore[arg-type]  # one output


def test_residuals_have_the_sizes_of_the_skips() -> None:
    _, program = captured("plain", residuals=True)
    assert [i.dims for i in program.inputs.inputs if i.optional] == [
        ("B", 16, "H", "W"),
        ("B", 16, "H", "W"),
        ("B", 16, "H/2", "W/2"),
        ("B", 32, "H/2", "W/2"),
        ("B", 32, "H/2", "W/2"),
    ]


# The model stays as it was


def fresh(**changes: object) -> nn.Module:
    unet = one_level(**changes)
    randomize(unet)
    return unet.eval()


def test_capture_changes_neither_parameters_nor_modes() -> None:
    unet = fresh().train()
    unet.conv_in.eval()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    modes = {name: module.training for name, module in unet.named_modules()}
    program = capture(unet)
    assert {name: module.training for name, module in unet.named_modules()} == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    assert all(p.requires_grad for p in unet.parameters())
    assert all(node.args[2] is False for node in program.calls("dropout"))


def test_a_failed_capture_restores_modes_too() -> None:
    unet = fresh().train()
    unet.mid_block = Broken()
    with pytest.raises(CaptureError):
        capture(unet)
    assert unet.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, slowly(torch.float64)])
def test_a_model_is_captured_in_its_own_dtype(dtype: torch.dtype) -> None:
    unet = fresh().to(dtype)
    program = capture(unet)
    inputs = program.inputs.draw(torch.Generator().manual_seed(4), H=6, W=5)
    inputs = {i.name: inputs[i.name].to(i.dtype) for i in program.inputs.inputs}
    assert program.dtype == dtype
    assert torch.equal(program(**inputs), eager(unet, inputs)[0])  # type: ignore[arg-type]  # one output


def test_a_half_precision_program_becomes_a_whole_float32_program() -> None:
    unet = fresh().half()
    program = capture(unet).astype(torch.float32)
    inputs = program.inputs.draw(torch.Generator().manual_seed(5), H=5, W=6)
    assert torch.equal(program(**inputs), eager(unet.float(), inputs)[0])  # type: ignore[arg-type]  # one output
    assert program.dtype == torch.float32


def test_a_control_net_reads_no_projected_context_and_no_picture_s_embedding() -> None:
    hidden = {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_image_proj"}
    inputs = signature(control(addition_embed_type="text_image", **hidden)).inputs
    assert {i.name: i.dims for i in inputs}["encoder_hidden_states"] == ("B", "T", 16)
    assert not {"text_embeds", "image_embeds"} & {i.name for i in inputs}


def test_levels_of_different_context_widths_take_no_context() -> None:
    assert "encoder_hidden_states" not in {i.name for i in demanded(model("audio")).inputs}


def test_a_sample_size_that_does_not_halve_is_rounded_up_in_the_example() -> None:
    assert signature(unconditional(sample_size=15)).sizes == {"B": 2, "H": 16, "W": 16}
    assert signature(unconditional(sample_size=(15, 7))).sizes == {"B": 2, "H": 16, "W": 8}
    assert signature(conditional(sample_size=15)).sizes == {"B": 2, "H": 15, "W": 15, "T": 8}


def test_residual_sizes_are_told_apart_even_where_the_example_is_one_pixel() -> None:
    unet = conditional(
        sample_size=2,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type=None,
        up_block_types=("UpBlock2D",) * 3,
    )
    dims = [i.dims[2] for i in capture(unet, residuals=True).inputs.inputs if i.optional]
    assert dims == ["H", "H", "H/2", "H/2", "H/4", "H/4", "H/4"]


@pytest.mark.slow
def test_residuals_of_an_encoder_that_rounds_down_are_taken_at_sizes_that_halve_evenly() -> None:
    unet = conditional(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        mid_block_type=None,
        up_block_types=("UpBlock2D",) * 2,
        downsample_padding=0,
    )
    randomize(unet)
    with_residuals, without = (capture(unet.eval(), residuals=flag) for flag in (True, False))
    assert (with_residuals.inputs.multiple_of, without.inputs.multiple_of) == (2, 1)
    assert [i.dims[2] for i in with_residuals.inputs.inputs if i.optional] == ["H", "H", "H/2", "H/2", "H/2"]
    for program in (with_residuals, without):
        assert_equals_eager(unet, program, {"B": 2, "H": 3, "W": 5, "T": 2})


@pytest.mark.parametrize(
    ("processor", "mid"),
    [
        (AttnProcessor(), "UNetMidBlock2DCrossAttn"),
        slowly(AttnAddedKVProcessor(), "UNetMidBlock2DSimpleCrossAttn"),
    ],
)
def test_other_attention_processors_are_captured_as_they_are(processor: object, mid: str) -> None:
    unet = fresh(mid_block_type=mid)
    unet.set_attn_processor(processor)
    program = capture(unet)
    assert not list(program.calls("scaled_dot_product_attention"))
    assert_equals_eager(unet, program, SIZES[1])


def test_fused_projections_are_captured_as_they_are() -> None:
    unet = fresh()
    unet.fuse_qkv_projections()
    program = capture(unet)
    assert [name for name in program.weights() if name.endswith("to_qkv.weight")]
    assert_equals_eager(unet, program, SIZES[1])


# Errors


class Broken(nn.Module):
    def forward(self, sample: Tensor, *_: object, **__: object) -> Tensor:
        return sample * 2 if sample.sum() > 0 else sample


class Doubling(AttnProcessor2_0):
    """Does something else when there are more than 200 tokens."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        result: Tensor = super().__call__(attn, hidden_states, *args, **kwargs)
        return result * 2 if hidden_states.shape[1] > 200 else result


class Looping(AttnProcessor2_0):
    """Takes the batch apart in Python."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return torch.stack(list(super().__call__(attn, hidden_states, *args, **kwargs)))


class SageAttnProcessor(AttnProcessor2_0):
    pass


def with_processor(processor: object) -> nn.Module:
    unet = fresh()
    unet.set_attn_processor(processor)
    return unet


def with_adapter() -> nn.Module:
    unet = fresh()
    adapter = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    unet.mid_block.attentions[0].proj_out = adapter(2, 2)
    return unet


def with_chunks() -> nn.Module:
    unet = fresh()
    unet.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(2, 1)
    return unet


def with_free_u() -> nn.Module:
    unet = fresh()
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    return unet


def without_weights() -> nn.Module:
    with torch.device("meta"):
        return one_level()


def with_hook() -> nn.Module:
    unet = fresh()
    unet.conv_in._hf_hook = object()
    return unet


def with_image_adapter() -> nn.Module:
    unet = fresh()
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return unet


def with_codes() -> nn.Module:
    unet = fresh()
    unet.is_quantized = True
    return unet


def with_broken_block() -> nn.Module:
    unet = fresh()
    unet.mid_block = Broken()
    return unet


def three_dimensional() -> nn.Module:
    return UNet3DConditionModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock3D",),
        up_block_types=("UpBlock3D",),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        layers_per_block=1,
    )


def compiled_control_net() -> nn.Module:
    unet, program = captured("control")
    return CompiledUNet(program, config=unet.config, target=Target("float", (), ""))


FIRST = "down_blocks.0.attentions.0"
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
EAGER_FAILS = "diffusers cannot run this model either"

# What docs/capture.md calls it, a model, the address, and words of the error.
REFUSED: list[tuple[str, Callable[[], object], str, str]] = [
    ("other classes", partial(nn.Linear, 2, 2), "", "UNet2DModel, UNet2DConditionModel, ControlNetModel"),
    ("other classes", three_dimensional, "", "UNet3DConditionModel is not a supported UNet"),
    ("compiled already", compiled_control_net, "", "float model that it was compiled from"),
    ("dual_cross_attention", partial(conditional, dual_cross_attention=True), FIRST, EAGER_FAILS),
    ("LoRA", with_adapter, "mid_block.attentions.0.proj_out", "fuse_lora()"),
    ("IP-Adapters", with_image_adapter, "", "unload_ip_adapter()"),
    ("attention processors", partial(with_processor, SageAttnProcessor()), ATTENTION, "AttnProcessor2_0()"),
    (
        "CustomDiffusion",
        partial(with_processor, CustomDiffusionAttnProcessor(False, False)),
        ATTENTION,
        "part of a",
    ),
    ("sliced attention", partial(with_processor, SlicedAttnProcessor(1)), ATTENTION, "AttnProcessor2_0()"),
    ("sliced attention", with_chunks, "mid_block.attentions.0.transformer_blocks.0", "chunking"),
    ("FreeU", with_free_u, "up_blocks.0", "disable_freeu()"),
    ("offloading", with_hook, "conv_in", "offload"),
    ("torch.compile", partial(torch.compile, one_level()), "", "unet._orig_mod"),
    ("meta device", without_weights, "", "not loaded"),
    ("meta device", with_codes, "", "float model"),
    ("Your own modules", with_broken_block, "mid_block", "torch.export"),
    ("Your own modules", partial(with_processor, Doubling()), ATTENTION, "larger sizes"),
    ("Your own modules", partial(with_processor, Looping()), "", "specialized"),
]


@pytest.mark.parametrize(
    ("make", "address", "says"),
    [(slowly if case[3] == "specialized" else pytest.param)(*case[1:], id=case[0]) for case in REFUSED],
)
def test_what_cannot_be_captured_is_named_with_a_way_out(
    make: Callable[[], nn.Module], address: str, says: str
) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(make())  # type: ignore[arg-type]  # the wrong type is the point
    assert caught.value.address == address
    assert caught.value.mend
    assert says in str(caught.value)


# What diffusers ships


def shipped_block_types() -> set[str]:
    """Every block name that diffusers' own factories compare with."""
    factories = (unet_2d_blocks.get_down_block, unet_2d_blocks.get_mid_block, unet_2d_blocks.get_up_block)
    trees = [ast.parse(inspect.getsource(factory)) for factory in factories]
    compared = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Compare)]
    constants = [c for n in compared for c in n.comparators if isinstance(c, ast.Constant)]
    return {c.value for c in constants if isinstance(c.value, str) and "Block" in c.value}


def captured_block_types() -> set[str]:
    configs = [model(name).config for name in MODELS]
    lists = [(*c.down_block_types, *c.get("up_block_types", ()), c.get("mid_block_type")) for c in configs]
    return {name for names in lists for name in names if name is not None}


def test_every_block_type_of_diffusers_is_captured_or_excluded_with_a_reason() -> None:
    shipped = shipped_block_types()
    assert len(shipped) > 20
    assert shipped == captured_block_types() | set(NOT_COVERED)
    assert not captured_block_types() & set(NOT_COVERED)


def test_the_page_on_capture_names_every_block_type_and_every_slow_model() -> None:
    page = (Path(__file__).parent.parent / "docs" / "capture.md").read_text(encoding="utf-8")
    assert [name for name in (*shipped_block_types(), *RARE) if f"`{name}`" not in page] == []


def test_every_attention_processor_of_diffusers_is_captured_or_refused_by_name() -> None:
    shipped = {p.__name__ for p in (*CROSS_ATTENTION_PROCESSORS, *ADDED_KV_ATTENTION_PROCESSORS)}
    refused = set()
    for name in shipped:
        unet = fresh()
        unet.set_attn_processor(type(name, (AttnProcessor2_0,), {})())
        with suppress(CaptureError):
            refuse(unet)
            continue
        refused.add(name)
    assert len(shipped) > 8
    assert shipped - refused == {
        *("AttnProcessor", "AttnProcessor2_0", "AttnAddedKVProcessor", "AttnAddedKVProcessor2_0"),
    }


def options(cls: type) -> dict[str, object]:
    """What a diffusers class can be configured with, and the defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name != "self"
    }


def test_every_option_of_diffusers_is_set_in_a_tested_model_or_excluded_with_a_reason() -> None:
    there = {(cls.__name__, name) for cls in SUPPORTED for name in options(cls)}
    tried = {
        (type(model(name)).__name__, option)
        for name in MODELS
        for option, default in options(type(model(name))).items()
        if model(name).config[option] != default
    }
    assert len(there) > 100
    assert there == tried | set(OPTIONS_NOT_COVERED)
    assert not tried & set(OPTIONS_NOT_COVERED)


def test_the_page_on_capture_lists_what_is_refused_and_nothing_else() -> None:
    page = (Path(__file__).parent.parent / "docs" / "capture.md").read_text(encoding="utf-8")
    section = page.partition("## What is not captured")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "---" not in line][1:]
    words = {case[0] for case in REFUSED}
    assert [row for row in rows if not any(word in row for word in words)] == []
    assert [word for word in words if word not in section] == []
