"""Outputs along recorded trajectories: gain, guided pairs, and what guidance makes of an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from diffusers import DDIMScheduler
from models import one_level, randomize
from torch import Tensor, nn

from dmqfx.calibration.calibration import Calibration
from dmqfx.calibration.rows import Column, Rows
from dmqfx.frontend.capture import capture
from dmqfx.frontend.signature import UNet
from dmqfx.judging.outputs import compare_outputs, guided_pairs
from dmqfx.runtime.targets import Target
from dmqfx.runtime.unet import CompiledUNet

STEPS, PROMPTS, SCALE = 3, 2, 5.0
FLOAT = Target("float", (), "the captured program itself")


@pytest.fixture(scope="module")
def unet() -> UNet:
    small = one_level()
    randomize(small)
    return small.eval()


@pytest.fixture(scope="module")
def rows(unet: UNet) -> Calibration:
    return Calibration.record(
        unet,
        scheduler=DDIMScheduler(clip_sample=False),
        conditioning={"encoder_hidden_states": torch.randn(PROMPTS, 7, unet.config.cross_attention_dim)},
        unconditional={"encoder_hidden_states": torch.zeros(1, 7, unet.config.cross_attention_dim)},
        steps=STEPS,
        guidance_scale=SCALE,
        progress=False,
    )


@pytest.fixture(scope="module")
def exact(unet: UNet) -> CompiledUNet:
    """Nothing is quantized: it computes what diffusers computes."""
    return CompiledUNet(capture(unet), config=unet.config, target=FLOAT)


class Spoiled(nn.Module):
    """A compiled program whose output is changed on purpose."""

    def __init__(self, runner: nn.Module, spoil: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.runner, self.spoil = runner, spoil

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.spoil(self.runner(**inputs), inputs["encoder_hidden_states"])


def spoiled(q: CompiledUNet, spoil: Callable[[Tensor, Tensor], Tensor]) -> CompiledUNet:
    twin = q.retarget(FLOAT)
    twin.runner = Spoiled(twin.runner, spoil)
    return twin


def is_conditional(context: Tensor) -> Tensor:
    """1 for rows with a prompt, 0 for those without. Shapes: [B, 1, 1, 1]."""
    return (context.flatten(1).abs().sum(1) > 0).float().reshape(-1, 1, 1, 1)


# --- the numbers


def test_a_model_that_halves_the_output_has_a_gain_of_one_half(
    unet: UNet, exact: CompiledUNet, rows: Calibration
) -> None:
    found = compare_outputs(unet, spoiled(exact, lambda y, _: 0.5 * y), rows)
    assert list(found) == sorted(set(rows.timesteps().tolist()), reverse=True)
    for output in found.values():
        assert output.gain == pytest.approx(0.5, abs=1e-5)
        assert output.sqnr_db == pytest.approx(20 * math.log10(2), abs=1e-3)


def test_an_error_that_both_halves_share_leaves_the_difference_alone(
    unet: UNet, exact: CompiledUNet, rows: Calibration
) -> None:
    for output in compare_outputs(unet, spoiled(exact, lambda y, _: y + 0.1), rows).values():
        assert output.sqnr_db < 30
        assert output.difference_db is not None
        assert output.difference_db > 60


def test_guidance_multiplies_an_error_that_only_the_prompt_makes(
    unet: UNet, exact: CompiledUNet, rows: Calibration
) -> None:
    """q = f + e with a prompt: the guided output is wrong by s e, against u + s (c - u)."""
    twin = spoiled(exact, lambda y, context: y + 0.1 * is_conditional(context))
    found = compare_outputs(unet, twin, rows, guidance_scale=SCALE)
    for time, output in found.items():
        batch = rows.groups[0].tensors((rows.timesteps() == time).nonzero().flatten())
        with torch.no_grad():
            y = unet(batch["sample"], time, batch["encoder_hidden_states"]).sample.double()
        given = is_conditional(batch["encoder_hidden_states"]).flatten().bool()
        u, c = y[~given], y[given]
        noise = y[given].numel() * 0.1**2
        assert output.difference_db == pytest.approx(db((c - u).square().sum(), noise), abs=1e-2)
        guided = (u + SCALE * (c - u)).square().sum()
        assert output.guided_db == pytest.approx(db(guided, SCALE**2 * noise), abs=1e-2)


def db(signal: Tensor, noise: float) -> float:
    return 10 * math.log10(float(signal) / noise)


def test_without_a_scale_there_is_no_guided_output_and_without_pairs_no_difference(
    unet: UNet, exact: CompiledUNet, rows: Calibration
) -> None:
    assert {o.guided_db for o in compare_outputs(unet, exact, rows).values()} == {None}
    conditional = Calibration((rows.groups[0].take((rows.trajectories() % 4 > 1).nonzero().flatten()),))
    found = compare_outputs(unet, exact, conditional, guidance_scale=SCALE).values()
    assert {(o.difference_db, o.guided_db) for o in found} == {(None, None)}


@pytest.mark.parametrize("wanted", [1, 7, 11])
def test_a_choice_of_rows_keeps_every_timestep_and_no_half_pair(
    unet: UNet, exact: CompiledUNet, rows: Calibration, wanted: int
) -> None:
    """Each chosen pair counts in the difference, so the whole has one wherever it has an output."""
    seen: list[int] = []

    def watched(y: Tensor, context: Tensor) -> Tensor:
        seen.append(len(context))
        return y

    found = compare_outputs(unet, spoiled(exact, watched), rows, rows=wanted)
    assert len(found) == STEPS
    assert all(output.difference_db is not None for output in found.values())
    assert sum(seen) == max(wanted // 2, STEPS) * 2


# --- which rows are pairs


def recorded(samples: Sequence[Sequence[int]], contexts: Sequence[int]) -> Rows:
    """Trajectory i sees samples[i][step] under context contexts[i], step by step as a sampler calls."""
    steps = len(samples[0])
    order = [(i, k) for k in range(steps) for i in range(len(samples))]

    def column(numbers: list[int]) -> Column:
        return Column(torch.arange(100.0).reshape(100, 1, 1, 1), torch.tensor(numbers))

    return Rows(
        {
            "sample": column([samples[i][k] for i, k in order]),
            "timestep": Column(torch.arange(100.0), torch.tensor([90 - k for _, k in order])),
            "encoder_hidden_states": column([contexts[i] for i, _ in order]),
        },
        torch.tensor([i for i, _ in order]),
        torch.tensor([k for _, k in order]),
    )


def paired(rows: Rows) -> set[tuple[int, int]]:
    """Which trajectories are paired, after a check that a pair is of one step."""
    pairs = guided_pairs(rows)
    assert torch.equal(rows.step[pairs[:, 0]], rows.step[pairs[:, 1]])
    return {(int(rows.trajectory[a]), int(rows.trajectory[b])) for a, b in pairs.tolist()}


def test_the_halves_of_a_guided_batch_are_pairs_the_unconditional_first() -> None:
    rows = recorded([[1, 2], [3, 4], [1, 2], [3, 4]], contexts=[0, 0, 7, 8])
    assert paired(rows) == {(0, 2), (1, 3)}
    assert len(guided_pairs(rows)) == 4


def test_prompts_that_start_from_one_noise_are_not_taken_for_pairs() -> None:
    rows = recorded([[1, 2], [1, 4], [1, 2], [1, 4]], contexts=[0, 0, 7, 8])
    assert paired(rows) == {(0, 2), (1, 3)}


def test_three_halves_are_no_pair() -> None:
    assert paired(recorded([[1, 2], [1, 2], [1, 2]], contexts=[0, 7, 8])) == set()


def test_one_condition_twice_is_no_pair() -> None:
    assert paired(recorded([[1, 2], [1, 2]], contexts=[7, 7])) == set()


def test_trajectories_of_their_own_noise_are_no_pairs() -> None:
    assert paired(recorded([[1, 2], [3, 4]], contexts=[0, 7])) == set()


def test_pairs_survive_merging_and_saving(rows: Calibration, tmp_path: object) -> None:
    merged = rows.merge(rows)
    merged.save(f"{tmp_path}/cal")
    loaded = Calibration.load(f"{tmp_path}/cal")
    assert [len(guided_pairs(each.groups[0])) for each in (rows, merged, loaded)] == [6, 12, 12]
