"""The same on a GPU. Collected only where there is one (conftest.py)."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from models import model, relative

import dmqfx
from dmqfx.policy.policy import Policy
from dmqfx.runtime.unet import CompiledUNet

EVERYTHING = {
    "schema": "dmqfx.policy/1",
    "name": "everything",
    "extends": "w4a8-quick",
    "default": {"input": {"range": "mse", "groups": 4}},
    "pipeline": [
        *("canonicalize", "flag-skips", "split-skips", "plan-sites", "pair-layers"),
        {"learn-scaling": {"method": "les", "iterations": 4, "rows": 64}},
        *("apply-scaling", "absorb-scaling"),
        {"measure-sensitivity": {"rows": 8}},
        {"fit-ranges": {"rows": 256}},
        "vote-shifts",
        {"round-weights": {"method": "adaround", "start": "gptq", "rows": 128, "iterations": 10}},
        "correct-bias",
        {"learn-steps": {"rows": 8, "batch": 4, "iterations": 4, "groups": 4}},
        "insert-qdq",
        {"quantize-attention": {"keys": 1}},
    ],
}


pytestmark = pytest.mark.filterwarnings("ignore:.*random context")


KEYS = "pipeline.quantize-attention.keys=1"


@cache
def unet(device: str) -> torch.nn.Module:
    return deepcopy(model("conditional")).to(device)


@cache
def made(device: str, policy: str) -> CompiledUNet:
    asked = Policy.load(EVERYTHING) if policy == "everything" else Policy.load(policy, [KEYS])
    return dmqfx.compile(unet(device), asked, target="simulate", progress=False, report_rows=2)


def output(q: torch.nn.Module, device: str) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(5)
    config = q.config
    sample = torch.randn(3, config["in_channels"], 12, 8, generator=drawn)
    context = torch.randn(3, 5, config["cross_attention_dim"], generator=drawn)
    with torch.no_grad():
        found = q(sample.to(device), torch.tensor([3, 400, 951], device=device), context.to(device))
    return found.sample.cpu()


@pytest.mark.parametrize("policy", ["w8a8", "everything"])
def test_it_compiles_where_the_unet_is(policy: str) -> None:
    q = made("cuda", policy)
    assert q.device.type == "cuda"
    assert all(tensor.is_cuda for tensor in q.state_dict().values())
    assert relative(output(q, "cuda"), output(unet("cuda"), "cuda")) < 0.5


def test_it_is_about_what_a_cpu_makes_of_it() -> None:
    """Sums are taken in another order, so that a few codes differ."""
    float_output = output(unet("cpu"), "cpu")
    there, here = (relative(output(made(d, "everything"), d), float_output) for d in ("cuda", "cpu"))
    assert there == pytest.approx(here, rel=0.25)


@pytest.mark.parametrize("target", ["simulate", "reference"])
def test_a_model_of_a_cpu_moves_and_comes_back(target: str, tmp_path: Path) -> None:
    made("cpu", "w8a8").save_pretrained(tmp_path)
    q = dmqfx.load(tmp_path, target=target)
    before = output(q, "cpu")
    assert relative(output(q.to("cuda"), "cuda"), before) < 3e-2
    assert torch.equal(output(q.to("cpu"), "cpu"), before)
