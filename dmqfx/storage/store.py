"""Saving and loading a compiled UNet: a directory of JSON, YAML and safetensors (docs/file-format.md)."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Final

import diffusers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dmqfx.errors import DmqfxError, StoreError
from dmqfx.graph.invariants import check_facts, check_structure
from dmqfx.graph.program import Program
from dmqfx.policy.file import parse_policy, print_policy
from dmqfx.runtime import targets
from dmqfx.seeing.report import Report
from dmqfx.storage.atomic import replacing, survivor
from dmqfx.storage.codec import dump, parse
from dmqfx.storage.graphfile import read_program, strides, write_graph
from dmqfx.storage.manifest import FORMAT_VERSION, MANIFEST, read_manifest, write_manifest
from dmqfx.storage.mapped import TensorFile
from dmqfx.storage.tablefile import read_table, write_table

if TYPE_CHECKING:
    from dmqfx.runtime.unet import CompiledUNet

__all__ = ["load", "refuse_foreign", "save"]

CONFIG: Final = "config.json"
GRAPH: Final = "graph.json"
TABLE: Final = "table.json"
TENSORS: Final = "diffusion_pytorch_model.safetensors"
POLICY: Final = "policy.yaml"
REPORT: Final = "report.json"
REQUIRED: Final = frozenset({CONFIG, GRAPH, TABLE, TENSORS})
FILES: Final = REQUIRED | {POLICY, REPORT, MANIFEST}
_OF_THIS_MACHINE: Final = ("_use_default_values", "_ignore_files", "_name_or_path", "_pre_quantization_dtype")


def save(unet: CompiledUNet, directory: str | PathLike[str]) -> None:
    """Write a compiled UNet into a directory, which may hold an older one; that one survives an error.

    Raises: StoreError for a directory that holds anything else, a program that cannot be stored, or weights that
        find no room; OSError for any other file that cannot be written.
    """
    path = Path(directory).expanduser().resolve()
    refuse_foreign(path)
    with replacing(path) as new:
        tensors = {name: tensor.detach().cpu() for name, tensor in unet.program.weights().items()}
        table = write_table(unet.program, tensors)
        _write(new / CONFIG, json.dumps(_write_config(unet), indent=2, sort_keys=True) + "\n")
        _write(new / GRAPH, dump(write_graph(unet.program)))
        _write(new / TABLE, dump(table))
        try:
            save_file(_apart(tensors), new / TENSORS, metadata={"format": "pt"})
        except SafetensorError as error:  # which is what it makes of a full disk
            raise StoreError(f"cannot save the weights to {path}: {error}") from error
        (new / TENSORS).chmod((new / CONFIG).stat().st_mode)  # safetensors makes a private file
        if unet.policy is not None:
            _write(new / POLICY, print_policy(unet.policy))
        if unet.report is not None:
            passes = tuple(replace(each, seconds=0.0) for each in unet.report.passes)
            _write(new / REPORT, replace(unet.report, passes=passes).to_json())
        write_manifest(new, unet.provenance)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's search for cycles, which goes through all that graphs are made of again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_no_collection()
def load(directory: str | PathLike[str], target: str | targets.Target = "auto") -> CompiledUNet:
    """A saved UNet, verified file by file and lowered for a target; bit for bit what the saved one computes.

    Python collects no cycles while it loads, in no thread of the process.

    Raises: StoreError naming the file that is missing, truncated, altered or newer than this version;
        PassNotFoundError for an unknown target.
    Example:
        >>> import dmqfx, diffusers, tempfile
        >>> levels = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> unet = diffusers.UNet2DModel(block_out_channels=(8,), norm_num_groups=2, sample_size=8, **levels)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dmqfx.compile(unet, "w4a16", report_rows=0, progress=False).save_pretrained(folder)
        ...     load(folder, "reference")
        CompiledUNet(UNet2DModel, policy w4a16, target reference)
    """
    from dmqfx.runtime.unet import CompiledUNet

    chosen, path = targets.resolve(target), Path(directory).expanduser().resolve()
    if not path.is_dir():
        raise StoreError(_gone(path))
    files, provenance = read_manifest(path, REQUIRED)
    config = parse(_text(path / CONFIG), str(path / CONFIG))
    config.pop("quantization_config", None)
    with _About(path / POLICY):
        policy = parse_policy(_text(path / POLICY), str(path / POLICY)) if POLICY in files else None
    with _About(path / REPORT):
        report = Report.from_json(_text(path / REPORT)) if REPORT in files else None
    program, file = _read_program(path)
    if config.get("_class_name") != program.inputs.root or "in_channels" not in config:
        raise StoreError(f"{path / CONFIG} is not the configuration of the {program.inputs.root} beside it")
    try:
        loaded = CompiledUNet(
            program, config=config, target=chosen, policy=policy, report=report, provenance=provenance
        )
    except (ValueError, TypeError, RuntimeError) as error:  # operators refuse what cannot have been saved
        raise StoreError(f"{path / GRAPH} cannot be lowered for {chosen.name}: {error}") from error
    file.give_back()
    return loaded


def _read_program(path: Path) -> tuple[Program, TensorFile]:
    graph = parse(_text(path / GRAPH), str(path / GRAPH))
    knowledge = parse(_text(path / TABLE), str(path / TABLE))
    with _About(path / TENSORS):
        file = TensorFile.read(path / TENSORS, dict(strides(graph)))
    with _About(path / GRAPH):
        program = read_program(graph, file.tensors)
    with _About(path / TABLE):
        program = read_table(program, knowledge, file.tensors)
        check_structure(program, "load")
        check_facts(program, "load")
    return program, file


@dataclass(frozen=True)
class _About:
    """A block about one file: whatever goes wrong in it becomes a StoreError that names the file."""

    path: Path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        wrong = (
            DmqfxError,
            SafetensorError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RuntimeError,
            OSError,
        )
        if isinstance(error, wrong):
            raise StoreError(f"{self.path}: {error}") from error


def _write_config(unet: CompiledUNet) -> dict[str, object]:
    config = {key: value for key, value in unet.config.items() if key not in _OF_THIS_MACHINE}
    return {
        "_diffusers_version": diffusers.__version__,
        **config,
        "_class_name": unet.program.inputs.root,
        "quantization_config": {
            "quant_method": "dmqfx",
            "format_version": FORMAT_VERSION,
            "policy": None if unet.policy is None else unet.policy.name,
        },
    }


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors row by row, each in memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        rows = tensor.contiguous()
        storage = rows.untyped_storage()
        alone = storage.data_ptr() not in seen and storage.nbytes() == rows.nbytes
        apart[name] = rows if alone else rows.clone()
        seen.add(storage.data_ptr())
    return apart


def refuse_foreign(path: Path) -> None:
    """Raise if saving would delete what is not a saved model."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file; save into a directory")
    if os.path.ismount(path):
        raise StoreError(
            f"{path} is where a file system begins, which no other folder can replace; say one inside it"
        )
    there = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if there and MANIFEST not in there:
        raise StoreError(
            f"{path} holds files that dmqfx did not write ({', '.join(there[:3])}); save into a new directory"
        )
    if foreign := [name for name in there if name not in FILES]:
        raise StoreError(
            f"saving into {path} would delete {', '.join(foreign[:3])}; move that away, or save elsewhere"
        )


def _gone(path: Path) -> str:
    if (left := survivor(path)) is not None:
        return (
            f"there is no {path}: saving was interrupted; the older model is whole in {left}, rename it back"
        )
    return (
        f"{path} is a file; load the directory that it is in"
        if path.exists()
        else f"there is no directory {path}"
    )


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())


def _text(path: Path) -> str:
    return path.read_bytes().decode()
