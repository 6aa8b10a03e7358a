"""Calibration data: batches, subsets, merging, files that are whole or refused, and fitting a model."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from models import captured, eager, model, relative
from torch import Tensor

from dmqfx.calibration import shards
from dmqfx.calibration.calibration import Calibration, Origin
from dmqfx.calibration.rows import RowsWriter
from dmqfx.errors import CalibrationError, StoreError
from dmqfx.frontend.signature import signature

ORIGIN = Origin(
    "tape", "UNet2DConditionModel", "c0ffee", "beef", "DDIMScheduler", {"steps_offset": 1}, {"seed": 3},
    {"torch": "2"}, ("a note",),
)  # fmt: skip


def rows(
    times: list[float], size: int = 8, dtype: torch.dtype = torch.float32, **more: Tensor
) -> Calibration:
    """One row for each time, of trajectories 0, 1, …; the context is the same for all."""
    writer = RowsWriter({})
    generator = torch.Generator().manual_seed(size)
    for step, time in enumerate(times):
        call = {
            "sample": torch.randn(1, 4, size, size, generator=generator).to(dtype),
            "timestep": torch.tensor([time], dtype=torch.float32),
            "encoder_hidden_states": torch.ones(1, 5, 16, dtype=dtype),
            **more,
        }
        writer.add(call, [step % 2], step // 2)
    return Calibration((writer.rows(),), (ORIGIN,))


def same(a: Calibration, b: Calibration) -> bool:
    """Whether two calibrations hold the same bits, and say the same of where they come from."""
    if len(a) != len(b) or a.origins != b.origins or [g.key for g in a.groups] != [g.key for g in b.groups]:
        return False
    return all(
        torch.equal(x.trajectory, y.trajectory)
        and torch.equal(x.step, y.step)
        and all(
            torch.equal(
                x.columns[name].rows(slice(None)).view(torch.uint8),
                y.columns[name].rows(slice(None)).view(torch.uint8),
            )
            for name in ("sample", "encoder_hidden_states")
        )
        for x, y in zip(a.groups, b.groups, strict=True)
    )


def test_the_comparison_of_calibrations_has_teeth() -> None:
    calibration = rows([3, 2, 1])
    changed = calibration.groups[0].columns["sample"].values.clone()
    changed[1, 0, 0, 0] = -changed[1, 0, 0, 0]
    column = replace(calibration.groups[0].columns["sample"], values=changed)
    group = replace(calibration.groups[0], columns={**calibration.groups[0].columns, "sample": column})
    assert same(calibration, rows([3, 2, 1]))
    assert not same(calibration, replace(calibration, groups=(group,)))
    assert not same(calibration, replace(calibration, origins=()))


# --- reading


def test_it_prints_in_one_line() -> None:
    assert repr(rows([9, 8, 7.5])) == "Calibration(3 rows, timesteps 7.5..9, DDIMScheduler)"


def test_batches_keep_the_order_and_never_mix_shapes() -> None:
    calibration = rows([9, 8, 7, 6, 5]).merge(rows([4, 3], size=12))
    batches = list(calibration.batches(2))
    assert [batch["sample"].shape[0] for batch in batches] == [2, 2, 1, 2]
    assert torch.cat([batch["timestep"] for batch in batches]).tolist() == [9, 8, 7, 6, 5, 4, 3]
    assert calibration.timesteps().tolist() == [9, 8, 7, 6, 5, 4, 3]
    with pytest.raises(ValueError, match="at least 1 row"):
        next(calibration.batches(0))


def test_batches_come_in_the_dtype_that_is_asked_for_but_times_and_labels_do_not() -> None:
    half = rows([1], dtype=torch.float16, class_labels=torch.tensor([7]))
    dtypes = {name: tensor.dtype for name, tensor in next(half.batches(1, dtype=torch.bfloat16)).items()}
    assert dtypes == {
        "sample": torch.bfloat16,
        "timestep": torch.float32,
        "encoder_hidden_states": torch.bfloat16,
        "class_labels": torch.int64,
    }
    assert next(half.batches(1))["sample"].dtype == torch.float32


def test_a_program_runs_on_batches_made_for_its_inputs() -> None:
    unet, program = captured("inpainting", residuals=True)
    calibration = rows([900.0, 10.5, 0.0], sample=torch.randn(1, 9, 8, 8))
    calibration.check(program.inputs)
    for batch in calibration.batches(2, program.inputs):
        assert list(batch) == [i.name for i in program.inputs.inputs]
        expected = eager(unet, {name: batch[name] for name in calibration.groups[0].columns})[0]
        assert relative(program(**batch), expected) < 1e-6


# --- choosing


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 9))
def test_a_selection_gives_every_timestep_its_share(times: list[float], wanted: int, seed: int) -> None:
    calibration = rows([float(t) for t in times], size=1)
    chosen = calibration.select(wanted, torch.Generator().manual_seed(seed))
    assert len(chosen) == min(wanted, len(times))
    there, taken = Counter(times), Counter(chosen.timesteps().tolist())
    most = max(taken.values())
    assert all(taken[t] >= min(there[t], most - 1) for t in there)
    kept = {tensor.item() for tensor in chosen.groups[0].columns["timestep"].values}
    assert kept <= set(times)


def test_a_selection_is_a_subset_in_order_and_depends_on_its_generator() -> None:
    calibration = rows([float(t) for t in range(40)]).merge(rows([50.0] * 20, size=12))
    first, again, other = (calibration.select(15, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)
    samples = [sample.flatten().tolist() for batch in calibration.batches(1) for sample in batch["sample"]]
    places = [samples.index(s.flatten().tolist()) for batch in first.batches(1) for s in batch["sample"]]
    assert places == sorted(set(places))
    assert {len(g.columns["encoder_hidden_states"].values) for g in first.groups} == {1}


def test_a_short_selection_is_spread_over_time() -> None:
    calibration = rows([float(t) for t in range(100)])
    chosen = calibration.select(10, torch.Generator().manual_seed(0)).timesteps()
    assert (chosen // 10).tolist() == list(range(10))


def test_merged_rows_keep_apart_whose_trajectory_they_are() -> None:
    a, b = rows([9, 8, 7]), rows([6, 5])
    both = a.merge(b)
    assert (len(both), len(both.groups), both.origins) == (5, 1, (ORIGIN,))
    assert both.timesteps().tolist() == [9, 8, 7, 6, 5]
    assert both.trajectories().tolist() == [0, 1, 0, 2, 3]
    assert both.steps().tolist() == [0, 0, 1, 0, 0]


def test_rows_of_models_with_different_configurations_are_not_merged() -> None:
    other = replace(rows([1]), origins=(replace(ORIGIN, config="decaf"),))
    with pytest.raises(
        CalibrationError, match=r"UNet2DConditionModel \(c0ffee\) and UNet2DConditionModel \(decaf\)"
    ):
        rows([1]).merge(other)


# --- files


@given(
    st.lists(st.floats(0, 999, width=32), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([1, 700, 3000, 2**20]),
)
def test_what_is_loaded_is_what_was_saved(
    tmp_path_factory: pytest.TempPathFactory, times: list[float], dtype: torch.dtype, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    group = replace(rows(times, 12, dtype).groups[0], scalars={"conditioning_scale": 0.1})
    calibration = rows(times, 8, dtype).merge(Calibration((group,)))
    calibration.save(folder, shard_bytes=limit)
    assert same(calibration, Calibration.load(folder))
    assert Calibration.load(folder).groups[1].scalars == {"conditioning_scale": 0.1}
    if limit >= 3000:
        assert all(shard.stat().st_size < limit + 4000 for shard in folder.glob("*.safetensors"))


def test_numbers_that_compare_oddly_survive_a_file(tmp_path: Path) -> None:
    calibration = rows([1], odd=torch.tensor([[float("nan"), -0.0, 0.0, float("inf")]]))
    calibration.save(tmp_path)
    loaded = Calibration.load(tmp_path).groups[0].columns["odd"].values
    assert (
        loaded.view(torch.int32).tolist()
        == calibration.groups[0].columns["odd"].values.view(torch.int32).tolist()
    )


def test_saving_again_leaves_no_old_shard_and_no_one_else_s_file_is_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    rows([3, 2, 1]).save(tmp_path, shard_bytes=100)
    rows([5]).save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert Calibration.load(tmp_path).timesteps().tolist() == [5]


def test_a_save_that_dies_leaves_the_older_calibration_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows([3, 2, 1]).save(tmp_path)
    publish = Path.replace

    def dies(self: Path, target: Path) -> Path:
        if target.name == shards.MANIFEST:
            raise OSError("the disk is full")
        return publish(self, target)

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(StoreError, match="disk is full"):
        rows([5]).save(tmp_path)
    assert same(Calibration.load(tmp_path), rows([3, 2, 1]))
    assert not list(tmp_path.glob(".*"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def truncate(folder: Path) -> None:
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[:-1])


def flip(folder: Path) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[-5] ^= 1
    shard(folder).write_bytes(data)


def edit(change: Callable[[dict[str, object]], object], *, sealed: bool) -> Callable[[Path], None]:
    """A change of the manifest, with the digest put right afterwards or not."""

    def apply(folder: Path) -> None:
        path = folder / shards.MANIFEST
        manifest = json.loads(path.read_text())
        change(manifest)
        if sealed:
            del manifest["sha256"]
            text = json.dumps(manifest, sort_keys=True)
            manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(manifest))

    return apply


def cut_manifest(folder: Path) -> None:
    path = folder / shards.MANIFEST
    path.write_text(path.read_text()[:-20])


DAMAGE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (truncate, r"safetensors is truncated: \d+ bytes instead of \d+"),
    "altered shard": (flip, "safetensors was altered"),
    "missing shard": (lambda f: shard(f).unlink(), "cannot read .*safetensors, which calibration.json names"),
    "missing manifest": (lambda f: (f / shards.MANIFEST).unlink(), "there is no calibration in"),
    "truncated manifest": (cut_manifest, "calibration.json is truncated or is not JSON"),
    "altered manifest": (edit(lambda m: m.update(rows=9), sealed=False), "calibration.json was altered"),
    "newer format": (edit(lambda m: m.update(format="dmqfx.calibration/2"), sealed=True), "/2; .*: update"),
    "another file": (
        edit(lambda m: m.update(format="recipes"), sealed=True),
        "is not a calibration of dmqfx",
    ),
    "a list": (lambda f: (f / shards.MANIFEST).write_text("[1]"), "is not a calibration of dmqfx"),
    "a shard elsewhere": (
        edit(lambda m: m["shards"][0].update(file="../rows.safetensors"), sealed=True),
        "'../rows.safetensors', which is not the name of a shard",
    ),
    "a forgotten shard": (edit(lambda m: m["shards"].pop(), sealed=True), "does not describe its shards"),
    "a group too many": (edit(lambda m: m["groups"].append(m["groups"][0]), sealed=True), "not describe its"),
    "a foreign origin": (edit(lambda m: m["origins"][0].update(who="me"), sealed=True), "not describe its"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_calibration_is_refused_and_the_file_named(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    rows([3, 2, 1]).save(tmp_path, shard_bytes=1000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    damage(tmp_path)
    with pytest.raises(StoreError, match=message):
        Calibration.load(tmp_path)


# --- fitting


def odd_picture() -> Calibration:
    writer = RowsWriter({})
    writer.add({"sample": torch.ones(1, 3, 10, 15), "timestep": torch.ones(1)}, [0], 0)
    return Calibration((writer.rows(),))


def misfits() -> Mapping[str, tuple[Calibration, str, str]]:
    """A calibration, a model that it does not fit, and the words of the refusal."""
    fine = rows([3, 2, 1])
    five, three = torch.ones(1, 5, 8, 8), torch.ones(1, 3, 8, 8)
    wide, flat = torch.ones(1, 5, 32), torch.ones(1, 16)
    unknown = replace(rows([1], sample=three), origins=())
    return {
        "empty": (Calibration(()), "conditional", "the calibration is empty"),
        "other class": (
            fine,
            "unconditional",
            "of UNet2DConditionModel .* this UNet2DModel: it is another kind",
        ),
        "too much": (rows([1], time_ids=flat), "conditional", "time_ids not taken by the model"),
        "too little": (fine, "stable-diffusion-xl", "text_embeds, time_ids not recorded"),
        "channels": (rows([1], sample=five), "conditional", r"\[5, 8, 8\] and should be \[4, H, W\]"),
        "context": (
            rows([1], encoder_hidden_states=wide),
            "conditional",
            r"\[5, 32\] and should be \[T, 16\]",
        ),
        "dims": (rows([1], encoder_hidden_states=flat), "conditional", r"is \[16\] and should be \[T, 16\]"),
        "unknown": (unknown, "unconditional", "of an unknown model .* encoder_hidden_states not taken"),
        "kind of number": (
            rows([1], sample=torch.ones(1, 4, 8, 8, dtype=torch.int64)),
            "conditional",
            "sample is torch.int64 and should be a floating-point tensor",
        ),
        "size": (odd_picture(), "unconditional", "sample is 10 x 15, not a multiple of 2"),
    }


@pytest.mark.parametrize("name", misfits())
def test_rows_that_a_model_cannot_take_are_refused_and_both_are_named(name: str) -> None:
    calibration, other, message = misfits()[name]
    with pytest.raises(CalibrationError, match=message) as caught:
        calibration.check(signature(model(other)))
    if len(calibration):
        assert "\n  recorded: sample [" in str(caught.value)
        assert "\n  expected: sample [" in str(caught.value)


def test_a_group_without_rows_is_refused() -> None:
    fine = rows([3, 2, 1])
    nothing = replace(fine, groups=(*fine.groups, fine.groups[0].take(torch.tensor([], dtype=torch.int64))))
    with pytest.raises(CalibrationError, match="group 1 of the calibration's rows has none"):
        nothing.check(signature(model("conditional")))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"trajectories": 0}, "trajectories must be at least 1, not 0"),
        ({"size": (8, 0)}, "size must be at least 1, not 0"),
        ({"guidance_scale": 0.0}, "guidance needs unconditional="),
    ],
)
def test_a_recording_of_nothing_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(CalibrationError, match=told):
        Calibration.record(model("unconditional"), scheduler=DDIMScheduler(), **{"steps": 2, **options})
    synthetic = {name: value for name, value in options.items() if name in ("steps", "trajectories")}
    for each in [synthetic] if synthetic else [{"seconds": math.nan}, {"seconds": -1.0}]:
        with pytest.raises(CalibrationError, match=r"must be at least 1|a finite number of at least 0"):
            Calibration.synthesize(model("unconditional"), **each)


def test_guidance_of_0_is_not_that_of_1() -> None:
    """u + 0 (c - u) is u: the trajectory is that of the unconditional half."""
    unet, contexts = (
        model("conditional"),
        torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(0)),
    )
    made = {"scheduler": DDIMScheduler(), "steps": 3, "size": (8, 8)}
    given, other = ({"encoder_hidden_states": each} for each in contexts)
    zero, one = (
        Calibration.record(unet, conditioning=given, unconditional=other, guidance_scale=scale, **made)
        for scale in (0.0, 1.0)
    )
    alone = Calibration.record(unet, conditioning=other, **made)
    last = [list(each.batches(1))[-1]["sample"] for each in (zero, one, alone)]
    torch.testing.assert_close(last[0], last[2], rtol=0, atol=1e-4)
    assert float((last[1] - last[2]).abs().max()) > 1e-3


def test_labels_beyond_the_classes_are_refused() -> None:
    unet = model("classes")
    spec = signature(unet)
    high = next(i.high for i in spec.inputs if i.kind == "label")
    label = {i.name: i.shape({**spec.sizes, "B": 1}) for i in spec.inputs}

    def labelled(number: int) -> Calibration:
        writer = RowsWriter({})
        writer.add(
            {n: torch.full(s, number) if n == "class_labels" else torch.ones(s) for n, s in label.items()},
            [0],
            0,
        )
        return Calibration((writer.rows(),))

    labelled(high - 1).check(spec)
    with pytest.raises(
        CalibrationError, match=f"class_labels go from {high} to {high} and should be 0 to {high - 1}"
    ):
        labelled(high).check(spec)


def test_the_first_row_that_is_not_finite_is_named() -> None:
    calibration = rows([3, 2, 1]).merge(rows([5, 4], size=12))
    calibration.check(signature(model("conditional")))
    calibration.groups[1].columns["sample"].values[1, 0, 0, 0] = float("inf")
    with pytest.raises(CalibrationError, match=r"sample of row 4 is not finite \(trajectory 3, step 0\)"):
        calibration.check(signature(model("conditional")))


def test_a_description_says_how_much_there_is_and_where_it_came_from() -> None:
    assert rows([3, 2, 1]).describe().splitlines() == [
        "3 rows  2 trajectories  3 timesteps from 3 to 1",
        "      3 x sample [4, 8, 8]  timestep []  encoder_hidden_states [5, 16]",
        "  tape: UNet2DConditionModel (c0ffee)  DDIMScheduler  seed=3",
        "    note: a note",
    ]
