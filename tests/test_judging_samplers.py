"""Samplers: the same noise whichever UNet, the latents of every step, and pipelines left as they were."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from models import randomize, unconditional
from torch import nn

from dmqfx import emoji
from dmqfx.compiler import compile
from dmqfx.errors import CalibrationError
from dmqfx.evaluation import evaluate
from dmqfx.frontend.capture import capture
from dmqfx.judging.samplers import Drawn, EmojiSampler, PipelineSampler, drift
from dmqfx.runtime.targets import Target
from dmqfx.runtime.unet import CompiledUNet

PROMPTS = emoji.demo_prompts(2)
TINY = Path(__file__).parent.parent / "examples" / "tiny_pipeline.py"


@pytest.fixture(scope="module")
def pipe() -> DiffusionPipeline:
    made = runpy.run_path(str(TINY))["tiny_pipeline"]()
    randomize(made.unet)
    return made


@pytest.fixture(scope="module")
def q(pipe: DiffusionPipeline) -> CompiledUNet:
    return compile(pipe.unet, "w4a16", report_rows=0)


# --- drift


def test_the_float_model_does_not_drift_from_itself() -> None:
    sampler = EmojiSampler(PROMPTS, steps=3)
    first, second = (sampler(emoji.load_unet(), 0) for _ in range(2))
    assert [distance for _, distance in drift(first, second)] == [0, 0, 0]


def test_its_captured_graph_hardly_drifts(pipe: DiffusionPipeline) -> None:
    target = Target("float", (), "as captured")
    twin = CompiledUNet(capture(pipe.unet), config=pipe.unet.config, target=target)
    sampler = PipelineSampler(pipe, ["a cat"], steps=3)
    distances = [distance for _, distance in drift(sampler(pipe.unet, 0), sampler(twin, 0))]
    assert max(distances) < 1e-4


def test_drift_is_relative_and_over_all_pictures() -> None:
    f = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    exact, other = (Drawn(torch.empty(0), ((9.0, x), (1.0, 2 * x))) for x in (f, f + torch.eye(2)))
    assert drift(exact, other) == (
        (9.0, pytest.approx(2**0.5 / 5)),
        (1.0, pytest.approx(2**0.5 / 5)),
    )


# --- the bundled model


def test_the_latents_are_those_of_the_sampler_after_each_step() -> None:
    drawn = EmojiSampler(PROMPTS, steps=3)(emoji.load_unet(), 4)
    last = emoji.sample(emoji.load_unet(), PROMPTS, steps=3, seed=4)
    times, latents = zip(*drawn.latents, strict=True)
    assert times == (666, 333, 0)
    assert torch.equal(latents[-1], last)
    assert torch.equal(drawn.pictures, emoji.decode(last))
    assert not torch.equal(latents[0], latents[1])


@pytest.mark.parametrize(
    ("kind", "calls"),
    [(EulerDiscreteScheduler, 4), (EulerAncestralDiscreteScheduler, 4), (HeunDiscreteScheduler, 7)],
)
def test_any_scheduler_draws_the_same_from_the_same_seed(kind: type, calls: int) -> None:
    scheduler = kind.from_config(emoji.load_scheduler().config)
    sampler = EmojiSampler(PROMPTS, steps=4, scheduler=scheduler)
    first, second = (sampler(emoji.load_unet(), 0) for _ in range(2))
    assert torch.equal(first.pictures, second.pictures)
    assert len(first.latents) == calls
    assert "step" not in vars(scheduler), "a scheduler is left as it was"


def test_schedulers_agree_about_what_a_prompt_looks_like() -> None:
    """Euler with many steps ends near DDIM: scaling of inputs and of the noise is as the scheduler wants it."""
    ddim = EmojiSampler(["red apple"], steps=15)(emoji.load_unet(), 0).pictures
    scheduler = EulerDiscreteScheduler.from_config(emoji.load_scheduler().config)
    euler = EmojiSampler(["red apple"], steps=15, scheduler=scheduler)(emoji.load_unet(), 0).pictures
    assert (ddim - euler).square().mean() < 0.05


# --- pipelines


def test_a_pipeline_draws_what_it_draws_alone_and_gets_its_unet_back(pipe: DiffusionPipeline) -> None:
    own = pipe.unet
    drawn = PipelineSampler(pipe, ["a cat", "a dog"], steps=2)(own, 3)
    for k, prompt in enumerate(["a cat", "a dog"]):
        generator = torch.Generator().manual_seed(3 + k)
        alone = pipe(prompt, num_inference_steps=2, generator=generator, output_type="np").images
        assert torch.allclose(drawn.pictures[k], torch.from_numpy(alone)[0].permute(2, 0, 1) * 2 - 1)
    assert pipe.unet is own
    assert "step" not in vars(pipe.scheduler)
    assert [latents.shape[0] for _, latents in drawn.latents] == [2, 2]


def test_the_given_unet_draws(pipe: DiffusionPipeline, q: CompiledUNet) -> None:
    sampler = PipelineSampler(pipe, ["a cat"], steps=2)
    exact, quantized = sampler(pipe.unet, 0), sampler(q, 0)
    assert not torch.equal(exact.pictures, quantized.pictures)
    assert drift(exact, quantized)[0][1] > 0


def test_an_error_gives_the_unet_and_the_scheduler_back(pipe: DiffusionPipeline, q: CompiledUNet) -> None:
    class Broken(nn.Module):
        def forward(self, **_: object) -> None:
            raise RuntimeError("out of luck")

    own, broken = pipe.unet, q.retarget("simulate")
    broken.runner = Broken()
    with pytest.raises(RuntimeError, match="out of luck"):
        PipelineSampler(pipe, ["a cat"], steps=2)(broken, 0)
    assert pipe.unet is own
    assert "step" not in vars(pipe.scheduler)


def test_a_pipeline_says_its_own_guidance_scale_unless_it_is_given(pipe: DiffusionPipeline) -> None:
    assert PipelineSampler(pipe, ["a cat"]).guidance_scale == 7.5
    assert PipelineSampler(pipe, ["a cat"], scale=2.0).guidance_scale == 2.0


def test_options_that_a_pipeline_does_not_take_are_refused_before_it_runs(pipe: DiffusionPipeline) -> None:
    with pytest.raises(CalibrationError, match="takes no strength"):
        PipelineSampler(pipe, ["a cat"], options={"strength": 0.5})
    with pytest.raises(CalibrationError, match="needs at least one prompt"):
        PipelineSampler(pipe)


def test_a_pipeline_without_prompts_draws_as_many_as_are_asked_for() -> None:
    unet = unconditional().eval()
    pipe = DDPMPipeline(unet, DDPMScheduler())
    drawn = PipelineSampler(pipe, count=3, steps=2)(unet, 0)
    assert drawn.pictures.shape == (3, 3, 16, 16)
    assert drawn.pictures.min() >= -1
    assert drawn.pictures.max() <= 1
    assert PipelineSampler(pipe).guidance_scale is None


def test_a_pipeline_is_evaluated_with_any_scheduler_over_seeds(
    pipe: DiffusionPipeline, q: CompiledUNet
) -> None:
    before, pipe.scheduler = pipe.scheduler, EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    try:
        found = evaluate(
            pipe.unet, q, sampler=PipelineSampler(pipe, ["a cat", "a dog"], steps=3, scale=4.0), seeds=(0, 7)
        )
    finally:
        pipe.scheduler = before
    assert found.protocol["scheduler"] == "EulerDiscreteScheduler"
    assert found.protocol["settings"] == {"pipeline": "StableDiffusionPipeline", "steps": 3}
    assert found.protocol["guided_pairs_recorded"] == [6, 6]
    for run in found.runs:
        assert (len(run.outputs), len(run.drift), len(run.psnr_db)) == (3, 3, 2)
        assert run.guidance_scale == 4
        assert all(output.guided_db is not None for output in run.outputs.values())
