"""A compiled UNet in the place of the diffusers one: calls, pipelines, devices, copies."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import handmade
import pytest
import torch
from accelerate import cpu_offload_with_hook
from components import text_encoder, tokenizer, vae
from diffusers import (
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from models import Model, captured, relative
from torch import Tensor, nn
from transformers import CLIPTokenizer

from dmqfx.compiler import quantize
from dmqfx.errors import CallError, DmqfxError, FixedGraphError, PassNotFoundError, StoreError
from dmqfx.graph.pipeline import PassContext
from dmqfx.policy.policy import Policy
from dmqfx.runtime import targets
from dmqfx.runtime.targets import Target
from dmqfx.runtime.unet import CompiledUNet

AS_CAPTURED = Target("float", (), "the graph as it is")


def compiled(name: str, *, residuals: bool = False) -> tuple[Model, CompiledUNet]:
    """A model and its captured graph, unquantized, in the place of the model."""
    model, program = captured(name, residuals) if residuals else captured(name)
    return model, CompiledUNet(program, config=model.config, target=AS_CAPTURED)


@pytest.fixture(scope="module")
def plain() -> tuple[Model, CompiledUNet]:
    return compiled("unconditional")


@pytest.fixture(scope="module")
def text() -> tuple[Model, CompiledUNet]:
    """One that takes residuals, and is mostly called without."""
    return compiled("conditional", residuals=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return tokenizer(tmp_path_factory.mktemp("tokenizer"))


def latents(channels: int = 4, size: int = 8, batch: int = 1) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(3))


def context(batch: int = 1, length: int = 8, width: int = 16) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(4))


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(5)


# --- calls


def test_the_outputs_are_those_of_diffusers(text: tuple[Model, CompiledUNet]) -> None:
    model, q = text
    given = (latents(), 7, context())
    for arguments in (dict(zip(("sample", "timestep", "encoder_hidden_states"), given, strict=True)), None):
        call = (lambda unet, a=arguments: unet(**a)) if arguments else (lambda unet: unet(*given))
        ours, theirs = call(q), call(model)
        assert type(ours) is type(theirs)
        assert relative(ours.sample, theirs.sample) < 1e-6
    assert isinstance(q(*given, return_dict=False), tuple)
    assert torch.equal(q(*given, return_dict=False)[0], q(*given)[0])


def test_return_dict_may_come_by_position(plain: tuple[Model, CompiledUNet]) -> None:
    _, q = plain
    (sample,) = q(latents(3, 16), 7, None, False)
    assert torch.equal(sample, q(latents(3, 16), 7).sample)


def test_a_controlnet_feeds_a_unet_that_takes_residuals(text: tuple[Model, CompiledUNet]) -> None:
    control, q_control = compiled("control")
    model, q = text
    hint = torch.rand(1, 3, 32, 32, generator=noise())
    arguments = {"encoder_hidden_states": context(), "controlnet_cond": hint, "conditioning_scale": 0.5}
    ours, theirs = (net(latents(), 7, **arguments) for net in (q_control, control))
    assert type(ours) is type(theirs)
    assert len(ours.down_block_res_samples) == len(theirs.down_block_res_samples)
    down, mid = q_control(latents(), 7, **arguments, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    given = (latents(), 7, context())
    assert relative(q(*given, **residuals).sample, model(*given, **residuals).sample) < 1e-6
    assert relative(q(*given).sample, model(*given).sample) < 1e-6
    assert relative(q(*given, **residuals).sample, q(*given).sample) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_caller_gets_its_own_dtype_back(text: tuple[Model, CompiledUNet], dtype: torch.dtype) -> None:
    _, q = text
    result = q(latents().to(dtype), 7, context().to(dtype)).sample
    assert result.dtype == dtype
    assert relative(result.float(), q(latents(), 7, context()).sample) < 0.05


def test_an_unknown_keyword_names_the_nearest_one(text: tuple[Model, CompiledUNet]) -> None:
    _, q = text
    with pytest.raises(CallError, match=r"encoder_hidden_state.*did you mean 'encoder_hidden_states'"):
        q(latents(), 7, encoder_hidden_state=context())
    with pytest.raises(CallError, match=r"does not take attention_mask; it takes sample, timestep, enc"):
        q(latents(), 7, context(), attention_mask=torch.ones(1, 8))


def test_gradients_reach_the_sample_but_no_weight(text: tuple[Model, CompiledUNet]) -> None:
    _, q = text
    sample = latents().requires_grad_()
    q(sample, 7, context()).sample.sum().backward()
    assert sample.grad is not None
    assert sample.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in q.parameters())


# --- what pipelines read


def test_a_compiled_unet_shows_what_pipelines_read(text: tuple[Model, CompiledUNet]) -> None:
    model, q = text
    assert q.config.in_channels == model.config.in_channels
    assert dict(q.config) == dict(model.config)
    assert q.config.time_cond_proj_dim is None
    assert (q.dtype, q.device) == (torch.float32, torch.device("cpu"))
    assert next(q.parameters()).dtype == torch.float32
    assert q.encoder_hid_proj is None
    assert q.attn_processors == {}
    assert not hasattr(q, "add_embedding")
    assert repr(q) == "CompiledUNet(UNet2DConditionModel, target float)"


OF_LAYERS = ("enable_layerwise_casting", "enable_xformers_memory_efficient_attention", "set_attn_processor")
OF_GRAPHS = "save_pretrained from_pretrained num_parameters get_memory_footprint enable_group_offload".split()


@pytest.mark.parametrize("name", ["conditional", "control"])
def test_what_a_fixed_graph_cannot_do_is_refused_and_never_silently_nothing(name: str) -> None:
    model, q = compiled(name, residuals=name == "conditional")
    there = {method for method in dir(type(model)) if callable(getattr(type(model), method))}
    for method in (*OF_LAYERS, *(there - set(dir(nn.Module)) - set(OF_GRAPHS))):
        if method.startswith("_"):
            continue
        with pytest.raises(FixedGraphError, match=f"{method}: its graph is fixed\n  mend: "):
            getattr(q, method)
        assert not hasattr(q, method)
    assert issubclass(FixedGraphError, DmqfxError)
    with pytest.raises(AttributeError, match="no attribute 'anything_else'"):
        q.anything_else  # noqa: B018  # the access is what is tested


def test_a_compiled_unet_is_not_pickled_but_copied(plain: tuple[Model, CompiledUNet]) -> None:
    _, q = plain
    with pytest.raises(StoreError, match=r"not pickled\n  mend: save_pretrained\(directory\)"):
        pickle.dumps(q)
    with pytest.raises(StoreError, match="not pickled"):
        torch.save(q, io.BytesIO())
    alias = copy.copy(q)
    assert alias.program is q.program
    assert torch.equal(alias(latents(3, 16), 7).sample, q(latents(3, 16), 7).sample)


def test_parameters_are_counted_and_weighed(plain: tuple[Model, CompiledUNet]) -> None:
    model, q = plain
    assert q.num_parameters() == model.num_parameters()
    assert q.num_parameters(only_trainable=True) == 0
    assert q.get_memory_footprint() >= 4 * q.num_parameters()


# --- pipelines


def unconditional_images(pipe: DDPMPipeline | DDIMPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipe(2, generator=noise(), num_inference_steps=3, output_type="np").images)


@pytest.mark.parametrize(
    ("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)]
)
def test_unconditional_pipelines_draw_the_same(
    plain: tuple[Model, CompiledUNet],
    pipeline: type[DDPMPipeline | DDIMPipeline],
    scheduler: type[SchedulerMixin],
) -> None:
    model, q = plain
    theirs = unconditional_images(pipeline(model, scheduler()))
    replaced = pipeline(model, scheduler())
    replaced.unet = q
    assert relative(unconditional_images(replaced), theirs) < 1e-5
    assert relative(unconditional_images(pipeline(q, scheduler())), theirs) < 1e-5


def stable_diffusion(
    unet: nn.Module, words: CLIPTokenizer, scheduler: SchedulerMixin
) -> StableDiffusionPipeline:
    parts = vae(), text_encoder(), words, unet, scheduler, None, None
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def draw(pipe: StableDiffusionPipeline, steps: int = 3, **more: object) -> Tensor:
    """A batch of one picture, with guidance."""
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "pt", **more}
    return pipe("a cat", generator=noise(), **given).images


def ddim() -> DDIMScheduler:
    """As Stable Diffusion configures it."""
    return DDIMScheduler(steps_offset=1, clip_sample=False)


SCHEDULERS: Mapping[str, Callable[[], SchedulerMixin]] = {
    "DDIM": ddim,
    "Euler": lambda: EulerDiscreteScheduler(steps_offset=1),
    "DPM++": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", steps_offset=1),
    "LCM": lambda: LCMScheduler(steps_offset=1),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_stable_diffusion_draws_the_same(
    text: tuple[Model, CompiledUNet], words: CLIPTokenizer, scheduler: str
) -> None:
    model, q = text
    pipe = stable_diffusion(model, words, SCHEDULERS[scheduler]())
    theirs = draw(pipe)
    pipe.unet = q
    assert relative(draw(pipe), theirs) < 1e-5


def test_a_pipeline_can_be_made_with_a_compiled_unet(
    text: tuple[Model, CompiledUNet], words: CLIPTokenizer
) -> None:
    model, q = text
    given = {"height": 16, "width": 24, "num_images_per_prompt": 2}
    theirs = draw(stable_diffusion(model, words, ddim()), **given)
    assert relative(draw(stable_diffusion(q, words, ddim()), **given), theirs) < 1e-5


def test_stable_diffusion_from_a_picture_draws_the_same(
    text: tuple[Model, CompiledUNet], words: CLIPTokenizer
) -> None:
    model, q = text
    parts = stable_diffusion(model, words, ddim()).components
    pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    start = torch.rand(1, 3, 8, 8, generator=noise())
    theirs = draw(pipe, image=start, strength=0.7)
    pipe.unet = q
    assert relative(draw(pipe, image=start, strength=0.7), theirs) < 1e-5


@pytest.mark.slow
def test_stable_diffusion_xl_draws_the_same(words: CLIPTokenizer) -> None:
    model, q = compiled("stable-diffusion-xl")
    assert q.add_embedding.linear_1.in_features == model.add_embedding.linear_1.in_features
    encoders = text_encoder(8), text_encoder(8, projection=20)
    pipe = StableDiffusionXLPipeline(vae(), *encoders, words, words, model, EulerDiscreteScheduler())
    theirs = draw(pipe)
    pipe.unet = q
    assert relative(draw(pipe), theirs) < 1e-5


def test_a_controlnet_pipeline_draws_the_same(text: tuple[Model, CompiledUNet], words: CLIPTokenizer) -> None:
    model, q = text
    control, q_control = compiled("control")
    assert isinstance(q_control, ControlNetModel)
    parts = {**stable_diffusion(model, words, ddim()).components, "vae": vae(levels=3)}
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    hint = torch.rand(1, 3, 32, 32, generator=noise())
    theirs = draw(pipe, image=hint)
    pipe.unet, pipe.controlnet = q, q_control
    assert relative(draw(pipe, image=hint), theirs) < 1e-5


def test_a_consistency_pipeline_draws_the_same(words: CLIPTokenizer) -> None:
    model, q = compiled("consistency")
    parts = vae(), text_encoder(), words, model, LCMScheduler(), None, None
    pipe = LatentConsistencyModelPipeline(*parts, requires_safety_checker=False)
    theirs = draw(pipe)
    pipe.unet = q
    assert relative(draw(pipe), theirs) < 1e-5


# --- moves, casts, copies


def test_a_pipeline_in_half_precision_runs_and_says_what_stays(
    text: tuple[Model, CompiledUNet], words: CLIPTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    q = copy.deepcopy(text[1])
    before = draw(stable_diffusion(q, words, ddim()))
    parts = stable_diffusion(q, words, ddim()).components
    parts["vae"] = copy.deepcopy(vae())
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    with caplog.at_level(logging.WARNING, "dmqfx"):
        pipe.to(torch.bfloat16)
    assert [r.getMessage() for r in caplog.records if "keeps its own precision" in r.getMessage()]
    after = draw(pipe)
    assert after.dtype == torch.bfloat16
    assert relative(after.float(), before) < 0.1
    assert q.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in q.parameters()} == {torch.float32}


def test_a_cast_changes_no_weight(text: tuple[Model, CompiledUNet]) -> None:
    q = copy.deepcopy(text[1])
    expected = q(latents(), 7, context()).sample
    for cast in (
        q.half,
        q.bfloat16,
        q.double,
        q.float,
        lambda: q.to(torch.float16),
        lambda: q.type(torch.float16),
    ):
        cast()
        assert torch.equal(q(latents(), 7, context()).sample, expected)
    assert q.dtype == torch.float16
    assert q.float().dtype == torch.float32


def test_a_cast_to_its_own_precision_is_silent(
    text: tuple[Model, CompiledUNet], caplog: pytest.LogCaptureFixture
) -> None:
    q = copy.deepcopy(text[1])
    with caplog.at_level(logging.DEBUG, "dmqfx"):
        assert q.to("cpu").to(torch.float32).to(memory_format=torch.channels_last) is q
    assert not caplog.records


def test_devices_inside_the_graph_follow_a_move(text: tuple[Model, CompiledUNet]) -> None:
    _, q = text
    moved = copy.deepcopy(q).to("meta")
    named = {
        value
        for node in moved.runner.graph.nodes
        for value in (*node.args, *node.kwargs.values())
        if isinstance(value, torch.device)
    }
    assert named == {torch.device("meta")}
    assert moved.device == torch.device("meta")
    assert {parameter.device for parameter in moved.parameters()} == {torch.device("meta")}
    assert moved.program.device == torch.device("cpu")
    with pytest.raises(CallError, match="enable_model_cpu_offload"):
        moved(latents(), 7, context())


def test_offloading_the_whole_module_changes_nothing(text: tuple[Model, CompiledUNet]) -> None:
    expected = text[1](latents(), 7, context()).sample
    hooked, hook = cpu_offload_with_hook(copy.deepcopy(text[1]), "cpu")
    assert torch.equal(hooked(latents(), 7, context()).sample, expected)
    hook.remove()
    grouped = copy.deepcopy(text[1])
    grouped.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(grouped(latents(), 7, context()).sample, expected)


def test_a_move_leaves_the_model_it_came_from() -> None:
    model, program = captured("unconditional")
    CompiledUNet(program, config=model.config, target=AS_CAPTURED).to("meta")
    assert model.device == torch.device("cpu")
    assert program.device == torch.device("cpu")


def test_a_deep_copy_is_equal_and_independent(text: tuple[Model, CompiledUNet]) -> None:
    _, q = text
    twin = copy.deepcopy(q)
    expected = q(latents(), 7, context()).sample
    assert torch.equal(twin(latents(), 7, context()).sample, expected)
    assert twin.config == q.config
    assert twin.training == q.training
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert torch.equal(q(latents(), 7, context()).sample, expected)
    assert not torch.equal(twin(latents(), 7, context()).sample, expected)
    pairs = zip(q.program.weights().values(), twin.program.weights().values(), strict=True)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_a_state_dict_comes_back(text: tuple[Model, CompiledUNet]) -> None:
    _, q = text
    twin = copy.deepcopy(q)
    state = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    twin.load_state_dict(state)
    assert torch.equal(twin(latents(), 7, context()).sample, q(latents(), 7, context()).sample)


def test_a_pipeline_is_saved_and_loaded_with_its_compiled_unet(tmp_path: Path) -> None:
    model, program = captured("unconditional")
    _, quantized = quantize(program, PassContext(policy=Policy.load("w8a16")))
    pipe = DDIMPipeline(CompiledUNet(quantized, config=model.config), DDIMScheduler())
    pipe.save_pretrained(tmp_path / "pipe")
    again = DDIMPipeline.from_pretrained(tmp_path / "pipe")
    assert isinstance(again.unet, CompiledUNet)
    assert torch.equal(unconditional_images(again), unconditional_images(pipe))
    half = DDIMPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.float16)
    assert half.unet.dtype == torch.float16
    alone = CompiledUNet.from_pretrained(tmp_path / "pipe", subfolder="unet")
    assert torch.equal(alone(latents(3, 16), 7).sample, pipe.unet(latents(3, 16), 7).sample)


@pytest.mark.slow
def test_a_pipeline_is_saved_and_loaded_with_its_compiled_controlnet(
    words: CLIPTokenizer, tmp_path: Path
) -> None:
    parts = dict[str, CompiledUNet]()
    for part, name, residuals in (("unet", "conditional", True), ("controlnet", "control", False)):
        model, program = captured(name, residuals) if residuals else captured(name)
        _, quantized = quantize(program, PassContext(policy=Policy.load("w8a16")))
        parts[part] = CompiledUNet(quantized, config=model.config)
    components = {**stable_diffusion(parts["unet"], words, ddim()).components, "vae": vae(levels=3), **parts}
    pipe = StableDiffusionControlNetPipeline(**components, requires_safety_checker=False)
    hint = torch.rand(1, 3, 32, 32, generator=noise())
    expected = draw(pipe, image=hint)
    pipe.save_pretrained(tmp_path / "pipe")
    again = StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
    assert isinstance(again.controlnet, ControlNetModel)
    assert isinstance(again.controlnet, CompiledUNet)
    assert torch.equal(draw(again, image=hint), expected)


# --- targets


def test_auto_is_the_native_kernels_where_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert targets.resolve("auto").name == "cpu"
    monkeypatch.setattr(targets, "library", lambda: None)
    assert targets.resolve("auto").name == "reference"
    assert targets.resolve(AS_CAPTURED) is AS_CAPTURED


def test_the_native_target_gives_the_bits_of_the_reference_and_says_what_stayed_with_it() -> None:
    native, reference = handmade.compiled("cpu"), handmade.compiled("reference")
    assert torch.equal(handmade.outputs(native), handmade.outputs(reference))
    assert [done.name for done in native.lowering] == [
        "choose-forms",
        "lower-reference",
        "lower-cpu",
        "fuse",
        "lower-float",
        "hoist-invariants",
    ]
    assert [str(done.at) for done in native.lowering[2].applied] == [
        str(handmade.FIRST),
        str(handmade.SECOND),
    ]
    assert [done.name for done in reference.lowering] == ["lower-reference"]
    held = {name for name in native.runner.state_dict() if name.startswith(f"{handmade.FIRST.path}.weight")}
    assert held == {f"{handmade.FIRST.path}.weight_kernel", f"{handmade.FIRST.path}.weight_scale"}


def test_an_unknown_target_names_the_nearest_one() -> None:
    with pytest.raises(PassNotFoundError, match="did you mean 'simulate'"):
        targets.resolve("simulated")
