"""What MODEL and --calibration mean: folders, hub ids and the word `emoji`, loaded."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dmqfx.cli.terminal import bars
from dmqfx.errors import DmqfxError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dmqfx.calibration.calibration import Calibration
    from dmqfx.frontend.signature import UNet
    from dmqfx.graph.program import Program
    from dmqfx.runtime.targets import Target
    from dmqfx.runtime.unet import CompiledUNet

Found: TypeAlias = tuple[Path | str, str, bool]
"""A folder or a hub id, the folder in it, and whether the cache has it, so that the network is left alone."""

__all__ = [
    "flagged",
    "is_compiled",
    "is_emoji",
    "load_calibration",
    "load_captured",
    "load_compiled",
    "load_outline",
    "load_pipeline",
    "load_program",
    "load_stored",
    "load_unet",
    "lowered",
    "program_of",
    "unlowered",
]


def is_emoji(name: str) -> bool:
    """Whether the bundled model is meant; a folder of that name comes first."""
    return name == "emoji" and not Path(name).exists()


def is_compiled(name: str) -> bool:
    """Whether this is a folder that `dmqfx compile` wrote, whole or damaged."""
    path = Path(name)
    if (path / "dmqfx.json").is_file():
        return True
    try:
        config = json.loads((path / "config.json").read_bytes())
        return bool(config["quantization_config"]["quant_method"] == "dmqfx")
    except (OSError, ValueError, TypeError, KeyError):
        return False


def load_unet(name: str) -> UNet:
    """A float UNet or ControlNet, in float32.

    Raises: DmqfxError that says what was looked for.
    """
    from dmqfx import emoji

    return emoji.load_unet() if is_emoji(name) else _pretrained(*_found(name))


def load_outline(name: str) -> UNet:
    """A float UNet or ControlNet by its configuration alone: every layer is there, and no weight is read.

    The parameters take no memory as long as nobody writes to them; what they hold is undefined.

    Raises: DmqfxError that says what was looked for.
    """
    import torch

    from dmqfx import emoji

    if is_emoji(name):
        return emoji.load_unet()

    source, inside, local = _found(name)
    kind, config = _configured(source, inside, local)
    try:
        with torch.device("meta"):
            made = kind.from_config(config)
    except (TypeError, ValueError) as error:
        raise DmqfxError(f"cannot make the {kind.__name__} of {source}: {error}") from error
    return made.float().eval().to_empty(device="cpu")


def load_compiled(name: str, target: str = "auto") -> CompiledUNet:
    """A saved compiled UNet.

    Raises: StoreError if the folder is not a whole one.
    """
    from dmqfx.storage.store import load

    return load(name, target=target)


def load_stored(name: str) -> CompiledUNet:
    """A saved compiled UNet to look at: lowered for no target.

    Raises: StoreError if the folder is not a whole one.
    """
    from dmqfx.storage.store import load

    return load(name, target=unlowered())


def unlowered() -> Target:
    """The target of a model that is looked at or saved and never run: the portable program as it is."""
    from dmqfx.runtime.targets import Target

    return Target("stored", (), "the portable program as it is saved")


def load_captured(name: str) -> Program:
    """The program of a compiled folder, or that of a float UNet as captured."""
    from dmqfx.frontend.capture import capture

    return load_stored(name).program if is_compiled(name) else capture(load_unet(name))


def load_program(name: str, target: str | None = None) -> Program:
    """The program of a compiled folder, or the canonical program of a float UNet with its skips flagged.

    Raises: DmqfxError if a float UNet is to be lowered for a target.
    """
    if is_compiled(name):
        return lowered(load_stored(name).program, target)
    if target is not None:
        load_outline(name)  # it may not be there at all
        raise DmqfxError(
            f"--target {target}: {name} is not compiled, so its layers run as torch's\n  mend: dmqfx compile"
        )
    return program_of(load_unet(name))


def lowered(program: Program, target: str | None, *, apart: bool = False) -> Program:
    """The program as a target runs it on this machine; as it is saved, if there is none.

    With `apart` every layer still has its own address: what operators are fused with, and what is kept between calls, is
    left out.
    """
    from dmqfx.runtime.targets import lower, resolve

    if target is None:
        return program
    whole = resolve(target)
    passes = tuple(name for name in whole.passes if not (apart and name in ("fuse", "hoist-invariants")))
    return lower(program, replace(whole, passes=passes))


def program_of(unet: UNet) -> Program:
    """The canonical program of a float UNet with its skips flagged."""
    from dmqfx.frontend.capture import capture
    from dmqfx.graph.pipeline import PassContext
    from dmqfx.graph.registry import pipeline

    return flagged(pipeline([("canonicalize", {})]).run(capture(unet), PassContext()))


def flagged(program: Program) -> Program:
    """The program with its long skips in the table: not every policy runs flag-skips."""
    from dmqfx.graph.facts import FLAGGED
    from dmqfx.graph.pipeline import PassContext
    from dmqfx.graph.registry import pipeline

    if FLAGGED in program.facts:
        return program
    return pipeline([("flag-skips", {})]).run(program, PassContext())


def load_calibration(name: str | None) -> Calibration | None:
    """A saved calibration, or None.

    Raises: StoreError if the folder is not a whole one.
    """
    from dmqfx.calibration.calibration import Calibration

    return Calibration.load(name) if name else None


def load_pipeline(name: str) -> DiffusionPipeline:
    """A pipeline from its folder.

    Raises: DmqfxError if the folder is not one or lacks a part.
    """
    from diffusers import DiffusionPipeline

    if not (Path(name) / "model_index.json").is_file():
        raise DmqfxError(f"{name} is not a pipeline folder (no model_index.json), and --prompts needs one")
    _hush()
    try:
        return DiffusionPipeline.from_pretrained(name, local_files_only=True, **_variant(Path(name) / "unet"))
    except (ImportError, OSError, ValueError) as error:
        raise DmqfxError(f"cannot load the pipeline {name}: {error}") from error


def _hush() -> None:
    """Loading is announced by diffusers and transformers in bars and warnings; only who watches gets the bars."""
    from diffusers.utils import is_transformers_available
    from diffusers.utils import logging as of_diffusers

    if not bars():
        of_diffusers.disable_progress_bar()
    if is_transformers_available():
        of_transformers = import_module("transformers.utils.logging")
        of_transformers.set_verbosity_error()
        if not bars():
            of_transformers.disable_progress_bar()


def _found(name: str) -> Found:
    """Where a float model is.

    Raises: DmqfxError that says what was looked for.
    """
    path = Path(name)
    if is_compiled(name):
        raise DmqfxError(f"{name} is a compiled model; this command needs the float UNet that it came from")
    if path.is_file():
        raise DmqfxError(
            f"{name} is a file; MODEL is a diffusers folder (for one file: `from_single_file` first)"
        )
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "model_index.json")):
            raise DmqfxError(f"{name} has neither config.json (a UNet) nor model_index.json (a pipeline)")
        return path, "unet" if (path / "model_index.json").is_file() else "", False
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise DmqfxError(f"there is no folder {name}, and it is neither a hub id (owner/name) nor `emoji`")
    return _on_hub(name)


def _on_hub(name: str) -> Found:
    """The unet/ of a pipeline on the hub, or a UNet on its own; from the cache where that has it."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    for inside in ("unet", ""):
        if isinstance(try_to_load_from_cache(name, f"{inside}/config.json".lstrip("/")), str):
            return name, inside, True
    try:  # asked first and once: a download of what is not there is tried for a minute
        siblings = HfApi().model_info(name, timeout=10).siblings or []
    except Exception as error:  # requests or httpx, as the hub's version has it
        reason = str(error).partition("\n")[0]
        raise DmqfxError(f"there is no folder {name}, and as a hub id it cannot be read: {reason}") from error
    pipeline = any(each.rfilename == "unet/config.json" for each in siblings)
    return name, "unet" if pipeline else "", False


def _variant(folder: Path) -> dict[str, str]:
    """`variant=` of the weights in a folder, such as fp16, where there are no plain ones.

    Raises: DmqfxError if there are no weights at all.
    """
    name = r"diffusion_pytorch_model(?:\.(\w+?))?(?:-\d+-of-\d+)?(?:\.(\w+?))?\.(?:safetensors|bin)"
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [match for file in there if (match := re.fullmatch(name, file.name))]
    if not found:
        raise DmqfxError(f"{folder} has no weights (diffusion_pytorch_model.safetensors)")
    variants = {match[1] or match[2] or "" for match in found}
    return {} if "" in variants else {"variant": min(variants)}


def _configured(source: Path | str, inside: str, local: bool) -> tuple[type[UNet], dict[str, object]]:
    """The class of a model and its configuration."""
    from diffusers import UNet2DModel

    from dmqfx.frontend.signature import SUPPORTED

    kinds = {kind.__name__: kind for kind in SUPPORTED}
    try:
        config = UNet2DModel.load_config(source, **_where(inside, local))
    except (OSError, ValueError, RuntimeError) as error:
        raise DmqfxError(f"cannot load {source}: {error}") from error
    named = config.get("_class_name") if isinstance(config, dict) else None
    kind = kinds.get(str(named))
    if kind is None:
        found = named or "a folder whose config.json names no class"
        raise DmqfxError(f"{source} is {found}; dmqfx takes {', '.join(kinds)}")
    return kind, config


def _pretrained(source: Path | str, inside: str, local: bool) -> UNet:
    kind, _ = _configured(source, inside, local)
    weights = _variant(source / inside) if isinstance(source, Path) else {}
    try:
        return kind.from_pretrained(source, **_where(inside, local), **weights).float().eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise DmqfxError(f"cannot load {source}: {error}") from error


def _where(inside: str, local: bool) -> dict[str, object]:
    """What diffusers is told: the folder in the folder, and whether the network is left alone."""
    return {**({"subfolder": inside} if inside else {}), **({"local_files_only": True} if local else {})}
