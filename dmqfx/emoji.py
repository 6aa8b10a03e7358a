"""The bundled text-to-emoji diffusion model: small, but trained, so that a policy's effect can be seen."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DDIMScheduler, SchedulerMixin, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv_transpose2d, embedding
from tqdm import tqdm

from dmqfx.errors import DmqfxError

LATENT = (12, 16, 16)
_ASSETS = Path(__file__).parent / "assets" / "emoji"
REFERENCE = _ASSETS / "reference.safetensors"
"""Mean and covariance of the features of the 1,026 training images, which are not in the package."""
_SHOWN = (
    "grinning dog cat pizza apple car soccer giraffe_face "
    "flamingo heart fish ghost sunflower rocket octopus tophat"
).split()


class PromptError(DmqfxError, ValueError):
    """A prompt with a word that the emoji model never saw, or with too many words."""


class Denoiser(Protocol):
    """A UNet as samplers call it: the float model or a compiled one."""

    @property
    def device(self) -> torch.device:
        """Where its inputs must be."""

    def __call__(
        self, sample: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor, ...]:
        """The prediction for `sample`, as the first of a tuple if `return_dict` is false."""


def load_unet() -> UNet2DConditionModel:
    """The trained UNet, float32, in eval mode."""
    unet = UNet2DConditionModel.from_pretrained(_ASSETS / "unet", local_files_only=True)
    return unet.float().eval()


def load_scheduler() -> DDIMScheduler:
    """The schedule that the UNet was trained with (it predicts v)."""
    return DDIMScheduler.from_pretrained(_ASSETS / "scheduler", local_files_only=True)


def prompts() -> tuple[str, ...]:
    """Every caption of the training images, once each.

    Example:
        >>> prompts()[0]
        'cat:smileys-emotion sub:face-smiling grinning face'
    """
    return tuple(_captions())


def demo_prompts(count: int = 16) -> tuple[str, ...]:
    """Prompts to judge by: first the ones that are nice to look at, then every second other caption."""
    return _split()[0][:count]


def calibration_prompts(count: int = 16) -> tuple[str, ...]:
    """Prompts to calibrate with: spread over all categories, and never one of the demo prompts."""
    rest = _split()[1]
    count = min(count, len(rest))
    return tuple(rest[i * len(rest) // count] for i in range(count))


def embed(prompts: Sequence[str]) -> Tensor:
    """The context of the UNet's cross-attention; an empty prompt is the unconditional one.

    Shapes: float32 [len(prompts), 8, 128].
    Raises: PromptError if a word is not in the vocabulary or a prompt has more than 8.
    """
    table = load_file(_ASSETS / "words" / "embedding.safetensors")["embedding"]
    words = json.loads((_ASSETS / "words" / "vocab.json").read_text())
    rows = [_tokens(prompt, words["vocab"], words["max_words"]) for prompt in prompts]
    return embedding(torch.tensor(rows).reshape(-1, words["max_words"]), table.float())


def decode(latents: Tensor) -> Tensor:
    """Pictures of latents (the inverse Haar transform, clamped to the range of pictures).

    Shapes: latents [N, 12, 16, 16] -> [N, 3, 32, 32] in [-1, 1].
    """
    haar = load_file(_ASSETS / "decoder.safetensors")["haar"].to(latents)
    return conv_transpose2d(latents, haar, stride=2).clamp(-1, 1)


@torch.no_grad()
def sample(
    unet: Denoiser,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    cfg: float = 3.0,
    seed: int = 0,
    scheduler: SchedulerMixin | None = None,
    progress: bool = False,
) -> Tensor:
    """Latents of the prompts by DDIM with eta 0 and classifier-free guidance, both halves in one batch.

    The noise depends on the seed and on a prompt's place alone, so two UNets can be compared row by row.
    Another scheduler must predict v with the model's betas: `EulerDiscreteScheduler.from_config(ours.config)`.

    Shapes: [N, 12, 16, 16]; the UNet sees batches of 2 N rows, the unconditional half first.
    """
    scheduler = scheduler or load_scheduler()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(prompts), *LATENT), generator=generator)
    latents: Tensor = (noise * scheduler.init_noise_sigma).to(unet.device)
    takes = inspect.signature(scheduler.step).parameters
    random = {"generator": generator} if "generator" in takes else {}
    context = torch.cat([embed([""] * len(prompts)), embed(prompts)]).to(unet.device)
    for t in tqdm(scheduler.timesteps, desc="sample", disable=not progress):
        scaled = scheduler.scale_model_input(latents, t)
        both = unet(torch.cat([scaled, scaled]), t, encoder_hidden_states=context, return_dict=False)[0]
        without, given = both.chunk(2)
        guided = without + cfg * (given - without)
        latents = scheduler.step(guided, t, latents, **random, return_dict=False)[0]
    return latents


def _captions() -> dict[str, str]:
    """Prompt -> name of the first emoji with these words."""
    captions: dict[str, str] = {}
    for entry in json.loads((_ASSETS / "captions.json").read_text()):
        captions.setdefault(" ".join(entry["words"]), entry["name"])
    return captions


def _split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All prompts in two: for the demo, and for calibration."""
    prompt_of = {name: prompt for prompt, name in _captions().items()}
    shown = [prompt_of[name] for name in _SHOWN]
    rest = [prompt for prompt in prompt_of.values() if prompt not in shown]
    return (*shown, *rest[1::2]), tuple(rest[::2])


def _tokens(prompt: str, vocabulary: Sequence[str], length: int) -> list[int]:
    """Vocabulary indices of a prompt, padded with 0."""
    # Some words hold blanks ("sub:sky & weather"), so a split at blanks will not do.
    longest_first = sorted(vocabulary, key=len, reverse=True)
    word = re.compile(rf"\s*({'|'.join(map(re.escape, longest_first))}|\S+)(?!\S)")
    found = word.findall(prompt.lower())
    index = {token: i for i, token in enumerate(vocabulary)}
    for token in found:
        if token not in index:
            near = get_close_matches(token, vocabulary, 3, 0.5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise PromptError(
                f"the emoji model does not know the word {token!r} of the prompt {prompt!r}{hint}"
            )
    if len(found) > length:
        raise PromptError(
            f"the prompt {prompt!r} has {len(found)} words; the emoji model reads at most {length}"
        )
    return [index[token] for token in found] + [0] * (length - len(found))
