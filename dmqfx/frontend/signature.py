"""What a diffusers UNet takes, read from its configuration: one flat, named list of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import TypeAlias, TypeGuard

import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel

from dmqfx.graph.inputs import Dim, Input, InputSpec

UNet: TypeAlias = UNet2DModel | UNet2DConditionModel | ControlNetModel
SUPPORTED = (UNet2DModel, UNet2DConditionModel, ControlNetModel)


def signature(unet: UNet, *, residuals: bool = False) -> InputSpec:
    """The inputs that this configuration can read, at batch 2 and the latent size it was trained at.

    Residuals are listed with dims of 1; their real sizes are seen once there is a graph.
    """
    inputs = [*_common(unet), *_labels(unet), *_added(unet)]
    if isinstance(unet, ControlNetModel):
        inputs += _control(unet)
    if residuals and isinstance(unet, UNet2DConditionModel):
        names = [f"down_residual_{k}" for k in range(_skips(unet))] + ["mid_residual"]
        inputs += [Input(name, (1, 1, 1, 1), "residual", unet.dtype) for name in names]
    root = next(supported.__name__ for supported in SUPPORTED if isinstance(unet, supported))
    return InputSpec(root, tuple(inputs), _sizes(unet), multiple_of(unet), unread=tuple(_unread(unet)))


def demanded(unet: UNet, *, residuals: bool = False) -> InputSpec:
    """The signature without a context that no block attends to: what the graph reads, before there is one."""
    spec, blocks = signature(unet, residuals=residuals), [*unet.down_blocks, unet.mid_block]
    blocks += getattr(unet, "up_blocks", ())
    if any(getattr(block, "has_cross_attention", False) for block in blocks):
        return spec
    unread = [i.name for i in spec.inputs if i.name in ("encoder_hidden_states", "image_embeds")]
    read = tuple(i for i in spec.inputs if i.name not in unread)
    return replace(spec, inputs=read, unread=(*spec.unread, *unread))


def is_supported(module: object) -> TypeGuard[UNet]:
    """Whether a module is a float model of a supported class; a compiled ControlNet is of one too, but has none."""
    return isinstance(module, SUPPORTED) and not hasattr(module, "program")


def multiple_of(unet: UNet) -> int:
    """What height and width must be multiples of: an unconditional UNet cannot double back to an odd size."""
    return 2 ** (len(unet.config.block_out_channels) - 1) if isinstance(unet, UNet2DModel) else 1


def rounded_up(sizes: Mapping[str, int], multiple: int) -> Mapping[str, int]:
    """Sizes whose height and width are the next multiples."""
    return {**sizes, **{side: -(-sizes[side] // multiple) * multiple for side in "HW"}}


def _common(unet: UNet) -> Iterator[Input]:
    config, dtype = unet.config, unet.dtype
    hint = (
        4 if config.get("addition_embed_type") == "image_hint" else 0
    )  # the hint's four channels join the sample
    yield Input("sample", ("B", config.in_channels - hint, "H", "W"), "normal", dtype)
    yield Input("timestep", ("B",), "timestep")
    if config.get("time_cond_proj_dim") is not None:
        yield Input("timestep_cond", ("B", config.time_cond_proj_dim), "normal", dtype)
    if (width := _context(unet)) is not None:
        yield Input("encoder_hidden_states", ("B", "T", width), "normal", dtype)


def _context(unet: UNet) -> int | None:
    """Channels of the context that a caller passes; None if there is none."""
    config = unet.config
    if isinstance(unet, UNet2DModel) or config.encoder_hid_dim_type == "image_proj":
        return None
    if (
        isinstance(unet, ControlNetModel) or config.encoder_hid_dim_type is None
    ):  # a ControlNet projects nothing
        width = config.cross_attention_dim
    else:
        width = config.encoder_hid_dim
    widths = {width} if isinstance(width, int) else set(width)
    return int(widths.pop()) if len(widths) == 1 else None  # different ones: every level attends to itself


def _unread(unet: UNet) -> Iterator[str]:
    """What diffusers demands or its pipelines say, and this configuration does not look at."""
    if unet.config.get("encoder_hid_dim_type") == "image_proj":
        yield "encoder_hidden_states"
    if unet.config.get("global_pool_conditions"):
        yield "guess_mode"


def _labels(unet: UNet) -> Iterator[Input]:
    config, dtype = unet.config, unet.dtype
    if unet.class_embedding is None:
        return
    embedded = unet.time_embedding.linear_2.out_features
    classes = config.num_class_embeds or config.get("num_train_timesteps") or 1
    match config.class_embed_type:
        case None:
            yield Input("class_labels", ("B",), "label", torch.int64, classes)
        case "timestep" if config.get("time_embedding_type") == "learned":
            yield Input("class_labels", ("B",), "label", torch.int64, config.num_train_timesteps)
        case "timestep":
            yield Input("class_labels", ("B",), "size")
        case "identity":
            yield Input("class_labels", ("B", embedded), "normal", dtype)
        case _:
            yield Input("class_labels", ("B", config.projection_class_embeddings_input_dim), "normal", dtype)


def _added(unet: UNet) -> Iterator[Input]:
    """What diffusers takes inside `added_cond_kwargs`."""
    config, dtype = unet.config, unet.dtype
    kind, context = config.get("addition_embed_type"), config.get("encoder_hid_dim_type")
    if kind == "text_time":
        yield Input("text_embeds", ("B", "E"), "normal", dtype)
        yield Input("time_ids", ("B", "I"), "size")
    if isinstance(unet, ControlNetModel):
        return  # it has the embeddings of pictures, and never calls them
    if kind == "text_image":
        yield Input("text_embeds", ("B", config.cross_attention_dim), "normal", dtype)
    if kind == "text_image" or context == "text_image_proj":
        yield Input("image_embeds", ("B", config.cross_attention_dim), "normal", dtype)
    elif kind in ("image", "image_hint") or context == "image_proj":
        yield Input("image_embeds", ("B", config.encoder_hid_dim), "normal", dtype)
    if kind == "image_hint":
        yield Input("hint", ("B", 3, "H*8", "W*8"), "normal", dtype)


def _control(unet: ControlNetModel) -> Iterator[Input]:
    config = unet.config
    halvings = len(config.conditioning_embedding_out_channels) - 1
    dims: tuple[Dim, ...] = ("B", config.conditioning_channels, f"H*{2**halvings}", f"W*{2**halvings}")
    yield Input("controlnet_cond", dims, "normal", unet.dtype)
    yield Input("conditioning_scale", (), "normal")


def _skips(unet: UNet2DConditionModel) -> int:
    """At most so many skip connections leave the encoder."""
    parts = (chain(block.resnets, getattr(block, "downsamplers", None) or ()) for block in unet.down_blocks)
    return 1 + sum(1 for _ in chain.from_iterable(parts))


def _sizes(unet: UNet) -> Mapping[str, int]:
    config = unet.config
    size = config.get("sample_size") or 32
    height, width = (size, size) if isinstance(size, int) else size
    sizes = dict(rounded_up({"B": 2, "H": int(height), "W": int(width)}, multiple_of(unet)))
    if (width := _context(unet)) is not None:
        sizes["T"] = 77 if width >= 512 else 8
    if config.get("addition_embed_type") == "text_time":
        sizes.update(_pooled(config.projection_class_embeddings_input_dim, config.addition_time_embed_dim))
    return sizes


def _pooled(total: int, each: int) -> Mapping[str, int]:
    """Width of the pooled text, and number of size ids: six, but five beside the refiner's 1280 channels."""
    ids = 5 if total - 5 * each == 1280 else 6
    while ids > 1 and total - ids * each <= 0:
        ids -= 1
    return {"E": total - ids * each, "I": ids}
