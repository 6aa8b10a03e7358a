"""Saving and loading: the same bits back, the same bytes again, and no file that lies goes unnoticed."""

from __future__ import annotations

import copy
import errno
import gc
import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import FrozenDict
from handmade import CONFIG, compiled, listing, outputs, program_of, quantized_program, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, fx

from dmqfx.errors import StoreError
from dmqfx.graph.address import Site
from dmqfx.graph.program import Program
from dmqfx.graph.table import ChannelScale, Codes, LayerPair, Planned, Range, SkipConcat
from dmqfx.numbers.quant import QParams
from dmqfx.runtime.targets import TARGETS, Target
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.storage import store
from dmqfx.storage.manifest import FORMAT_VERSION, MANIFEST, write_manifest

aten = torch.ops.aten


# --- directories


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "unet"
    compiled().save_pretrained(directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("target", [target.name for target in TARGETS])
def test_a_loaded_unet_computes_the_same_bits(saved: Path, target: str) -> None:
    assert torch.equal(outputs(store.load(saved, target)), outputs(compiled(target)))


def test_saving_what_was_loaded_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    store.load(saved, "reference").save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_the_same_program_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    copy.deepcopy(compiled()).to(torch.float16).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_what_is_known_comes_back(saved: Path) -> None:
    q, r = compiled(), store.load(saved)
    assert r.policy == q.policy
    assert r.report == q.report
    assert r.provenance == q.provenance
    diffusers_own = {key: r.config[key] for key in ("_class_name", "_diffusers_version")}
    assert r.config == {**q.config, "block_out_channels": [8, 8], **diffusers_own}
    assert r.program.facts == q.program.facts
    assert [replace(record, seconds=0.0) for record in q.program.log] == list(r.program.log)
    assert same(listing(r.program), listing(q.program))
    assert same(rows(r.program), rows(q.program))
    assert Range not in {type(entry) for _, entry in r.program.table}
    assert {type(entry) for _, entry in r.program.table} >= {
        Planned,
        Codes,
        QParams,
        SkipConcat,
        LayerPair,
        ChannelScale,
    }


def rows(program: Program) -> list[object]:
    """The table without ranges, as plain values."""
    return [[str(site), plain(entry)] for site, entry in program.table if not isinstance(entry, Range)]


def plain(entry: object) -> object:
    if isinstance(entry, Tensor):
        return [str(entry.dtype), entry.tolist()]
    if is_dataclass(entry):
        return [type(entry).__name__, *(plain(getattr(entry, f.name)) for f in fields(entry))]
    return entry


def test_the_table_shares_the_tensors_of_the_graph(saved: Path) -> None:
    program = store.load(saved).program
    codes = program.table.get(Site.parse("conv_in/conv2d:weight"), Codes)
    assert codes.packed is program.weights()["conv_in.weight_packed"]


def test_four_bits_take_half_a_byte(saved: Path) -> None:
    with safe_open(saved / store.TENSORS, framework="pt") as file:
        packed = file.get_tensor("conv_in.weight_packed")
        assert file.metadata() == {"format": "pt"}
    assert (packed.dtype, packed.numel()) == (torch.uint8, 8 * 4 * 3 * 3 // 2)


def test_nothing_is_pickled_or_dated(saved: Path) -> None:
    assert {path.suffix for path in saved.iterdir()} == {".json", ".yaml", ".safetensors"}
    text = b"".join(
        data for name, data in contents(saved).items() if not name.endswith("safetensors")
    ).decode()
    assert not re.search(r"20\d\d-|/tmp|/home", text)


def test_config_json_is_diffusers_own_with_a_compact_addition(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "dmqfx",
        "format_version": 1,
        "policy": "w4a8-quick",
    }
    assert UNet2DModel.load_config(saved)["in_channels"] == 4


def test_memory_layouts_come_back(tmp_path: Path) -> None:
    graph = fx.Graph()
    x, _, w = graph.placeholder("sample"), graph.placeholder("timestep"), graph.get_attr("w")
    graph.output(graph.call_function(aten.conv2d.default, (x, w)))
    weight = torch.randn(4, 4, 3, 3).to(memory_format=torch.channels_last)
    base = torch.randn(4, 8, 3, 3)
    for made, stride in (
        (weight, weight.stride()),
        (base[:, ::2], (36, 9, 3, 1)),
        (base[:1, :1].expand(4, 4, 3, 3), (36, 9, 3, 1)),
    ):
        q = CompiledUNet(program_of(graph, {"w": made}), config=CONFIG, target=Target("float", (), ""))
        q.save_pretrained(tmp_path / "unet")
        r = store.load(tmp_path / "unet", q.target)
        assert r.program.weights()["w"].stride() == stride
        assert torch.equal(outputs(r), outputs(q))


# --- damage


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def names() -> list[str]:
    return sorted(store.FILES)


@pytest.mark.parametrize("name", names())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_found(damaged: Path, name: str, where: float, bit: int) -> None:
    whole = (damaged / name).read_bytes()
    position = int(where * len(whole))
    broken = bytearray(whole)
    broken[position] ^= 1 << bit
    (damaged / name).write_bytes(broken)
    with pytest.raises(StoreError, match=re.escape(name)):
        store.load(damaged)
    (damaged / name).write_bytes(whole)


@pytest.mark.parametrize("name", names())
def test_a_truncated_file_is_named(damaged: Path, name: str) -> None:
    whole = (damaged / name).read_bytes()
    for length in (0, len(whole) // 2, len(whole) - 1):
        (damaged / name).write_bytes(whole[:length])
        with pytest.raises(StoreError, match=re.escape(name)):
            store.load(damaged)


@pytest.mark.parametrize("name", names())
def test_a_missing_file_is_named(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    with pytest.raises(StoreError, match=re.escape(name)):
        store.load(damaged)


def reseal(directory: Path) -> None:
    """A manifest that vouches for the files as they are."""
    (directory / MANIFEST).unlink()
    write_manifest(directory, {})


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("graph.json", "aten.conv2d.default", "aten.from_file.default"),
        ("graph.json", "[8, 4, 3, 3]", "[8, 4, 3, 4]"),
        ("graph.json", '"norm.weight"', '"norm.gain"'),
        ("graph.json", '"nodes"', '"edges"'),
        ("graph.json", "conv_in/conv2d", "elsewhere/conv2d"),
        ("table.json", '"conv_in.weight_packed"', '"conv_in.weight_lost"'),
        ("table.json", '"Planned"', '"Schemed"'),
        ("table.json", '"bits": 4', '"width": 4'),
        ("table.json", '"facts"', '"fictions"'),
        ("table.json", "conv_in/conv2d:weight", "conv_in"),
        ("config.json", "{", "["),
        ("config.json", '"_class_name": "', '"_class_name": "No'),
        ("config.json", '"in_channels"', '"im_channels"'),
        ("policy.yaml", "default:", "defect:"),
        ("report.json", "{", "["),
        ("diffusion_pytorch_model.safetensors", "conv_in.weight_scale", "conv_in.weight_skale"),
    ],
)
def test_a_file_that_was_changed_with_its_checksum_is_still_judged(
    damaged: Path, name: str, old: str, new: str
) -> None:
    data = (damaged / name).read_bytes()
    assert old.encode() in data
    (damaged / name).write_bytes(data.replace(old.encode(), new.encode()))
    reseal(damaged)
    with pytest.raises(StoreError):
        store.load(damaged)


@pytest.mark.parametrize(("bits", "said", "told"), [(4, 3, r"-4 to 3"), (8, 6, r"-32 to 31")])
def test_codes_of_more_bits_than_the_graph_says_are_refused(
    tmp_path: Path, bits: int, said: int, told: str
) -> None:
    """In nibbles and in bytes; what 4 and 8 bits are packed in holds nothing else."""
    compiled("simulate").save_pretrained(tmp_path)
    graph = (tmp_path / "graph.json").read_text()
    assert graph.count(f", {bits}, true, [") == 1
    (tmp_path / "graph.json").write_text(graph.replace(f", {bits}, true, [", f", {said}, true, ["))
    reseal(tmp_path)
    why = rf"graph.json: \S+/unpack\S+, \S+weight_packed: codes from -?\d+ to \d+ do not fit {said} bits \({told}\)"
    with pytest.raises(StoreError, match=why):
        store.load(tmp_path)


def test_a_newer_format_asks_for_an_update(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmqfx.storage.manifest.FORMAT_VERSION", FORMAT_VERSION + 1)
    reseal(damaged)
    monkeypatch.undo()
    with pytest.raises(
        StoreError, match=r"dmqfx\.json has format 2, and this dmqfx reads up to 1: update dmqfx"
    ):
        store.load(damaged)


@pytest.mark.parametrize("on", [True, False])
def test_cycles_are_collected_again_as_before_whether_it_loads_or_not(
    on: bool, saved: Path, tmp_path: Path
) -> None:
    was_on = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        store.load(saved)
        assert gc.isenabled() is on
        with pytest.raises(StoreError):
            store.load(tmp_path)
        assert gc.isenabled() is on
    finally:
        (gc.enable if was_on else gc.disable)()


@pytest.mark.parametrize("target", ["simulate", "reference", "cpu"])
def test_a_hook_on_what_runs_is_called_once_a_call(target: str) -> None:
    unet, calls = compiled(target), list[object]()
    for call in (1, 2, 3):
        if call == 2:
            unet.to("cpu")
        with unet.runner.register_forward_pre_hook(lambda *_: calls.append(1)):
            outputs(unet)
        assert len(calls) == call


def test_what_is_not_ours_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no directory"):
        store.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StoreError, match=r"config\.json is a file; load the directory that it is in"):
        store.load(tmp_path / "config.json")
    with pytest.raises(StoreError, match=r"holds no dmqfx\.json"):
        store.load(tmp_path)


# --- replacing


def test_an_older_model_is_replaced(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "unet"
    older = CompiledUNet(quantized_program(), config={**CONFIG, "sample_size": 12})
    older.save_pretrained(target)
    compiled().save_pretrained(target)
    assert contents(target) == contents(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


def failing(function: Callable[..., object], at: int) -> Callable[..., object]:
    """The function, whose call number `at` (from 0) finds the disk full."""
    calls = iter(range(1000))

    def fails(*args: object, **kwargs: object) -> object:
        if next(calls) == at:
            raise OSError(errno.ENOSPC, "no space left on device")
        return function(*args, **kwargs)

    return fails


STEPS_OF_A_SAVE = [
    *(("os.rename", k) for k in range(2)),
    *(("dmqfx.storage.store._write", k) for k in range(5)),
    *(
        (name, 0)
        for name in ("dmqfx.storage.store.save_file", "dmqfx.storage.store.write_manifest", "os.fsync")
    ),
]


@pytest.mark.parametrize(("function", "at"), STEPS_OF_A_SAVE)
def test_a_failed_save_leaves_the_older_model(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, at: int
) -> None:
    target = Path(shutil.copytree(saved, tmp_path / "unet"))
    newer = copy.deepcopy(compiled())
    newer._internal_dict = FrozenDict({**CONFIG, "sample_size": 12})
    module, _, name = function.rpartition(".")
    owner = importlib.import_module(module)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), at))
        with pytest.raises(OSError, match="no space left"):
            newer.save_pretrained(target)
    assert contents(target) == contents(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]
    newer.save_pretrained(target)
    assert store.load(target).config["sample_size"] == 12


def test_weights_that_find_no_room_are_an_error_that_says_where(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As safetensors says it, which is no OSError."""
    target, write = Path(shutil.copytree(saved, tmp_path / "unet")), store.save_file

    def cramped(*args: object, **kwargs: object) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # no file can be longer
        try:
            write(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(store, "save_file", cramped)
    with pytest.raises(StoreError, match=f"cannot save the weights to {target}: .*too large"):
        copy.deepcopy(compiled()).save_pretrained(target)
    assert contents(target) == contents(saved)


def test_a_process_killed_between_two_renames_leaves_both_whole(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Path(shutil.copytree(saved, tmp_path / "unet"))
    rename = os.rename

    def killed(source: Path, destination: Path) -> None:
        if destination == target:
            raise KeyboardInterrupt
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            compiled().save_pretrained(target)
    with pytest.raises(
        StoreError, match=r"saving was interrupted; the older model is whole in .*old"
    ) as caught:
        store.load(target)
    left = Path(re.search(r"whole in (\S+),", str(caught.value))[1])
    assert torch.equal(outputs(store.load(left)), outputs(compiled()))
    left.rename(target)
    assert contents(target) == contents(saved)


SAVING = """
import sys, time
from dmqfx.storage import store
from handmade import compiled

def forever(*given):
    print("half way", flush=True)
    time.sleep(600)

store.write_manifest = forever
compiled().save_pretrained(sys.argv[1])
"""


def saving(target: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that is half way through a save, and the hidden directory that it writes into."""
    there = set(target.parent.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(target)],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half way\n"
    (made,) = set(target.parent.iterdir()) - there
    return process, made


@pytest.mark.slow
def test_the_next_save_removes_what_a_killed_one_left_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(saved, tmp_path / "unet"))
    (dead, left), (alive, used), (other, others) = map(saving, (target, target, tmp_path / "net"))
    try:
        for process in (dead, other):
            process.kill()
            process.wait()
        mine, near = tmp_path / ".unet.dmqfx-abcdefgh", tmp_path / ".unet.dmqfx-notes"
        for directory in (mine, near):
            directory.mkdir()
        (mine / "lock").touch()
        (mine / "thesis.txt").write_text("not ours")
        assert (left / "new" / "graph.json").exists()
        compiled().save_pretrained(target)
        assert {*tmp_path.iterdir()} == {target, used, others, mine, near}
        assert (used / "new" / "graph.json").exists()
        assert contents(target) == contents(saved)
    finally:
        alive.kill()
        alive.wait()
    compiled().save_pretrained(target)
    assert {*tmp_path.iterdir()} == {target, others, mine, near}


def test_a_directory_with_anything_else_in_it_is_not_replaced(saved: Path, tmp_path: Path) -> None:
    float_model = tmp_path / "float"
    float_model.mkdir()
    (float_model / "config.json").write_text("{}")
    ours = Path(shutil.copytree(saved, tmp_path / "ours"))
    (ours / "README.md").write_text("my notes")
    (tmp_path / "file").write_text("")
    for target, why in (
        (float_model, "did not write"),
        (ours, r"would delete README\.md"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(StoreError, match=why):
            compiled().save_pretrained(target)
    assert (ours / "README.md").read_text() == "my notes"
    assert (float_model / "config.json").read_text() == "{}"


def test_a_link_to_a_directory_stays_a_link(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    compiled().save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == contents(saved)


# --- memory


def test_codes_stay_in_the_file_and_the_process_holds_none_of_it(saved: Path) -> None:
    loaded = store.load(saved, "cpu")
    packed = loaded.program.weights()["conv_in.weight_packed"]
    held = mapped(saved / store.TENSORS)  # by others too, which earlier tests have loaded
    assert [resident for start, end, resident in held if start <= packed.data_ptr() < end] == [0]
    assert torch.equal(
        packed, compiled().program.weights()["conv_in.weight_packed"]
    )  # read from the file again


def test_what_was_loaded_outlives_its_file(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "unet")
    loaded = store.load(tmp_path / "unet", "reference")
    CompiledUNet(quantized_program(), config={**CONFIG, "sample_size": 12}).save_pretrained(tmp_path / "unet")
    loaded.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)
    loaded.save_pretrained(tmp_path / "unet")
    shutil.rmtree(tmp_path / "unet")
    assert torch.equal(outputs(loaded), outputs(compiled("reference")))


def mapped(path: Path) -> list[tuple[int, int, int]]:
    """Where a file is mapped in this process: start, end, and how many kB of it are in memory."""
    found: list[tuple[int, int, int]] = []
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path.resolve())):
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            resident = next(other for other in lines if other.startswith("Rss:"))
            found.append((start, end, int(resident.split()[1])))
    return found
