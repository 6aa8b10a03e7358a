"""Small real diffusers models with random parameters, by name, each built and captured once per process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel
from exporting import afresh
from torch import Tensor

from dmqfx.checking.shrink import randomize
from dmqfx.frontend.capture import capture
from dmqfx.graph.program import Program

ADDED = ("text_embeds", "time_ids", "image_embeds", "hint")
Model = UNet2DModel | UNet2DConditionModel | ControlNetModel


def unconditional(**changes: object) -> UNet2DModel:
    """Two levels, self-attention at the lower one."""
    config: dict[str, object] = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**config, **changes})


def conditional(**changes: object) -> UNet2DConditionModel:
    """Two levels, cross-attention at both."""
    config: dict[str, object] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**config, **changes})


def one_level(**changes: object) -> UNet2DConditionModel:
    """The least that diffusers calls a conditional UNet: for what lies outside the blocks."""
    config: dict[str, object] = {
        "block_out_channels": (16,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    }
    return conditional(**{**config, **changes})


def control(**changes: object) -> ControlNetModel:
    """The encoder of `conditional`, with a hint picture four times the latent's size."""
    config: dict[str, object] = {
        "in_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "conditioning_embedding_out_channels": (4, 8, 8),
    }
    return ControlNetModel(**{**config, **changes})


MODELS: Mapping[str, Callable[[], Model]] = {
    "unconditional": unconditional,
    "conditional": conditional,
    "control": control,
    "plain": partial(
        conditional,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ),
    "stable-diffusion-1": partial(
        conditional,
        block_out_channels=(8, 16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    ),
    "stable-diffusion-2": partial(
        conditional,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        upcast_attention=True,
    ),
    "stable-diffusion-xl": partial(
        conditional,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    ),
    "inpainting": partial(one_level, in_channels=9),
    "consistency": partial(
        one_level, time_cond_proj_dim=12, timestep_post_act="silu", time_embedding_act_fn="gelu"
    ),
    "classes": partial(
        unconditional,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        in_channels=2,
        out_channels=4,
        num_class_embeds=5,
        center_input_sample=True,
        time_embedding_dim=40,
        flip_sin_to_cos=False,
        freq_shift=1,
        act_fn="mish",
        norm_eps=1e-4,
        dropout=0.1,
    ),
    "class-timestep": partial(
        one_level,
        class_embed_type="timestep",
        out_channels=8,
        center_input_sample=True,
        time_embedding_dim=40,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-4,
        dropout=0.1,
    ),
    "class-projection": partial(
        one_level, class_embed_type="projection", projection_class_embeddings_input_dim=12
    ),
    "class-identity": partial(one_level, class_embed_type="identity", class_embeddings_concat=True),
    "resnet-sampling": partial(
        unconditional,
        block_out_channels=(8, 8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=4,
        mid_block_scale_factor=1.4,
    ),
    "fir-sampling": partial(
        unconditional,
        block_out_channels=(32, 64),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        time_embedding_type="fourier",
        add_attention=False,
    ),
    "deep-floyd": partial(
        conditional,
        block_out_channels=(16, 16, 32),
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 2),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 2, "ResnetUpsampleBlock2D"),
        only_cross_attention=(False, True, True),
        mid_block_only_cross_attention=True,
        mid_block_scale_factor=1.4,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        encoder_hid_dim=24,
        encoder_hid_dim_type="text_proj",
        cross_attention_dim=32,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        resnet_skip_time_act=True,
        resnet_out_scale_factor=1.4,
        time_embedding_act_fn="gelu",
        act_fn="gelu",
    ),
    "kandinsky-2.1": partial(
        one_level,
        addition_embed_type="text_image",
        encoder_hid_dim=24,
        encoder_hid_dim_type="text_image_proj",
    ),
    "kandinsky-2.2": partial(
        one_level, addition_embed_type="image", encoder_hid_dim=24, encoder_hid_dim_type="image_proj"
    ),
    "kandinsky-2.2-hint": partial(
        one_level,
        in_channels=8,
        addition_embed_type="image_hint",
        encoder_hid_dim=24,
        encoder_hid_dim_type="image_proj",
    ),
    "k-diffusion": partial(
        conditional,
        block_out_channels=(32, 64, 64),
        attention_head_dim=16,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        act_fn="gelu",
        time_embedding_type="fourier",
        conv_in_kernel=1,
        conv_out_kernel=1,
        norm_num_groups=None,
    ),
    "self-attention": partial(
        conditional,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=7,
        downsample_padding=0,
    ),
    "learned-time": partial(
        unconditional,
        time_embedding_type="learned",
        num_train_timesteps=1000,
        class_embed_type="identity",
        attention_head_dim=None,
        mid_block_type=None,
        downsample_padding=0,
    ),
    "gligen": partial(one_level, attention_type="gated"),
    "only-cross": partial(
        conditional,
        only_cross_attention=True,
        layers_per_block=(2, 1),
        transformer_layers_per_block=((2, 1), 1),
        reverse_transformer_layers_per_block=(1, (1, 1, 2)),
    ),
    "audio": partial(
        conditional,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(16, 32),
        class_embed_type="simple_projection",
        class_embeddings_concat=True,
        projection_class_embeddings_input_dim=12,
    ),
    "hinted": partial(
        conditional,
        in_channels=8,
        norm_num_groups=4,
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        addition_embed_type="image_hint",
        encoder_hid_dim=24,
        encoder_hid_dim_type="image_proj",
    ),
    "control-xl": partial(
        control,
        controlnet_conditioning_channel_order="bgr",
        global_pool_conditions=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
        num_class_embeds=3,
        num_attention_heads=(2, 4),
        transformer_layers_per_block=(1, 2),
        only_cross_attention=True,
        use_linear_projection=True,
        upcast_attention=True,
    ),
    "control-text": partial(
        control,
        in_channels=3,
        conditioning_channels=1,
        mid_block_type="UNetMidBlock2D",
        class_embed_type="timestep",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
        resnet_time_scale_shift="scale_shift",
        mid_block_scale_factor=1.4,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        act_fn="gelu",
        norm_eps=1e-4,
    ),
}


@cache
def model(name: str) -> Model:
    """The named model with random parameters, in evaluation mode."""
    built = MODELS[name]()
    randomize(built)
    return built.eval().requires_grad_(False)


@cache
def captured(name: str, residuals: bool = False) -> tuple[Model, Program]:
    """The named model and its program."""
    with afresh():
        return model(name), capture(model(name), residuals=residuals)


def tiny_unconditional() -> tuple[Model, Program]:
    """A UNet2DModel with self-attention and its program, once per process."""
    return captured("unconditional")


def tiny_conditional() -> tuple[Model, Program]:
    """A UNet2DConditionModel with cross-attention and its program, once per process."""
    return captured("conditional")


def relative(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of a from b."""
    return float((a - b).norm() / b.norm())


def eager(model: Model, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What diffusers itself makes of a program's inputs, called in its own way."""
    given = dict(inputs)
    arguments: dict[str, object] = {}
    residuals = [given.pop(name) for name in list(given) if name.startswith("down_residual_")]
    if residuals:
        arguments["down_block_additional_residuals"] = residuals
        arguments["mid_block_additional_residual"] = given.pop("mid_residual")
    added = {name: given.pop(name) for name in ADDED if name in given}
    if added:
        arguments["added_cond_kwargs"] = added
    if not isinstance(model, UNet2DModel):
        arguments["encoder_hidden_states"] = given.pop("encoder_hidden_states", None)
    if isinstance(model, UNet2DModel) and model.config.time_embedding_type == "learned":
        given["timestep"] = given["timestep"].long()
    with torch.no_grad():
        result = model(**given, **arguments, return_dict=False)
    return (*result[0], result[1]) if isinstance(model, ControlNetModel) else (result[0],)
