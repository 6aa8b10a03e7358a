"""The bundled emoji model: it loads, reads prompts, and samples pairwise comparable pictures."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from dmqfx import emoji

FOUR = emoji.demo_prompts(4)


@cache
def sampled(steps: int = 4, seed: int = 0) -> Tensor:
    return emoji.sample(emoji.load_unet(), FOUR, steps=steps, seed=seed)


def test_the_unet_loads_as_float32_in_eval_mode() -> None:
    unet = emoji.load_unet()
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    assert not unet.training
    assert sum(parameter.numel() for parameter in unet.parameters()) > 5_000_000


def test_sampling_a_prompt_gives_a_picture_of_it() -> None:
    """A red apple on white: the middle is red, the corners are near white."""
    latents = emoji.sample(emoji.load_unet(), ["cat:food-drink sub:food-fruit red apple"], steps=12)
    red, green, blue = emoji.decode(latents)[0, :, 12:24, 10:22].flatten(1).mean(1)
    assert red > 0.4
    assert green < -0.2
    assert blue < -0.2
    assert emoji.decode(latents)[0, :, :2, :2].mean() > 0.7


def test_a_row_depends_on_its_prompt_and_place_alone_so_runs_can_be_paired() -> None:
    assert torch.allclose(emoji.sample(emoji.load_unet(), FOUR[:2], steps=4), sampled()[:2], atol=1e-4)


def test_the_same_seed_gives_the_same_latents_and_another_seed_gives_others() -> None:
    assert torch.equal(emoji.sample(emoji.load_unet(), FOUR, steps=4), sampled())
    assert not torch.allclose(sampled(seed=1), sampled(), atol=0.1)


def test_guidance_runs_as_one_batch_with_the_unconditional_half_first() -> None:
    unet, seen = emoji.load_unet(), []

    class Spy:
        device = torch.device("cpu")

        def __call__(self, sample: Tensor, timestep: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
            seen.append((sample.shape[0], inputs["encoder_hidden_states"]))
            return unet(sample, timestep, **inputs)

    assert torch.equal(emoji.sample(Spy(), FOUR, steps=4), sampled())
    assert [rows for rows, _ in seen] == [8] * 4
    assert torch.equal(seen[0][1][:4], emoji.embed([""] * 4))
    assert torch.equal(seen[0][1][4:], emoji.embed(FOUR))


def test_without_guidance_the_unconditional_half_does_not_matter() -> None:
    """cfg = 1 is the conditional prediction itself: sampling it alone gives the same."""
    unet, scheduler = emoji.load_unet(), emoji.load_scheduler()
    scheduler.set_timesteps(3)
    latents = torch.randn((4, *emoji.LATENT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            v = unet(latents, t, encoder_hidden_states=emoji.embed(FOUR)).sample
            latents = scheduler.step(v, t, latents).prev_sample
    assert torch.allclose(emoji.sample(unet, FOUR, steps=3, cfg=1.0), latents, atol=1e-4)


def test_every_caption_can_be_embedded_and_padding_is_the_null_word() -> None:
    context = emoji.embed(emoji.prompts())
    assert context.shape == (1023, 8, 128)
    assert context.dtype == torch.float32
    null = emoji.embed([""])[0, 0]
    assert torch.equal(emoji.embed(["ghost"])[0, 1:], null.expand(7, 128))
    assert not torch.equal(emoji.embed(["ghost"])[0, 0], null)


def test_words_with_blanks_in_them_are_one_token() -> None:
    vocabulary = json.loads((emoji._ASSETS / "words" / "vocab.json").read_text())["vocab"]
    prompt = "cat:travel-places sub:sky & weather rainbow"
    assert [vocabulary[i] for i in emoji._tokens(prompt, vocabulary, 4)] == [
        "cat:travel-places",
        "sub:sky & weather",
        "rainbow",
        "<null>",
    ]


def test_case_and_extra_blanks_of_a_prompt_do_not_matter() -> None:
    assert torch.equal(emoji.embed(["  Red   apple "]), emoji.embed(["red apple"]))


def test_an_unknown_word_is_refused_with_the_nearest_known_ones() -> None:
    with pytest.raises(emoji.PromptError, match=r"'grining' of the prompt 'grining face'; near it: grinning"):
        emoji.embed(["grining face"])


def test_a_prompt_of_more_than_eight_words_is_refused() -> None:
    with pytest.raises(emoji.PromptError, match="has 9 words; the emoji model reads at most 8"):
        emoji.embed(["red " * 9])


@pytest.mark.parametrize("count", [1, 16, 400])
def test_calibration_and_demo_prompts_are_disjoint_and_fixed_in_number(count: int) -> None:
    shown, calibrated = emoji.demo_prompts(count), emoji.calibration_prompts(count)
    assert len(set(shown)) == len(set(calibrated)) == count
    assert not set(shown) & set(calibrated)
    assert set(shown) | set(calibrated) <= set(emoji.prompts())


def test_the_calibration_prompts_cover_all_six_categories() -> None:
    assert len({prompt.split()[0] for prompt in emoji.calibration_prompts()}) == 6


def test_decoding_is_the_inverse_of_the_haar_transform_and_stays_in_range() -> None:
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    haar = torch.linalg.qr(torch.randn(12, 12))[0]  # a transform that is orthonormal, but not the right one
    right = _haar()
    assert torch.allclose(emoji.decode(conv2d(image, right, stride=2)), image, atol=1e-5)
    assert not torch.allclose(
        emoji.decode(conv2d(image, haar.reshape(right.shape), stride=2)), image, atol=0.1
    )
    assert emoji.decode(torch.full((1, *emoji.LATENT), 9.0)).abs().max() <= 1


def _haar() -> Tensor:
    """The 2 x 2 Haar transform, read off the decoder one latent channel at a time."""
    impulses = 0.5 * torch.eye(12)[:, :, None, None]
    return 2 * emoji.decode(impulses)
