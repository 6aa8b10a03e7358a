"""The device follows the model: what test_cuda.py runs on a GPU, in small, on a device that every machine has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import one_level, relative
from standin import DEVICE
from tiny import planned
from torch import Tensor, nn
from torch.nn import functional as F

import dmqfx
from dmqfx.calibration.calibration import Calibration
from dmqfx.checking.modelcheck import verify_saved
from dmqfx.checking.shrink import randomize
from dmqfx.frontend.capture import capture
from dmqfx.frontend.signature import UNet
from dmqfx.graph import registry
from dmqfx.graph.modules import clone
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.policy.policy import Policy
from dmqfx.runtime.kernels import native
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.sweep.scratch import Scratch

CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{words}")
    for words in ("random encoder_hidden_states", "learn-steps learns from", "expected at least")
]

MOST = ["down_blocks.**", "mid_block.resnets.**", "up_blocks.0.resnets.1.**", "**.attn1.**", "**.conv2/*"]
MOST += [
    "**.to_q/*",
    "**.to_k/*",
    "**.to_v/*",
    "**.to_out.0/*",
    "**.net.2/*",
    "**.proj_in/*",
    "**.proj_out/*",
]
ALL_BUT_ONE = [*MOST, "**.conv_shortcut/*", "**.net.0.proj/*"]


def policy(float_layers: list[str], *steps: object) -> dict[str, object]:
    """Every step, but few layers and hardly any iterations: more of them would do nothing else."""
    scaled = (
        "apply-scaling",
        "absorb-scaling",
        {"measure-sensitivity": {"rows": 2}},
        {"fit-ranges": {"rows": 32}},
    )
    return {
        "schema": "dmqfx.policy/1",
        "name": "short",
        "extends": "w4a8-quick",
        "default": {"input": {"range": "mse", "groups": 2}},
        "rules": [{"name": "most", "at": float_layers, "keep": "float"}],
        "pipeline": [
            *("canonicalize", "flag-skips", "split-skips", "plan-sites", "pair-layers"),
            *(
                steps[0],
                *scaled,
                "vote-shifts",
                *steps[1:],
                "insert-qdq",
                {"quantize-attention": {"keys": 1}},
            ),
        ],
    }


LEARNED = policy(
    MOST,
    {"learn-scaling": {"method": "les", "start": "identity", "iterations": 1, "rows": 32, "batch": 16}},
    {"round-weights": {"method": "adaround", "start": "gptq", "rows": 32, "iterations": 1}},
    {"reconstruct-blocks": {"rows": 2, "batch": 2, "iterations": 1}},
    "correct-bias",
    {"learn-steps": {"rows": 2, "batch": 2, "iterations": 1, "groups": 2}},
)
SOLVED = policy(
    ALL_BUT_ONE,
    {"learn-scaling": {"method": "surrogate", "rows": 32}},
    {"round-weights": {"method": "gptq", "rows": 32}},
)


def here(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


def there(*shape: int) -> Tensor:
    return here(*shape).to(DEVICE)


REFUSED: Mapping[str, Callable[[], object]] = {
    "a sum": lambda: there(3) + here(3),
    "a sum the other way": lambda: here(3) + there(3),
    "a sum in place": lambda: there(3).add_(here(3)),
    "a sum in a number here": lambda: torch.zeros(()).add_(there()),
    "a product": lambda: there(2, 3) @ here(3, 2),
    "a convolution": lambda: F.conv2d(there(1, 2, 4, 4), here(3, 2, 1, 1)),
    "a convolution's bias": lambda: F.conv2d(there(1, 2, 4, 4), there(3, 2, 1, 1), here(3)),
    "a norm": lambda: F.group_norm(there(2, 4, 3), 2, here(4), there(4)),
    "a comparison": lambda: torch.equal(there(3), here(3)),
    "a choice": lambda: torch.where(there(3) > 0, here(3), there(3)),
    "parts of one": lambda: torch.cat([there(3), here(3)]),
    "numbers of one": lambda: torch.stack([there(), here()]),
    "edges": lambda: torch.bucketize(there(3), here(3)),
    "an index into what is here": lambda: here(3)[torch.arange(2, device=DEVICE)],
    "sums by index": lambda: there(3).index_add_(0, torch.arange(2), there(2)),
    "values by index": lambda: there(3).index_put((torch.arange(2),), here(2)),
    "members": lambda: torch.isin(there(3), here(3)),
    "numpy": lambda: there(3).numpy(),
    "a generator of the CPU": lambda: torch.randn(3, device=DEVICE, generator=torch.Generator()),
}  # fmt: skip


@pytest.mark.parametrize("mixture", REFUSED.values(), ids=REFUSED.keys())
def test_the_stand_in_refuses_what_cuda_refuses(mixture: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        mixture()


def loss(device: torch.device) -> Tensor:
    """A small net that is trained for one step, and much else on the way."""
    layer = nn.Conv2d(2, 4, 3, padding=1)
    randomize(layer)
    layer.to(device)
    x, edges = here(2, 2, 4, 6).to(device), torch.tensor([-0.5, 0.5], device=device)
    group = torch.bucketize(x[:, 0, 0, 0].contiguous(), edges)

    def of() -> Tensor:
        y = F.silu(F.group_norm(layer(x), 2)) * torch.arange(3, device=device)[group][:, None, None, None]
        top = y.flatten(1).sort(descending=True).values[torch.tensor([0, 1]), :7] % 2
        return torch.cat([y.flatten(), top.flatten() / torch.tensor(3.0)]).square().mean()

    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    of().backward()
    optimizer.step()
    return of().detach()


def test_the_stand_in_computes_what_the_cpu_computes() -> None:
    assert loss(DEVICE).device == DEVICE
    assert float(loss(DEVICE)) == pytest.approx(float(loss(CPU)), rel=1e-5)


def test_a_copy_is_memory_of_its_own_and_a_view_is_not() -> None:
    x = there(2, 3)
    copied, view = deepcopy(x), x.t()
    x.zero_()
    assert torch.equal(copied.cpu(), here(2, 3))
    assert torch.equal(view.cpu(), torch.zeros(3, 2))


def quantized() -> Program:
    """A program of two layers on the stand-in, quantized there, with a constant of the timesteps' groups."""
    program = planned()
    moved = {name: weight.to(DEVICE) for name, weight in program.weights().items()}
    program = replace(program, gm=clone(program.gm, moved))
    steps = [("round-weights", {"method": "nearest"}), ("insert-qdq", {})]
    return registry.pipeline(steps).run(program, PassContext())


def test_constants_that_stay_on_the_cpu_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug that once was: planted, the program cannot run; without it, it does."""
    inputs = {"sample": there(2, 1, 3, 3), "timestep": torch.tensor([3.0, 700.0], device=DEVICE)}
    assert isinstance(found := quantized()(**inputs), Tensor)
    assert found.device == DEVICE
    monkeypatch.setattr(Program, "device", CPU)
    with pytest.raises(RuntimeError, match=r"is on cpu|and cpu!"):
        quantized()(**inputs)


@cache
def unet(device: torch.device) -> UNet:
    made = one_level(block_out_channels=(8,), norm_num_groups=4)
    randomize(made)
    made.eval().to(device)
    return made


@cache
def rows() -> Calibration:
    return Calibration.synthesize(unet(DEVICE), steps=3, trajectories=2, progress=False)


@cache
def captured(unet: UNet, *, residuals: bool = False) -> Program:
    return capture(unet, residuals=residuals)


@pytest.fixture(autouse=True)
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture takes longer than a short compilation; a program is never changed."""
    monkeypatch.setattr("dmqfx.compiler.capture", captured)


def made(device: torch.device, policy: str | dict[str, object], **options: Any) -> CompiledUNet:
    few = ["pipeline.quantize-attention.keys=1"]
    asked, more = Policy.load(policy, few), {"target": "simulate", "progress": False, "report_rows": 2}
    return dmqfx.compile(unet(device), asked, calibration=rows(), **more, **options)


@cache
def simple(device: torch.device) -> CompiledUNet:
    return made(device, "w8a8")


def output(q: nn.Module, device: torch.device) -> Tensor:
    drawn = torch.Generator().manual_seed(5)
    sample, context = torch.randn(3, 4, 6, 8, generator=drawn), torch.randn(3, 5, 16, generator=drawn)
    with torch.no_grad():
        found = q(sample.to(device), torch.tensor([3, 400, 951], device=device), context.to(device)).sample
    assert found.device == device
    return found.cpu()


def test_it_compiles_where_the_unet_is() -> None:
    assert simple(DEVICE).device == DEVICE
    assert list(simple(DEVICE).program.calls("qattention"))
    assert all(tensor.device == DEVICE for tensor in simple(DEVICE).state_dict().values())
    assert relative(output(unet(DEVICE), DEVICE), output(unet(CPU), CPU)) < 1e-5


def test_it_is_about_what_a_cpu_makes_of_it() -> None:
    """Attention is summed in another order, so that a few codes differ."""
    assert relative(output(simple(DEVICE), DEVICE), output(simple(CPU), CPU)) < 2e-2


def test_what_passes_learn_they_learn_there() -> None:
    q = made(DEVICE, LEARNED)
    assert all(tensor.device == DEVICE for tensor in q.state_dict().values())
    assert relative(output(q, DEVICE), output(unet(CPU), CPU)) < 0.5


@pytest.mark.slow
def test_what_was_kept_in_a_run_directory_comes_back_there(tmp_path: Path) -> None:
    first, second = (made(DEVICE, SOLVED, run_dir=tmp_path) for _ in range(2))
    assert relative(output(first, DEVICE), output(unet(CPU), CPU)) < 0.5
    assert torch.equal(output(first, DEVICE), output(second, DEVICE))


def test_what_is_set_aside_on_disk_comes_back_there() -> None:
    scratch = Scratch()
    back = scratch.read(scratch.write(there(4, 6)[1:].t()))
    scratch.close()
    assert back.device == DEVICE
    assert torch.equal(back.cpu(), here(4, 6)[1:].t())


@pytest.mark.parametrize("target", ["simulate", pytest.param("reference", marks=pytest.mark.slow), "cpu"])
def test_it_moves_and_comes_back(target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    simple(DEVICE).save_pretrained(tmp_path)
    q = dmqfx.load(tmp_path, target=target)
    native.warn_once.cache_clear()
    caplog.clear()  # of what compiling said
    before = output(q, CPU)
    assert not caplog.records
    assert relative(output(q.to(DEVICE), DEVICE), before) < 2e-2
    told = [record.getMessage().split()[0] for record in caplog.records]
    layers = {"kernel_conv2d", "kernel_linear", "kernel_quantize", "kernel_attention"}
    assert (len(told), set(told)) == ((4, layers) if target == "cpu" else (0, set()))
    assert torch.equal(output(q.to(CPU), CPU), before)


def test_it_is_judged_where_it_is() -> None:
    assert not dmqfx.evaluate(unet(DEVICE), simple(DEVICE), rows()).misses(sqnr_db=10)
    assert verify_saved(simple(DEVICE))
