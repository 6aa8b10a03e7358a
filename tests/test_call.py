"""Every way to call a diffusers UNet ends in the same named tensors; all else is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch
from models import ADDED, model, one_level
from torch import Tensor

from dmqfx.errors import CallError
from dmqfx.frontend.call import arguments, bind
from dmqfx.frontend.signature import SUPPORTED, signature
from dmqfx.graph.inputs import InputSpec


@cache
def spec(name: str, residuals: bool = False) -> InputSpec:
    return signature(model(name), residuals=residuals)


def draw(name: str, **sizes: int) -> dict[str, Tensor]:
    return spec(name).draw(torch.Generator().manual_seed(0), **sizes)


def said(inputs: Mapping[str, Tensor]) -> dict[str, object]:
    """A program's inputs as keywords of a diffusers call."""
    added = {name: tensor for name, tensor in inputs.items() if name in ADDED}
    return {
        **{name: tensor for name, tensor in inputs.items() if name not in ADDED},
        "added_cond_kwargs": added,
    }


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "timestep",
    [
        7,
        7.0,
        torch.tensor(7),
        torch.tensor([7]),
        torch.tensor([7, 7, 7]),
        torch.tensor(7, dtype=torch.int32),
        torch.tensor([7.0], dtype=torch.float16),
        torch.tensor([7.0, 7.0, 7.0], dtype=torch.float64),
        np.int64(7),
        np.float64(7),
        np.float32(7),
    ],
)
@pytest.mark.parametrize("name", ["unconditional", "conditional"])
def test_every_form_of_a_timestep_is_one_float_per_sample(name: str, timestep: int | float | Tensor) -> None:
    inputs = draw(name, B=3)
    context = [inputs["encoder_hidden_states"]] if name == "conditional" else []
    bound = bind(spec(name), [inputs["sample"], timestep, *context], {})
    assert bound["timestep"].dtype == torch.float32
    assert bound["timestep"].tolist() == [7.0, 7.0, 7.0]


def test_timesteps_may_be_mixed_and_fractional() -> None:
    inputs = draw("conditional", B=2)
    inputs["timestep"] = torch.tensor([0.25, 999.5], dtype=torch.float64)
    assert bind(spec("conditional"), (), inputs)["timestep"].tolist() == [0.25, 999.5]


def test_a_python_float_loses_its_fraction_in_an_unconditional_unet_as_in_diffusers() -> None:
    unet, inputs = model("unconditional"), draw("unconditional", B=1)
    bound = bind(spec("unconditional"), [inputs["sample"], 7.9], {})
    assert bound["timestep"].tolist() == [7.0]
    with torch.no_grad():
        assert torch.equal(unet(inputs["sample"], 7.9).sample, unet(**bound).sample)


def test_position_keyword_and_none_mean_the_same() -> None:
    inputs = draw("conditional")
    sample, timestep, context = inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]
    nothing = {
        "timestep_cond": None,
        "attention_mask": None,
        "cross_attention_kwargs": {},
        "added_cond_kwargs": None,
        "down_block_additional_residuals": None,
        "return_dict": False,
    }
    assert same(bind(spec("conditional"), [sample, timestep, context], nothing), inputs)
    assert same(bind(spec("conditional"), [sample, timestep], {"encoder_hidden_states": context}), inputs)


def test_conditions_come_out_of_their_dictionary() -> None:
    inputs = draw("stable-diffusion-xl", B=3)
    added = {name: inputs[name] for name in ("time_ids", "text_embeds")}
    plain = {name: inputs[name] for name in ("sample", "timestep", "encoder_hidden_states")}
    assert same(bind(spec("stable-diffusion-xl"), (), {**plain, "added_cond_kwargs": added}), inputs)


def test_a_half_precision_sample_is_cast_to_the_program() -> None:
    inputs = {name: tensor.half() for name, tensor in draw("conditional").items()}
    assert {t.dtype for t in bind(spec("conditional"), (), inputs).values()} == {torch.float32}


def test_class_labels_are_numbers_for_every_sample() -> None:
    inputs = draw("classes", B=3)
    for labels in (2, torch.tensor(2), torch.tensor([2], dtype=torch.int32), torch.tensor([2, 2, 2])):
        bound = bind(spec("classes"), (), {**inputs, "class_labels": labels})
        assert bound["class_labels"].tolist() == [2, 2, 2]
        assert bound["class_labels"].dtype == torch.int64
    with pytest.raises(CallError, match="class numbers"):
        bind(spec("classes"), (), {**inputs, "class_labels": torch.tensor([2.0])})


def test_a_model_that_reads_no_context_may_be_given_one() -> None:
    inputs = draw("kandinsky-2.2")
    added = {"image_embeds": inputs["image_embeds"]}
    call = [inputs["sample"], inputs["timestep"], torch.zeros(2, 5, 99)]
    assert same(bind(spec("kandinsky-2.2"), call, {"added_cond_kwargs": added}), inputs)


def test_a_control_net_that_pools_is_called_in_guess_mode_by_its_pipelines_which_changes_nothing() -> None:
    unet, inputs = model("control-xl"), draw("control-xl")
    assert same(bind(spec("control-xl"), (), {**said(inputs), "guess_mode": True}), inputs)
    with torch.no_grad():
        plain, guessed = (
            unet(**said(inputs), guess_mode=mode, return_dict=False)[1] for mode in (False, True)
        )
    assert torch.equal(plain, guessed)


def test_residuals_come_as_a_list_or_a_tuple() -> None:
    inputs = draw("plain")
    down = [torch.randn(2, 16, 8, 8) for _ in range(4)]
    for collection in (down, tuple(down)):
        residuals = {"down_block_additional_residuals": collection, "mid_block_additional_residual": down[0]}
        bound = bind(spec("plain", residuals=True), (), {**inputs, **residuals})
        assert all(torch.equal(bound[f"down_residual_{k}"], down[k]) for k in range(4))
        assert torch.equal(bound["mid_residual"], down[0])


def test_residuals_left_out_are_zeros_that_broadcast() -> None:
    bound = bind(spec("plain", residuals=True), (), draw("plain"))
    assert [tuple(t.shape) for name, t in bound.items() if "residual" in name] == [(1, 1, 1, 1)] * 5
    assert not any(t.any() for name, t in bound.items() if "residual" in name)


def test_a_guidance_embedding_left_out_is_zero_which_is_what_diffusers_makes_of_none() -> None:
    unet, inputs = model("consistency"), draw("consistency")
    del inputs["timestep_cond"]
    bound = bind(spec("consistency"), (), inputs)
    with torch.no_grad():
        assert torch.equal(unet(**inputs).sample, unet(**bound).sample)


@pytest.mark.parametrize("scale", [None, 0.5, torch.tensor(0.5)])
def test_a_conditioning_scale_is_one_number_and_one_by_default(scale: float | Tensor | None) -> None:
    inputs = {**draw("control"), "conditioning_scale": scale, "guess_mode": False}
    bound = bind(spec("control"), (), inputs)
    assert bound["conditioning_scale"].shape == ()
    assert bound["conditioning_scale"].item() == (1.0 if scale is None else 0.5)


REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("conditional", {"attention_mask": torch.ones(2, 8)}, "does not take attention_mask.*call without it"),
    ("conditional", {"encoder_attention_mask": torch.ones(2, 8)}, "does not take encoder_attention_mask"),
    ("conditional", {"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs.*fuse_lora"),
    ("conditional", {"down_intrablock_additional_residuals": [torch.ones(1)]}, "T2I-Adapters"),
    ("conditional", {"down_block_additional_residuals": [torch.ones(1)]}, "residuals=True"),
    ("conditional", {"mid_block_additional_residual": torch.ones(1)}, "residuals=True"),
    ("conditional", {"added_cond_kwargs": {"image_embeds": torch.ones(2, 4)}}, "unload_ip_adapter"),
    ("conditional", {"class_labels": torch.tensor([1, 1])}, "class_labels.*no class embedding"),
    (
        "conditional",
        {"timestep_cond": torch.ones(2, 4)},
        "does not take timestep_cond; it takes sample, timestep",
    ),
    ("conditional", {"encoder_hidden_state": torch.ones(1)}, "did you mean 'encoder_hidden_states'"),
    ("conditional", {"nonsense": torch.ones(1)}, "has no 'nonsense'"),
    ("conditional", {"encoder_hidden_states": None}, "needs encoder_hidden_states"),
    ("conditional", {"encoder_hidden_states": torch.ones(2, 8, 17)}, r"\[2, 8, 17\], not \[B, T, 16\]"),
    ("conditional", {"encoder_hidden_states": torch.ones(1, 8, 16)}, r"encoder_hidden_states has sizes"),
    ("conditional", {"encoder_hidden_states": torch.ones(2, 16)}, r"encoder_hidden_states has sizes"),
    ("conditional", {"timestep": "5"}, "timestep must be a number or a tensor, not str"),
    ("conditional", {"encoder_hidden_states": [1, 2]}, "must be a tensor, not list"),
    ("conditional", {"sample": torch.ones(2, 5, 8, 8)}, r"sample has sizes \[2, 5, 8, 8\]"),
    ("conditional", {"sample": None}, "sample must be a tensor"),
    ("conditional", {"sample": torch.ones(4, 8, 8)}, "sample must be a tensor"),
    ("conditional", {"timestep": None}, "needs timestep"),
    ("conditional", {"timestep": torch.ones(3)}, r"timestep has sizes \[3\]"),
    ("stable-diffusion-xl", {"text_embeds": None}, "needs text_embeds in added_cond_kwargs"),
    ("unconditional", {"sample": torch.ones(2, 3, 8, 9)}, "width 9 is not a multiple of 2"),
    ("unconditional", {"class_labels": torch.tensor([1, 1])}, "no class embedding"),
    ("control", {"guess_mode": True}, "guess_mode=False"),
    ("control", {"conditioning_scale": torch.ones(2)}, r"conditioning_scale is one number, not \[2\]"),
    ("control", {"conditioning_scale": [0.5]}, "conditioning_scale must be a number or a tensor, not list"),
    ("audio", {"encoder_hidden_states": torch.ones(2, 8, 16)}, "does not take encoder_hidden_states"),
    ("control", {"controlnet_cond": torch.ones(2, 3, 64, 64)}, r"not \[B, 3, H\*4, W\*4\]"),
    ("control", {"controlnet_cond": None}, "needs controlnet_cond"),
]


@pytest.mark.parametrize(("name", "change", "says"), REFUSED)
def test_what_the_graph_does_not_take_is_refused_by_name(
    name: str, change: dict[str, object], says: str
) -> None:
    inputs: dict[str, object] = {**draw(name)}
    if name == "stable-diffusion-xl":
        inputs = {**inputs, **change}
        added = {key: inputs.pop(key) for key in ("text_embeds", "time_ids")}
        change = {"added_cond_kwargs": added}
    with pytest.raises(CallError, match=f"(?s){says}"):
        bind(spec(name), (), {**inputs, **change})


def test_residuals_must_be_complete() -> None:
    inputs, residual = draw("plain"), torch.zeros(2, 16, 8, 8)
    wanted = spec("plain", residuals=True)
    with pytest.raises(CallError, match="residuals comes without mid_block_additional_residual"):
        bind(wanted, (), {**inputs, "down_block_additional_residuals": [residual] * 4})
    with pytest.raises(CallError, match="residual comes without down_block_additional_residuals"):
        bind(wanted, (), {**inputs, "mid_block_additional_residual": residual})
    few = {"down_block_additional_residuals": [residual] * 3, "mid_block_additional_residual": residual}
    with pytest.raises(CallError, match="3 residuals, but the encoder has 4 skip connections"):
        bind(wanted, (), {**inputs, **few})


def test_an_argument_given_twice_or_too_many_are_refused() -> None:
    inputs = draw("unconditional")
    with pytest.raises(CallError, match="sample is given twice"):
        bind(spec("unconditional"), [inputs["sample"]], inputs)
    with pytest.raises(CallError, match="takes 4 arguments, not 5"):
        bind(spec("unconditional"), [inputs["sample"], 1, None, True, 2], {})


@pytest.mark.parametrize("cls", SUPPORTED)
def test_arguments_are_named_as_in_diffusers(cls: type) -> None:
    names = list(inspect.signature(cls.forward).parameters)[1:]
    assert arguments(cls.__name__, range(len(names)), {}) == dict(zip(names, range(len(names)), strict=True))


@pytest.mark.parametrize(
    ("total", "each", "pooled", "ids"),
    [(2816, 256, 1280, 6), (2560, 256, 1280, 5), (5632, 256, 4096, 6), (20, 8, 4, 2)],
)
def test_the_width_of_the_pooled_text_is_read_off_the_embedding(
    total: int, each: int, pooled: int, ids: int
) -> None:
    unet = one_level(
        addition_embed_type="text_time",
        addition_time_embed_dim=each,
        projection_class_embeddings_input_dim=total,
    )
    sizes = signature(unet).sizes
    assert (sizes["E"], sizes["I"]) == (pooled, ids)
