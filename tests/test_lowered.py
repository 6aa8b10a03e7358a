"""Real diffusers classes, lowered to native kernels: at the edges of what sizes there are, exported and compiled."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from models import captured
from planting import ORDER, PLAIN, bare
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SPEC, Wrapper, program_of_model, rows

import dmqfx
from dmqfx.calibration.calibration import Calibration
from dmqfx.checking.judges import SameCodes
from dmqfx.graph import ops
from dmqfx.graph.pipeline import PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.policy.policy import Policy
from dmqfx.runtime.hoisted import HoistedModule
from dmqfx.runtime.targets import lower

pytestmark = pytest.mark.filterwarnings("ignore:.*random encoder_hidden_states")


@cache
def quantized(name: str) -> Program:
    """Everything in codes that can be, attention over few keys too."""
    model, _ = captured(name)
    policy = Policy.load("w4a8-quick", ["pipeline.quantize-attention.keys=1"])
    data = Calibration.synthesize(model, steps=2, trajectories=1, progress=False)
    q = dmqfx.compile(model, policy, calibration=data, target="simulate", report_rows=0, progress=False)
    return q.program


@cache
def native(name: str) -> Program:
    return lower(quantized(name), "cpu")


def drawn(name: str, **sizes: int) -> dict[str, Tensor]:
    return quantized(name).inputs.draw(torch.Generator().manual_seed(0), **sizes)


def every_other(x: Tensor) -> Tensor:
    """The same numbers with gaps between them in memory."""
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("conditional", {"B": 1, "H": 1, "W": 1, "T": 1}, marks=pytest.mark.slow),
        ("conditional", {"B": 7, "H": 5, "W": 3, "T": 77}),
        ("inpainting", {"B": 7, "H": 1, "W": 1, "T": 3}),
        ("plain", {"B": 0}),
        pytest.param("resnet-sampling", {"B": 3, "H": 8, "W": 4}, marks=pytest.mark.slow),
    ],
)
def test_sizes_at_the_edges_give_what_the_reference_gives(name: str, sizes: dict[str, int]) -> None:
    """Attention of diffusers takes no batch of 0 and no empty context, in float either; the kernels' own tests have both."""
    given = drawn(name, **sizes)
    judge = SameCodes(lower(quantized(name), "reference"), [given])
    found = judge.judge(native(name))
    assert not found.wrong, found
    assert (judge.ties[0][1] > 0) == (sizes["B"] > 0)
    module = native(name).fork().gm
    assert isinstance(module, HoistedModule)
    expected = module._flat(module, **given)
    assert isinstance(expected, Tensor)
    assert expected[:, :1].shape == given["sample"][:, :1].shape
    for _ in range(3):
        assert torch.equal(module(**given), expected), "replays give other bits"
    later = {**given, "timestep": given["timestep"] + 1}
    assert torch.equal(module(**later), module._flat(module, **later)), "a replay reads what was"


def test_scale_and_shift_of_timesteps_are_part_of_the_operator_that_writes_codes() -> None:
    """And what they are matters: planted, the one in place of the other is found."""
    program, given = native("resnet-sampling"), drawn("resnet-sampling", B=2)
    modulated = [
        node for node in program.calls("kernel_quantize") if ops.args(node)["norm_scale"] is not None
    ]
    assert len(modulated) > 5
    products = [n.meta["val"] for n in program.calls("mul")]
    assert not [
        made for made in products if isinstance(made, Tensor) and made.dim() == 4 and made.shape[2] != 1
    ]
    judge = SameCodes(lower(quantized("resnet-sampling"), "reference"), [given])
    assert not judge.judge(program).wrong
    swapped = program.fork()
    for node in swapped.calls("kernel_quantize"):
        named = ops.args(node)
        if named["norm_scale"] is not None:
            both = {"norm_scale": named["norm_shift"], "norm_shift": named["norm_scale"]}
            node.args, node.kwargs = (), {**named, **both}
    swapped.gm.recompile()
    assert "other codes" in judge.judge(swapped).what


def test_how_inputs_lie_in_memory_and_more_threads_than_work_change_nothing() -> None:
    given, module, threads = (
        drawn("inpainting", H=2, W=4, T=5),
        native("inpainting").fork().gm,
        torch.get_num_threads(),
    )
    expected = module(**given)
    try:
        torch.set_num_threads(16)
        for _ in range(3):
            last = {**given, "sample": given["sample"].to(memory_format=torch.channels_last)}
            apart = {key: each if each.dim() == 1 else every_other(each) for key, each in given.items()}
            assert not apart["sample"].is_contiguous()
            for each in (given, last, apart):
                assert torch.equal(module(**each), expected)
    finally:
        torch.set_num_threads(threads)


def test_it_is_exported_with_attention_in_codes() -> None:
    module, given = native("inpainting").fork().gm, drawn("inpainting", H=4, W=4, T=5)
    names = {str(node.target) for node in module.graph.nodes}
    assert {f"dmqfx.kernel_{each}.default" for each in ("attention", "conv2d", "linear", "quantize")} <= names
    assert torch.equal(
        torch.export.export(module, (), given, strict=False).module()(**given), module(**given)
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_is_compiled_as_one_graph(backend: str) -> None:
    module, given = native("conditional").fork().gm, drawn("conditional", H=4, W=4, T=5)
    expected = module(**given)
    found = torch.compile(module, fullgraph=True, backend=backend)(**given)
    assert (found - expected).norm() <= (0 if backend == "aot_eager" else 2e-2) * expected.norm()


def modulated(parts: nn.ModuleDict, x: Tensor, timestep: Tensor, by: str) -> Tensor:
    """A convolution, a group norm scaled and shifted in some way, SiLU, a convolution."""
    normed = parts["norm"](parts["first"](x))
    each = (timestep[:, None] / 999 + torch.linspace(0.5, 1.5, 8))[:, :, None, None]
    match by:
        case "each image":
            normed = normed * each + each.flip(1)
        case "a number":
            normed = normed * 0.5 + each
        case "another number":
            normed = normed * each + 1.0
        case "a weight":
            normed = normed * parts["gain"].weight[None, :, 0, None, None] + each
        case "a map":
            normed = normed * (each + x[:, :1]) + each
    return parts["second"](F.silu(normed))


class Modulated(nn.Module):
    """The same as a model."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, conv = by, partial(nn.Conv2d, kernel_size=3, padding=1)
        self.conv_in, self.conv_out = conv(3, 3), conv(8, 3)
        layers = {
            "first": conv(3, 8),
            "norm": nn.GroupNorm(2, 8),
            "second": conv(8, 8),
            "gain": nn.Linear(1, 8),
        }
        self.parts = nn.ModuleDict(layers)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv_out(modulated(self.parts, self.conv_in(sample), timestep, self.by))


@pytest.mark.parametrize("by", ["each image", "a number", "another number", "a weight", "a map"])
def test_scale_and_shift_are_taken_where_they_are_numbers_of_each_image(by: str) -> None:
    program = program_of_model(Wrapper(Modulated(by)), SPEC, torch.zeros(3, 3, 8, 12), torch.zeros(3))
    for name in ORDER:
        program = run_step(bare(name), program, PassContext(policy=PLAIN, calibration=rows()))
    found, given = lower(program, "cpu"), program.inputs.draw(torch.Generator().manual_seed(0))
    taken = [n for n in found.calls("kernel_quantize") if ops.args(n)["norm_scale"] is not None]
    assert len(taken) == (by == "each image")
    assert not SameCodes(lower(program, "reference"), [given]).judge(found).wrong
