"""compile, from outside: what it takes and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel

import dmqfx
from dmqfx.errors import CaptureError


def small(dtype: torch.dtype) -> UNet2DModel:
    levels = {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=8, **levels
    )
    return unet.to(dtype).eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_unet_is_compiled_in_float32_and_gives_back_its_own_dtype(
    dtype: torch.dtype,
) -> None:
    unet = small(dtype)
    calibration = dmqfx.Calibration.synthesize(unet, steps=2, trajectories=1, progress=False)
    q = dmqfx.compile(unet, "w8a8", calibration=calibration, progress=False, verify=True)
    assert {p.dtype for p in unet.parameters()} == {dtype}
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    half = q(x, 500).sample
    assert (half.dtype, q.program.dtype) == (dtype, torch.float32)
    same = dmqfx.compile(unet.float(), "w8a8", calibration=calibration, progress=False)
    assert torch.equal(half, same(x.float(), 500).sample.to(dtype))


def test_an_unknown_target_is_refused_before_anything_runs() -> None:
    with pytest.raises(dmqfx.DmqfxError, match=r"there is no target 'refrence'.*reference"):
        dmqfx.compile(small(torch.float32), target="refrence")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_before_anything_runs(value: float) -> None:
    unet = small(torch.float32)
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight[2, 3, 1] = value
    told = r"at mid_block\.resnets\.0\.conv1: weight has 3 of 2304 values that are not finite"
    with pytest.raises(CaptureError, match=told):
        dmqfx.compile(unet, "w8a16")
