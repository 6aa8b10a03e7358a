"""What fuse and hoist-invariants make of graphs that no toy has: the target cpu computes what the reference computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planting import ORDER, PLAIN, bare, program_before
from torch import Tensor, nn
from torch.nn import functional as F
from toys import PROMPTED, SPEC, Prompted, PromptedWrapper, TimeEmbedding, Wrapper, program_of_model, rows

import dmqfx
from dmqfx import emoji
from dmqfx.checking.judges import SameCodes
from dmqfx.evaluation import emoji_calibration
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.pipeline import PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.policy.policy import Policy
from dmqfx.runtime.hoisted import HoistedModule
from dmqfx.runtime.targets import lower
from dmqfx.seeing import bits

Middle = Callable[["Parts", Tensor, Tensor], Tensor]


class Parts(nn.Module):
    """Layers between two convolutions, put together by `middle`."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.middle, self.time_embedding = middle, TimeEmbedding()
        self.conv_in, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.wide, self.conv = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.second, self.conv_out = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Conv2d(8, 3, 3, padding=1),
        )
        self.row = nn.Parameter(torch.randn(1, 8))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        embedded = self.time_embedding(timestep).sum() * 0
        found: Tensor = self.conv_out(self.middle(self, self.conv_in(sample), timestep) + embedded)
        return found


def upsampled_beside(parts: Parts, x: Tensor, timestep: Tensor) -> Tensor:
    found: Tensor = parts.wide(torch.cat([F.interpolate(parts.down(x), scale_factor=2.0), x], 1))
    return found


def views(parts: Parts, x: Tensor, timestep: Tensor) -> Tensor:
    h = parts.conv(x)
    batch, channels, height, width = h.shape
    h = h.unsqueeze(1).view(batch * channels, 1, height, width).view(batch, channels, height, width)
    return h.flatten(2).view(batch * channels, height * width).view(batch, channels, height, width)


def additions(parts: Parts, x: Tensor, timestep: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    h = parts.first(parts.conv(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)) + parts.row
    h = (parts.second(h) + parts.row[0, 0]).mT.reshape(batch, channels, height, width)
    return parts.conv(h) + timestep[:, None, None, None] / 1000


def to_itself(parts: Parts, x: Tensor, timestep: Tensor) -> Tensor:
    h = parts.conv(x)
    return h + h


def quantized(program: Program, ctx: PassContext) -> Program:
    for name in ORDER:
        program = run_step(bare(name), program, ctx)
    return program


def inputs(**more: Tensor) -> dict[str, Tensor]:
    return {"sample": torch.randn(3, 3, 8, 12), "timestep": torch.tensor([10.0, 500.0, 900.0]), **more}


@pytest.mark.parametrize("middle", [upsampled_beside, views, additions, to_itself])
def test_what_stands_around_layers_is_computed_as_in_the_reference(middle: Middle) -> None:
    model = Wrapper(Parts(middle))
    program = program_of_model(model, SPEC, torch.zeros(3, 3, 8, 12), torch.zeros(3))
    program = quantized(program, PassContext(policy=PLAIN, calibration=rows()))
    given = inputs()
    expected, found = (lower(program, target).gm(**given) for target in ("reference", "cpu"))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found.shape == expected.shape


class Chained(Prompted):
    """Two layers that depend on the context alone, with nothing but SiLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return super().forward(sample, timestep, self.behind(F.silu(self.before(encoder_hidden_states))))


def test_layers_that_write_codes_leave_the_loop_where_all_timestep_groups_are_alike() -> None:
    examples = torch.zeros(3, 3, 8, 12), torch.zeros(3), torch.zeros(3, 5, 6)
    program = program_of_model(PromptedWrapper(Chained()), PROMPTED, *examples)
    calibration = rows(spec=PROMPTED, prompts=1)
    program = quantized(program, PassContext(policy=PLAIN, calibration=calibration))
    given = inputs(encoder_hidden_states=torch.randn(3, 4, 6))
    expected, fused = lower(program, "reference"), lower(program, "cpu")
    first = next(
        n for n in fused.calls("kernel_linear") if str(n.meta["address"]).startswith("behind/quantize")
    )
    assert ops.args(first)["activation"] == "silu"
    assert ops.args(first)["group"] is None
    made, meant = fused.gm(**given), expected.gm(**given)
    torch.testing.assert_close(
        made, meant, rtol=1e-5, atol=1e-5
    )  # torch's own layers may round otherwise, by layout
    second = next(iter(first.users))
    told = bits.site_bits(fused, Site(second.meta["address"], "input"))
    assert (told.got, told.how) == (8, f"quantized by {first.meta['address']}")


def test_a_submodule_that_is_replaced_is_noticed() -> None:
    program = run_step(create("fuse"), program_before("fuse"), PassContext())
    module = run_step(create("hoist-invariants"), program, PassContext()).gm
    assert isinstance(module, HoistedModule)
    given = inputs()
    before = module(**given)
    owner = module.get_submodule("conv_out")
    other = copy.deepcopy(owner)
    other.weight = nn.Parameter(2 * owner.weight, requires_grad=False)
    module.conv_out = other
    changed = module(**given)
    assert not torch.equal(before, changed)
    assert torch.equal(changed, module._flat(module, **given))
    bias = other.bias + 1
    del other.bias
    other.register_buffer("bias", bias)
    assert torch.equal(module(**given), module._flat(module, **given))
    assert not torch.equal(module(**given), changed)


@pytest.mark.slow
def test_of_the_trained_unet_few_codes_differ_from_the_reference_and_all_at_ties() -> None:
    data = emoji_calibration(count=1, steps=4, seed=0, progress=False)
    policy = Policy.load("w4a8-quick", ["pipeline.quantize-attention.keys=1"])
    how: dict[str, Any] = {"target": "simulate", "report_rows": 0, "progress": False}
    program = dmqfx.compile(emoji.load_unet(), policy, calibration=data, **how).program
    judge = SameCodes(lower(program, "reference"), [program.inputs.draw(torch.Generator().manual_seed(0))])
    assert judge.judge(lower(program, "cpu")).error < 1e-5
    ((ties, count),) = judge.ties
    assert count > 1_000_000
    assert ties < 1e-5 * count
