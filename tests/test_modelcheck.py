"""Whole models checked: a policy's passes on a model or its narrow twin, and a saved model's numbers."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from handmade import compiled
from models import one_level, randomize, unconditional

from dmqfx.checking import modelcheck
from dmqfx.checking.modelcheck import verify_policy, verify_saved
from dmqfx.compiler import compile
from dmqfx.errors import VerifyError
from dmqfx.graph.program import Program
from dmqfx.policy.policy import Policy
from dmqfx.runtime.unet import CompiledUNet


@cache
def sound() -> CompiledUNet:
    """The smallest model, with 8-bit weights."""
    unet = unconditional(
        block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    return compile(unet, "w8a16", report_rows=0)


@pytest.mark.slow
def test_a_large_model_is_checked_with_few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, seen = one_level(), []
    randomize(unet)
    capture = modelcheck.capture

    def watch(model: torch.nn.Module) -> Program:
        seen.append(sum(each.numel() for each in model.parameters()))
        return capture(model)

    monkeypatch.setattr(modelcheck, "_LARGE", 10_000)
    monkeypatch.setattr(modelcheck, "capture", watch)
    found = verify_policy(unet, Policy.load("w8a16"))
    assert found.narrow
    assert seen < [sum(each.numel() for each in unet.parameters())]
    assert str(found).endswith(
        "w8a16 on UNet2DConditionModel with few channels: 11 passes keep their promises"
    )
    assert found.to_data()["passes"][0] == {
        "name": "canonicalize", "preserves": "bitwise", "applied": len(found.passes[0].applied), "refused": 0,
        "drift": 0.0,
    }  # fmt: skip


def test_a_sound_model_is_told_so() -> None:
    assert [line.split()[0] for line in verify_saved(sound())] == ["files", "table", "output"]


def test_an_entry_that_the_graph_contradicts_is_named_with_its_site() -> None:
    with pytest.raises(VerifyError, match=r"SkipConcat of block.0/cat:tensors: .* is called deep"):
        verify_saved(compiled())


def test_an_output_that_is_not_finite_is_found() -> None:
    broken = copy.deepcopy(sound())
    weight = next(iter(broken.runner.parameters()))
    weight.data.fill_(torch.nan)
    with pytest.raises(VerifyError, match="the output sample is not finite"):
        verify_saved(broken)
