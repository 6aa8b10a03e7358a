"""Under what protocol numbers were found: what somebody needs to find them again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict

import torch

from dmqfx.calibration.calibration import Calibration, Json
from dmqfx.calibration.recording import origin, plain
from dmqfx.frontend.signature import UNet
from dmqfx.judging.outputs import guided_pairs
from dmqfx.judging.samplers import Drawn, Sampler
from dmqfx.machine import processor
from dmqfx.runtime.unet import CompiledUNet

__all__ = ["of_models", "of_pictures", "of_rows", "prompts_hash"]


def of_models(unet: UNet, compiled: CompiledUNet) -> dict[str, Json]:
    """What is compared, and on what. The compiled model's provenance says what it was calibrated on."""
    exact, policy = origin(unet, "tape", None, {}, ()), compiled.policy
    return {
        "float_model": {"class": exact.model, "config_sha256": exact.config, "weights_sha256": exact.weights},
        "compiled": {
            "policy": None if policy is None else policy.name,
            "policy_sha256": None if policy is None else _sha256(str(policy)),
            "target": compiled.target.name,
            "provenance": plain(compiled.provenance),
        },
        "versions": dict(exact.versions),
        "machine": {
            "processor": processor(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
            "device": str(compiled.device),
        },
    }


def of_rows(recorded: Sequence[Calibration], rows: int | None) -> dict[str, Json]:
    """Which recorded calls the outputs were compared on, and where they came from."""
    return {
        "rows": rows,
        "rows_recorded": [len(each) for each in recorded],
        "guided_pairs_recorded": [
            sum(len(guided_pairs(group)) for group in each.groups) for each in recorded
        ],
        "recorded": [plain([asdict(o) for o in each.origins]) for each in recorded],
    }


def of_pictures(sampler: Sampler, seeds: Sequence[int], drawn: Drawn) -> dict[str, Json]:
    """How pictures were drawn: `drawn` are those of one seed."""
    scheduler = sampler.scheduler
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {
        "seeds": list(seeds),
        "pictures_per_run": len(drawn.pictures),
        "prompts": len(sampler.prompts),
        "prompts_sha256": prompts_hash(sampler.prompts),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": plain(config),
        "timesteps": [time for time, _ in drawn.latents],
        "settings": plain(sampler.settings()),
    }


def prompts_hash(prompts: Sequence[str]) -> str:
    """The SHA-256 of prompts in their order.

    Example:
        >>> prompts_hash(["a", "b"]) == prompts_hash(["b", "a"])
        False
    """
    return _sha256(json.dumps(list(prompts), ensure_ascii=False))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
