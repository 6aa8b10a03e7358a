"""Recording: what a UNet was called with comes back bit for bit, whoever called it and however it ended."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import components
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from models import MODELS, captured, control, eager, model, randomize, unconditional
from torch import Tensor

from dmqfx import emoji
from dmqfx.calibration.calibration import Calibration, CalibrationWarning
from dmqfx.calibration.recording import recording
from dmqfx.errors import CalibrationError, CallError
from dmqfx.frontend.signature import signature
from dmqfx.runtime.targets import Target
from dmqfx.runtime.unet import CompiledUNet

SCHEDULERS: dict[str, Callable[[], SchedulerMixin]] = {
    "DDIM": partial(DDIMScheduler, steps_offset=1, clip_sample=False),
    "Euler with Karras sigmas": partial(EulerDiscreteScheduler, use_karras_sigmas=True, steps_offset=1),
    "DPM++": DPMSolverMultistepScheduler,
    "LCM": partial(LCMScheduler, steps_offset=1),
    "Heun": partial(HeunDiscreteScheduler, steps_offset=1),
    "UniPC": UniPCMultistepScheduler,
    "PNDM with Runge-Kutta steps": partial(PNDMScheduler, steps_offset=1),
    "ancestral Euler": partial(EulerAncestralDiscreteScheduler, steps_offset=1),
    "inverse DDIM": partial(DDIMInverseScheduler, steps_offset=1, clip_sample=False),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


def stable_diffusion(folder: Path, scheduler: SchedulerMixin | None = None) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        components.vae(),
        components.text_encoder(),
        components.tokenizer(folder),
        model("conditional"),
        scheduler or SCHEDULERS["DDIM"](),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def outputs_of(unet: torch.nn.Module) -> tuple[list[Tensor], torch.utils.hooks.RemovableHandle]:
    """A list that fills with what the UNet returns."""
    found: list[Tensor] = []

    def note(_: object, __: object, result: object) -> None:
        found.append(result[0] if isinstance(result, tuple) else result.sample)

    return found, unet.register_forward_hook(note)


def hooks(unet: torch.nn.Module) -> int:
    return len(unet._forward_hooks) + len(unet._forward_pre_hooks)


def pairs(calibration: Calibration) -> list[tuple[int, int]]:
    return list(zip(calibration.trajectories().tolist(), calibration.steps().tolist(), strict=True))


# --- pipelines


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rows_replayed_through_the_unet_give_the_pipeline_s_own_outputs(name: str, folder: Path) -> None:
    pipe = stable_diffusion(folder, SCHEDULERS[name]())
    outputs, handle = outputs_of(pipe.unet)
    calibration = Calibration.record(pipe, prompts=["cat", "dog"], steps=4, guidance_scale=5.0)
    handle.remove()
    calibration.check(signature(pipe.unet))
    replayed = [eager(pipe.unet, batch)[0] for batch in calibration.batches(2)]
    assert len(replayed) == len(outputs) >= 8
    assert all(torch.equal(a, b) for a, b in zip(replayed, outputs, strict=True))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_of_each_trajectory_is_recorded_once_at_its_own_time(name: str, folder: Path) -> None:
    pipe = stable_diffusion(folder, SCHEDULERS[name]())
    calibration = Calibration.record(pipe, prompts=["cat", "dog"], steps=4, guidance_scale=5.0)
    times = pipe.scheduler.timesteps.float()
    assert sorted(pairs(calibration)) == [(t, s) for t in range(4) for s in range(len(times))]
    assert torch.equal(calibration.timesteps(), times[calibration.steps()])
    if name.startswith("Euler"):
        assert (times != times.round()).any()


def test_both_halves_of_guidance_are_rows_and_without_guidance_there_is_one(folder: Path) -> None:
    pipe = stable_diffusion(folder)
    guided = Calibration.record(pipe, prompts=["cat"], steps=2, guidance_scale=5.0)
    without, given = next(guided.batches(2))["encoder_hidden_states"]
    assert not torch.equal(without, given)
    assert len(Calibration.record(pipe, prompts=["cat"], steps=2, guidance_scale=1.0)) == len(guided) // 2


def test_a_recording_depends_on_its_seed_and_on_nothing_else(folder: Path) -> None:
    pipe = stable_diffusion(folder)
    before = torch.random.get_rng_state()
    first, again, other = (
        Calibration.record(pipe, prompts=["cat"], steps=2, seed=seed).groups[0].columns["sample"].values
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_second_prompt_starts_from_noise_of_its_own(folder: Path) -> None:
    calibration = Calibration.record(
        stable_diffusion(folder), prompts=["cat", "cat"], steps=1, guidance_scale=1
    )
    first, second = next(calibration.batches(2))["sample"]
    assert pairs(calibration) == [(0, 0), (1, 0)]
    assert not torch.equal(first, second)


def test_stable_diffusion_xl_is_recorded_with_its_added_conditions(folder: Path) -> None:
    unet = model("stable-diffusion-xl")
    pipe = StableDiffusionXLPipeline(
        components.vae(),
        components.text_encoder(8),
        components.text_encoder(8, projection=20),
        components.tokenizer(folder),
        components.tokenizer(folder),
        unet,
        EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    outputs, handle = outputs_of(unet)
    calibration = Calibration.record(pipe, prompts=["cat"], steps=2)
    handle.remove()
    calibration.check(signature(unet))
    assert {"text_embeds", "time_ids", "encoder_hidden_states"} < set(calibration.groups[0].columns)
    replayed = [eager(unet, batch)[0] for batch in calibration.batches(2)]
    assert all(torch.equal(a, b) for a, b in zip(replayed, outputs, strict=True))


@cache
def controlled(folder: Path) -> StableDiffusionControlNetPipeline:
    controlnet = control(conditioning_embedding_out_channels=(4,))
    randomize(controlnet)
    return StableDiffusionControlNetPipeline(
        components.vae(),
        components.text_encoder(),
        components.tokenizer(folder),
        model("conditional"),
        controlnet.eval(),
        SCHEDULERS["DDIM"](),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_what_a_controlnet_adds_is_recorded_with_the_unet(folder: Path) -> None:
    pipe = controlled(folder)
    outputs, handle = outputs_of(pipe.unet)
    calibration = Calibration.record(pipe, prompts=["cat"], steps=2, image=torch.rand(1, 3, 8, 8))
    handle.remove()
    calibration.check(signature(pipe.unet, residuals=True))
    with pytest.raises(CalibrationError, match="mid_residual not taken by the model"):
        calibration.check(signature(pipe.unet))
    replayed = [eager(pipe.unet, batch)[0] for batch in calibration.batches(2)]
    assert all(torch.equal(a, b) for a, b in zip(replayed, outputs, strict=True))


def test_another_module_of_a_pipeline_is_recorded_by_name(folder: Path) -> None:
    pipe = controlled(folder)
    calibration = Calibration.record(
        pipe,
        prompts=["cat"],
        module=pipe.controlnet,
        steps=2,
        image=torch.rand(1, 3, 8, 8),
        controlnet_conditioning_scale=0.5,
    )
    calibration.check(signature(pipe.controlnet))
    assert calibration.groups[0].scalars == {"conditioning_scale": 0.5}
    assert next(calibration.batches(2))["conditioning_scale"].shape == ()


@pytest.mark.parametrize("pipeline", [DDPMPipeline, DDIMPipeline])
def test_an_unconditional_pipeline_runs_as_often_as_asked(pipeline: type[DDPMPipeline]) -> None:
    scheduler = DDPMScheduler() if pipeline is DDPMPipeline else DDIMScheduler()
    unet = model("unconditional")
    calibration = Calibration.record(pipeline(unet, scheduler), trajectories=2, steps=3, batch_size=2)
    calibration.check(signature(unet))
    assert sorted(pairs(calibration)) == [(t, s) for t in range(4) for s in range(3)]


def test_an_error_inside_a_pipeline_is_raised_and_the_hooks_are_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = stable_diffusion(folder)
    before = hooks(pipe.unet)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the sampler broke")

    monkeypatch.setattr(pipe.scheduler, "step", broken)
    with pytest.raises(ZeroDivisionError, match="the sampler broke"):
        Calibration.record(pipe, prompts=["cat"], steps=2)
    assert hooks(pipe.unet) == before


def test_the_pipeline_s_own_bar_is_back_afterwards(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = stable_diffusion(folder)
    Calibration.record(pipe, prompts=["cat"], steps=2)
    assert capfd.readouterr().err == ""
    Calibration.record(pipe, prompts=["cat"], steps=2, progress=True)
    assert "record" in capfd.readouterr().err
    pipe("cat", num_inference_steps=1, output_type="latent")
    assert "1/1" in capfd.readouterr().err


def test_options_that_a_pipeline_does_not_take_are_refused(folder: Path) -> None:
    pipe = stable_diffusion(folder)
    with pytest.raises(CalibrationError, match="StableDiffusionPipeline takes no stpes; it takes prompt, "):
        Calibration.record(pipe, prompts=["cat"], stpes=3)
    with pytest.raises(CalibrationError, match=r"needs at least one prompt: prompts=\[...\]"):
        Calibration.record(pipe)
    with pytest.raises(CalibrationError, match="needs at least one prompt"):
        Calibration.record(pipe, prompts=[])
    with pytest.raises(CalibrationError, match=r"prompts=\['cat'\]"):
        Calibration.record(pipe, prompts="cat")
    with pytest.raises(CalibrationError, match="DDPMPipeline takes no guidance_scale"):
        Calibration.record(DDPMPipeline(model("unconditional"), DDPMScheduler()), steps=2, guidance_scale=2)


def test_a_pipeline_without_a_unet_that_can_be_recorded_is_refused(folder: Path) -> None:
    pipe = stable_diffusion(folder)
    pipe.unet = torch.nn.Linear(1, 1)
    with pytest.raises(CalibrationError, match="unet is Linear, which cannot be recorded"):
        Calibration.record(pipe, prompts=["cat"])
    pipe.unet._orig_mod = model("conditional")
    with pytest.raises(CalibrationError, match=r"record before torch\.compile"):
        Calibration.record(pipe, prompts=["cat"])


# --- tapes


def call(unet: torch.nn.Module, time: float, rows: int = 2, size: int = 8) -> None:
    unet(torch.randn(rows, 4, size, size), time, torch.randn(rows, 5, 16))


def test_a_tape_sees_where_trajectories_begin() -> None:
    unet = model("conditional")
    with recording(unet) as tape, torch.no_grad():
        for time in (
            900,
            500,
            500,
            100,
            900,
            100,
        ):  # a second-order sampler repeats times; 100 to 900 is a new run
            call(unet, time)
        call(unet, 50, rows=1)
    numbered = [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
        (0, 2),
        (1, 2),
        (0, 3),
        (1, 3),
        (2, 0),
        (3, 0),
        (2, 1),
        (3, 1),
    ]
    assert pairs(tape.calibration()) == [*numbered, (4, 0)]


def test_who_says_where_trajectories_begin_may_run_time_backwards() -> None:
    unet = model("conditional")
    with recording(unet) as tape, torch.no_grad():
        for times in ((100, 900), (500, 600)):
            tape.start()
            for time in times:
                call(unet, time, rows=1)
    assert pairs(tape.calibration()) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_what_is_compiled_already_is_not_recorded() -> None:
    unet, program = captured("control")
    q = CompiledUNet(program, config=unet.config, target=Target("float", (), ""))
    with pytest.raises(CalibrationError, match="CompiledControlNet cannot be recorded"), recording(q):
        pass
    with pytest.raises(CalibrationError, match="CompiledControlNet cannot be recorded"):
        Calibration.synthesize(q)
    with pytest.raises(CalibrationError, match="Linear cannot be recorded"):
        Calibration.record(torch.nn.Linear(1, 1), scheduler=DDIMScheduler())


def test_rows_of_two_sizes_live_side_by_side() -> None:
    unet = model("conditional")
    with recording(unet) as tape, torch.no_grad():
        for size in (8, 12, 8):
            call(unet, 900, size=size)
    calibration = tape.calibration()
    assert [len(group) for group in calibration.groups] == [4, 2]
    assert [tuple(b["sample"].shape) for b in calibration.batches(3)] == [
        (3, 4, 8, 8),
        (1, 4, 8, 8),
        (2, 4, 12, 12),
    ]
    calibration.check(signature(unet))


def test_a_call_that_raises_is_not_a_row() -> None:
    unet = model("conditional")

    def broken(*_: object) -> None:
        raise MemoryError("in the last layer")

    before = hooks(unet)
    with recording(unet) as tape, torch.no_grad():
        call(unet, 900)
        handle = unet.conv_out.register_forward_pre_hook(broken)
        with pytest.raises(MemoryError):
            call(unet, 800)
        handle.remove()
        call(unet, 700)
    assert hooks(unet) == before
    assert tape.calibration().timesteps().tolist() == [900, 900, 700, 700]


class Spoiler(UNet2DModel):
    """Overwrites its input."""

    def forward(self, sample: Tensor, timestep: object, **_: object) -> tuple[Tensor]:
        return (sample.fill_(5),)


def test_a_tape_keeps_inputs_as_they_came() -> None:
    unet, sample = Spoiler(**unconditional().config), torch.zeros(1, 3, 16, 16)
    with recording(unet) as tape:
        unet(sample, 10)
        unet(sample.fill_(7), 9)
    sample.fill_(9)
    assert [batch["sample"].unique().item() for batch in tape.calibration().batches(1)] == [0, 7]


def test_recorded_rows_hold_no_gradients_of_a_caller_who_left_them_on() -> None:
    unet = model("conditional")
    sample = torch.randn(1, 4, 8, 8, requires_grad=True)
    with recording(unet) as tape:
        unet(sample * 2, 900, torch.randn(1, 5, 16) * torch.ones(16, requires_grad=True))
    columns = tape.calibration().groups[0].columns
    held = [column.values if hasattr(column, "values") else column for column in columns.values()]
    assert held
    assert not any(values.requires_grad for values in held)


def test_a_context_that_stays_the_same_is_kept_once() -> None:
    unet, context = model("conditional"), torch.randn(2, 5, 16)
    with recording(unet) as tape, torch.no_grad():
        for time in (900, 500, 100):
            unet(torch.randn(2, 4, 8, 8), time, context)
    columns = tape.calibration().groups[0].columns
    assert (len(columns["encoder_hidden_states"]), len(columns["encoder_hidden_states"].values)) == (6, 2)


def test_a_call_that_could_not_be_compiled_is_refused_while_it_is_recorded() -> None:
    unet = model("conditional")
    with recording(unet), pytest.raises(CallError, match="attention_mask"):
        unet(torch.randn(1, 4, 8, 8), 10, torch.randn(1, 5, 16), attention_mask=torch.ones(1, 5))


def test_a_tape_of_nothing_says_what_to_do() -> None:
    unet = model("conditional")
    with recording(unet) as tape:
        pass
    with pytest.raises(CalibrationError, match=r"UNet2DConditionModel was never called(.|\n)*unet\(...\)"):
        tape.calibration()
    with (
        pytest.raises(CalibrationError, match="Linear cannot be recorded; UNet2DModel, "),
        recording(torch.nn.Linear(1, 1)),
    ):
        pass


# --- a UNet with a scheduler


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_sampler_sees_what_a_pipeline_sees(name: str, folder: Path) -> None:
    given, without = torch.randn(2, 1, 5, 16).unbind()
    pipe = stable_diffusion(folder, SCHEDULERS[name]())
    expected = Calibration.record(
        pipe, prompt_embeds=given, negative_prompt_embeds=without, steps=4, guidance_scale=5.0, seed=7
    )
    found = Calibration.record(
        pipe.unet,
        scheduler=SCHEDULERS[name](),
        conditioning={"encoder_hidden_states": given},
        unconditional={"encoder_hidden_states": without},
        steps=4,
        guidance_scale=5.0,
        seed=7,
    )
    assert torch.equal(found.timesteps(), expected.timesteps())
    for a, b in zip(found.batches(2), expected.batches(2), strict=True):
        torch.testing.assert_close(a, b)


def test_a_sampler_takes_the_scheduler_s_steps() -> None:
    unet, scheduler = emoji.load_unet(), emoji.load_scheduler()
    calibration = Calibration.record(
        unet,
        scheduler=scheduler,
        conditioning={"encoder_hidden_states": emoji.embed(emoji.calibration_prompts(2))},
        unconditional={"encoder_hidden_states": emoji.embed([""])},
        guidance_scale=3.0,
        steps=4,
    )
    calibration.check(signature(unet))
    scheduler.set_timesteps(4)
    batches = list(calibration.batches(4))
    for batch, after, t in zip(batches, batches[1:], scheduler.timesteps, strict=False):
        without, given = eager(unet, batch)[0].chunk(2)
        latent = batch["sample"][:2]
        expected = scheduler.step(without + 3.0 * (given - without), t, latent, return_dict=False)[0]
        torch.testing.assert_close(after["sample"], torch.cat([expected, expected]))


def test_a_trajectory_does_not_depend_on_how_many_there_are() -> None:
    one, six = (
        Calibration.record(model("unconditional"), scheduler=DDPMScheduler(), trajectories=n, steps=3)
        for n in (1, 6)
    )
    assert sorted(pairs(six)) == [(t, s) for t in range(6) for s in range(3)]
    first, alone = six.groups[0].take((six.trajectories() == 0).nonzero()[:, 0]), one.groups[0]
    assert torch.equal(first.tensors(slice(1))["sample"], alone.tensors(slice(1))["sample"])  # the noise
    # Convolutions sum in another order for another batch size, and every step builds on the one before.
    torch.testing.assert_close(first.tensors(slice(None)), alone.tensors(slice(None)), rtol=1e-4, atol=1e-4)


def test_sampling_leaves_unet_scheduler_and_global_generator_alone() -> None:
    unet, scheduler = unconditional(dropout=0.5), EulerDiscreteScheduler()
    unet.train()
    before, times = torch.random.get_rng_state(), scheduler.timesteps.clone()
    first, again = (Calibration.record(unet, scheduler=scheduler, trajectories=1, steps=2) for _ in range(2))
    assert all(module.training for module in unet.modules())
    assert torch.equal(scheduler.timesteps, times)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.groups[0].columns["sample"].values, again.groups[0].columns["sample"].values)


def test_channels_behind_the_latent_s_are_part_of_the_sample() -> None:
    unet, concat = model("inpainting"), torch.randn(1, 5, 8, 8)
    words = {"encoder_hidden_states": torch.randn(3, 5, 16)}
    with pytest.raises(CalibrationError, match="missing: concat"):
        Calibration.record(unet, scheduler=DDIMScheduler(), conditioning=words)
    calibration = Calibration.record(
        unet, scheduler=DDIMScheduler(), conditioning=words, concat=concat, steps=2
    )
    calibration.check(signature(unet))
    assert len(calibration) == 6
    assert all(torch.equal(batch["sample"][:, 4:], concat) for batch in calibration.batches(1))


def test_conditioning_that_does_not_fit_is_refused() -> None:
    unet, context = model("conditional"), torch.randn(3, 5, 16)

    def record(**options: object) -> Calibration:
        return Calibration.record(unet, scheduler=DDIMScheduler(), steps=1, **options)

    with pytest.raises(CalibrationError, match="needs the conditioning encoder_hidden_states; missing: enc"):
        record()
    with pytest.raises(CalibrationError, match="not known: text_embeds"):
        record(conditioning={"encoder_hidden_states": context, "text_embeds": context})
    with pytest.raises(CalibrationError, match="encoder_hidden_states has 3 rows for 2 trajectories"):
        record(conditioning={"encoder_hidden_states": context}, trajectories=2)
    with pytest.raises(CalibrationError, match=r"guidance needs unconditional=\{...\}"):
        record(conditioning={"encoder_hidden_states": context}, guidance_scale=3.0)
    words = {"encoder_hidden_states": context}
    with pytest.raises(CalibrationError, match="unconditional= without guidance_scale= changes nothing"):
        record(conditioning=words, unconditional=words)
    with pytest.raises(CalibrationError, match=r"module=pipe\.controlnet"):
        Calibration.record(model("control"), scheduler=DDIMScheduler())


def test_options_that_a_unet_does_not_take_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"missing a required argument: 'scheduler'.*; it takes sched"):
        Calibration.record(model("conditional"))
    with pytest.raises(CalibrationError, match="unexpected keyword argument 'prompts'"):
        Calibration.record(model("conditional"), scheduler=DDIMScheduler(), prompts=["cat"])
    with pytest.raises(CalibrationError, match="a pipeline or a UNet, not str"):
        Calibration.record("a-pipeline")


def test_a_model_trained_on_fewer_timesteps_is_asked_for_no_others() -> None:
    unet = unconditional(
        block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        time_embedding_type="learned", num_train_timesteps=50,
    )  # fmt: skip
    randomize(unet)
    assert Calibration.synthesize(unet, steps=2, trajectories=1).timesteps().max() < 50


def test_half_precision_is_recorded_as_it_was_and_read_in_float() -> None:
    unet = copy.deepcopy(model("unconditional")).to(torch.bfloat16)
    calibration = Calibration.record(unet, scheduler=DDIMScheduler(), trajectories=2, steps=2)
    values = calibration.groups[0].columns["sample"].values
    assert values.dtype == torch.bfloat16
    assert torch.equal(next(calibration.batches(2))["sample"], values[:2].float())
    same_weights = Calibration.record(
        model("unconditional"), scheduler=DDIMScheduler(), trajectories=1, steps=1
    )
    assert calibration.origins[0].config == same_weights.origins[0].config


# --- a UNet alone


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_makes_rows_that_fit_it(name: str) -> None:
    unet = model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        calibration = Calibration.synthesize(unet, steps=8, trajectories=1)
    calibration.check(signature(unet))
    assert len(calibration) == len(calibration.timesteps().unique()) == 8


def test_random_conditions_come_with_a_warning_that_says_what_to_do() -> None:
    with pytest.warns(
        CalibrationWarning, match=r"random encoder_hidden_states(.|\n)*Calibration\.record\(pipe"
    ):
        Calibration.synthesize(model("conditional"), steps=1, trajectories=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Calibration.synthesize(model("unconditional"), steps=1, trajectories=1)


def test_a_synthetic_calibration_is_sized_by_the_time_that_a_call_takes() -> None:
    unet = model("unconditional")
    least, most = Calibration.synthesize(unet, seconds=0.0), Calibration.synthesize(unet, seconds=1e4)
    assert (len(least), len(least.timesteps().unique())) == (8, 8)
    assert (len(most), len(most.timesteps().unique())) == (160, 20)
    assert (most.origins[0].settings["steps"], most.origins[0].settings["trajectories"]) == (20, 8)
    assert len(Calibration.synthesize(unet, seconds=1e4, steps=3)) == 24
    assert len(Calibration.synthesize(unet, seconds=0.0, trajectories=2)) == 16


def test_seed_steps_and_trajectories_determine_a_synthetic_calibration() -> None:
    unet = model("classes")

    def rows(**options: int) -> dict[str, Tensor]:
        with pytest.warns(CalibrationWarning):
            found = Calibration.synthesize(unet, seconds=0.0, **options)
        return found.groups[0].tensors(slice(None))

    chosen, said, other = rows(), rows(steps=8, trajectories=1), rows(seed=5)
    assert all(torch.equal(chosen[name], said[name]) for name in chosen)
    assert not torch.equal(chosen["sample"], other["sample"])


def test_trajectories_that_would_explode_are_kept_in_bounds_and_it_is_said() -> None:
    unet, scheduler = model("unconditional"), DDIMScheduler(clip_sample=False)
    wild = Calibration.record(unet, scheduler=scheduler, trajectories=2, steps=10)
    tame = Calibration.synthesize(unet, scheduler=scheduler, trajectories=2, steps=10)
    assert max(batch["sample"].std() for batch in wild.batches(2)) > 5
    assert max(batch["sample"].std() for batch in tame.batches(2)) < 2.5
    assert "scaled back" in tame.origins[0].notes[-1]
    assert "note: latents that grew were scaled back" in tame.describe()


def test_sigmas_of_a_scheduler_are_not_taken_for_an_explosion() -> None:
    tame = Calibration.synthesize(
        model("unconditional"), scheduler=EulerDiscreteScheduler(prediction_type="v_prediction"),
        trajectories=1, steps=4,
    )  # fmt: skip
    assert tame.origins[0].notes == ()


class Echo(UNet2DModel):
    """A perfect noise predictor for pure noise."""

    def forward(self, sample: Tensor, timestep: object, **_: object) -> tuple[Tensor]:
        return (sample,)


def test_what_the_model_predicts_is_guessed_from_its_answer_to_noise() -> None:
    with pytest.warns(CalibrationWarning):
        velocity = Calibration.synthesize(emoji.load_unet(), steps=1, trajectories=1)
    noise = Calibration.synthesize(Echo(**unconditional().config), steps=1, trajectories=1)
    assert velocity.origins[0].scheduler_config["prediction_type"] == "v_prediction"
    assert noise.origins[0].scheduler_config["prediction_type"] == "epsilon"
    assert "guess" in noise.origins[0].notes[0]


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    broken = copy.deepcopy(model("unconditional"))
    with torch.no_grad():
        broken.conv_out.bias.fill_(float("nan"))
    with pytest.raises(
        CalibrationError, match="UNet2DModel gives values that are not finite at timestep 999"
    ):
        Calibration.synthesize(broken, steps=1, trajectories=1)
