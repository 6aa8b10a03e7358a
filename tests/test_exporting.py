"""An export is shared by models that are made alike, whatever their weights are, and by no others."""

from __future__ import annotations

from collections.abc import Callable

import exporting
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from models import eager, one_level, randomize
from torch import nn

from dmqfx.frontend.capture import capture


def small(**changes: object) -> UNet2DModel:
    config: dict[str, object] = {
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_size": 8,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "add_attention": False,
    }
    unet = UNet2DModel(**{**config, **changes})
    randomize(unet)
    return unet.eval()


def key(unet: nn.Module) -> exporting.Key:
    return exporting._key(unet, (torch.zeros(1, 3, 4, 4),), {})


def test_a_shared_graph_computes_with_the_weights_of_its_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    capture(small())
    monkeypatch.setattr(exporting, "export", pytest.fail)
    other = small()
    with torch.no_grad():
        other.conv_in.weight *= 2
    program = capture(other)
    inputs = program.inputs.draw(torch.Generator().manual_seed(1), B=3, H=6, W=4)
    assert torch.equal(program(**inputs), eager(other, inputs)[0])  # type: ignore[arg-type]  # one output
    assert all(
        tensor.data_ptr() == other.state_dict()[name].data_ptr() for name, tensor in program.weights().items()
    )


def attribute(unet: nn.Module) -> None:
    unet.mid_block.resnets[0].output_scale_factor = 2.0


def option(unet: nn.Module) -> None:
    unet.register_to_config(center_input_sample=True)


def dtype(unet: nn.Module) -> None:
    unet.conv_in.double()


def layer(unet: nn.Module) -> None:
    unet.conv_norm_out = nn.Identity()


def tied(unet: nn.Module) -> None:
    unet.conv_norm_out.bias = unet.conv_norm_out.weight


@pytest.mark.parametrize("change", [attribute, option, dtype, layer, tied])
def test_whatever_else_differs_is_another_export(change: Callable[[nn.Module], None]) -> None:
    one, other = small(), small()
    assert key(one) == key(other)
    change(other)
    assert key(one) != key(other)


def hook(unet: nn.Module) -> None:
    unet.conv_in.register_forward_hook(lambda module, given, found, scale=[2]: found * scale[0])


def method(unet: nn.Module) -> None:
    unet.conv_in.forward = unet.conv_in.forward  # a bound method in the place of the class's


def tensor(unet: nn.Module) -> None:
    unet.conv_in.gain = torch.ones(())


def processor(unet: nn.Module) -> None:
    unet.set_attn_processor(type("Mine", (AttnProcessor2_0,), {})())


@pytest.mark.parametrize("change", [method, tensor, processor])
def test_what_nobody_can_compare_is_not_shared(change: Callable[[nn.Module], None]) -> None:
    unet = one_level()
    key(unet)
    change(unet)
    with pytest.raises(exporting.UnknownError):
        key(unet)


def test_a_hook_is_no_weight() -> None:
    one, other = small(), small()
    hook(other)
    assert key(one) != key(other)
