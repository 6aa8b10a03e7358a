"""compile, from outside: what it takes and what it leaves alone."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from models import model

import dmqfx
from dmqfx.calibration.calibration import CalibrationWarning
from dmqfx.compiler import NothingQuantizedWarning, QualityWarning, check_pipeline
from dmqfx.errors import CalibrationError, CaptureError, PolicyError


def small(dtype: torch.dtype) -> UNet2DModel:
    levels = {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=8, **levels
    )
    return unet.to(dtype).eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_unet_is_compiled_in_float32_and_gives_back_its_own_dtype(
    dtype: torch.dtype,
) -> None:
    unet = small(dtype)
    calibration = dmqfx.Calibration.synthesize(unet, steps=2, trajectories=1, progress=False)
    verified = dtype is torch.bfloat16  # both are compiled in float32
    q = dmqfx.compile(unet, "w8a8", calibration=calibration, progress=False, verify=verified)
    assert {p.dtype for p in unet.parameters()} == {dtype}
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    half = q(x, 500).sample
    assert (half.dtype, q.program.dtype) == (dtype, torch.float32)
    same = dmqfx.compile(unet.float(), "w8a8", calibration=calibration, progress=False)
    assert torch.equal(half, same(x.float(), 500).sample.to(dtype))


LEARNING = {
    "schema": "dmqfx.policy/1",
    "name": "learning",
    "default": {"weight": {"bits": 4}, "input": {"bits": 8}},
    "pipeline": [
        "canonicalize",
        "plan-sites",
        {"measure-sensitivity": {"rows": 2}},
        "fit-ranges",
        {"round-weights": {"method": "gptq", "rows": 64}},
        {"learn-steps": {"rows": 2, "batch": 2, "iterations": 2}},
        "insert-qdq",
    ],
}


def quick(unet: UNet2DModel) -> dmqfx.Calibration:
    return dmqfx.Calibration.synthesize(unet, steps=2, trajectories=1, progress=False)


def of_one_level(channels: int = 3) -> UNet2DModel:
    return UNet2DModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
    ).eval()


@pytest.mark.slow
def test_inside_inference_mode_learning_passes_learn_all_the_same() -> None:
    torch.manual_seed(0)
    unet = of_one_level()
    calibration, x = quick(unet), torch.randn(1, 3, 8, 8)
    outside = dmqfx.compile(unet, LEARNING, calibration=calibration, progress=False)
    with torch.inference_mode():
        inside = dmqfx.compile(unet, LEARNING, calibration=calibration, progress=False)
        assert torch.equal(inside(x, 500).sample, outside(x, 500).sample)


def test_where_nothing_is_quantized_there_is_nothing_to_learn() -> None:
    unet = small(torch.float32)
    q = dmqfx.compile(
        unet,
        {**LEARNING, "default": {"weight": "float", "input": "float"}},
        calibration=quick(unet),
        target="reference",
        progress=False,
    )
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(q(x, 500).sample, unet(x, 500).sample)


def test_a_calibration_of_other_weights_is_warned_of() -> None:
    torch.manual_seed(0)
    unet = small(torch.float32)
    calibration, other = quick(unet), small(torch.float32)
    with pytest.warns(CalibrationWarning, match=r"from other weights than those of this UNet2DModel.*record"):
        dmqfx.compile(other, "w8a16", calibration=calibration, report_rows=0, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        for near in (unet, small(torch.bfloat16)):
            dmqfx.compile(near, "w8a16", calibration=calibration, report_rows=0, progress=False)


def test_an_unknown_target_is_refused_before_anything_runs() -> None:
    with pytest.raises(dmqfx.DmqfxError, match=r"there is no target 'refrence'.*reference"):
        dmqfx.compile(small(torch.float32), target="refrence")


def test_an_order_that_cannot_work_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for long in ("capture", "Calibration.synthesize"):
        monkeypatch.setattr(f"dmqfx.compiler.{long}", pytest.fail)
    with pytest.raises(PolicyError) as caught:
        dmqfx.compile(
            small(torch.float32), "w4a8-quick", overrides=["pipeline=[plan-sites, canonicalize, insert-qdq]"]
        )
    first, second = str(caught.value).splitlines()
    assert re.fullmatch(
        r"--set:1:11: step 1, plan-sites, requires 'canonical' .*; move canonicalize before it", first
    )
    assert re.fullmatch(
        r"--set:1:37: step 3, insert-qdq, requires 'rounded' .*; put round-weights before it", second
    )


def test_what_decides_about_the_float_program_cannot_stand_behind_its_quantization(tmp_path: Path) -> None:
    path = tmp_path / "late.yaml"
    path.write_text(
        "schema: dmqfx.policy/1\nname: late\nextends: w8a8\npipeline:\n"
        + "".join(f"- {step.name}\n" for step in dmqfx.Policy.load("w8a8").pipeline)
        + "- insert-qdq\n- pair-layers\n"
    )
    with pytest.raises(PolicyError) as caught:
        check_pipeline(dmqfx.Policy.load(path))
    told = str(caught.value).splitlines()
    places = [f"{path}:{4 + len(dmqfx.Policy.load('w8a8').pipeline) + k}:3: " for k in (1, 2)]
    assert all(line.startswith(place) for line, place in zip(told, places, strict=True))
    assert "insert-qdq, comes too late: 'qdq' (" in told[0]
    assert told[1].endswith("holds already; move it before insert-qdq")


def test_the_lowering_is_left_to_the_target() -> None:
    with pytest.raises(
        PolicyError, match=r"lower-reference is what the target 'reference' runs .*; remove the step"
    ):
        check_pipeline(
            dmqfx.Policy.load(
                "w8a16", ["pipeline=[canonicalize, plan-sites, round-weights, insert-qdq, lower-reference]"]
            )
        )


def test_a_policy_of_floats_gives_the_float_unet(tmp_path: Path) -> None:
    policy = {
        "schema": "dmqfx.policy/1", "name": "floats", "default": {"weight": "float", "input": "float"},
        "pipeline": ["canonicalize"],
    }  # fmt: skip
    unet = small(torch.float32)
    q = dmqfx.compile(unet, policy, progress=False)
    q.save_pretrained(tmp_path)
    x = torch.randn(2, unet.config.in_channels, 16, 8)
    for each in (q, dmqfx.load(tmp_path)):
        assert torch.equal(each(x, 7).sample, unet(x, 7).sample)


def test_a_mistake_in_what_extends_a_shipped_policy_is_told_where_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "schema: dmqfx.policy/1\nname: mine\nextends: w4a8-quick\ndefault:\n  input: {range: percentile}\n"
    )
    with pytest.raises(PolicyError, match=rf"{path}:5:10: observers keep only extremes"):
        check_pipeline(dmqfx.Policy.load(path))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["pipeline=[canonicalize]"],
            r"asks for bits \(default\.weight\), but no step of the pipeline provides 'planned' .*; put plan-sites into it",
        ),
        (
            ["pipeline=[canonicalize, plan-sites]"],
            r"asks for bits \(default\.weight\), but no step of the pipeline provides 'qdq' .*; put insert-qdq into it",
        ),
        (
            [
                "default.weight=float",
                "rules=[{name: ends, at: 'conv_in/*', weight: {bits: 8}}]",
                "pipeline=[canonicalize]",
            ],
            r"asks for bits \(rules\.ends\.weight\), but no step of the pipeline provides 'planned'",
        ),
    ],
)
def test_bits_that_no_step_gives_are_refused_before_anything_runs(
    overrides: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for long in ("capture", "Calibration.synthesize"):
        monkeypatch.setattr(f"dmqfx.compiler.{long}", pytest.fail)
    with pytest.raises(PolicyError, match=told):
        dmqfx.compile(small(torch.float32), "w8a16", overrides=overrides)


def keeping(rule: dict[str, object], **more: object) -> dict[str, object]:
    return {"name": "mine", "extends": "w8a16", "rules": [rule], **more}


def test_bits_that_not_one_site_gets_are_a_warning_and_in_the_report() -> None:
    all_kept = keeping({"name": "all", "at": "**", "keep": "float"})
    with pytest.warns(
        NothingQuantizedWarning, match="'mine' asks for bits, but all 81 sites are kept float by all;"
    ):
        q = dmqfx.compile(small(torch.float32), all_kept, report_rows=0)
    assert "nothing was asked to be quantized: every layer is float" in q.report.summary()


def test_bits_that_every_site_refuses_are_a_warning_and_in_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dmqfx.passes.plan_sites._unquantizable", lambda program, site: "no reason")
    told = "'w8a16' asks for bits, but none of the 27 sites got any: plan-sites: no reason; 8 bit"
    with pytest.warns(NothingQuantizedWarning, match=told):
        q = dmqfx.compile(small(torch.float32), "w8a16", report_rows=0)
    assert "not one of them is quantized: every layer is float" in q.report.summary()


def test_a_policy_that_is_float_on_purpose_is_compiled_in_silence() -> None:
    policy = keeping(
        {"name": "all", "at": "**", "keep": "float"},
        default={"weight": "float", "input": "float"},
    )
    unet, x = small(torch.float32), torch.randn(1, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = dmqfx.compile(unet, policy, report_rows=0)
    with torch.no_grad():
        torch.testing.assert_close(q(x, 500).sample, unet(x, 500).sample)


@pytest.mark.parametrize(
    ("rows", "words"), [(2, r"the output has \d+\.\d dB SQNR, 90 dB are wanted"), (0, "nothing was measured")]
)
def test_what_a_policy_expects_in_vain_is_a_warning(rows: int, words: str) -> None:
    expecting = {"overrides": ["expect.sqnr_db=90"], "report_rows": rows, "progress": False}
    calibration = dmqfx.Calibration.synthesize(small(torch.float32), steps=2, trajectories=1, progress=False)
    with pytest.warns(QualityWarning, match=words):
        dmqfx.compile(small(torch.float32), "w4a16", calibration=calibration, **expecting)


def test_what_a_policy_expects_and_gets_is_none() -> None:
    calibration = dmqfx.Calibration.synthesize(small(torch.float32), steps=2, trajectories=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QualityWarning)
        dmqfx.compile(
            small(torch.float32),
            "w8a16",
            calibration=calibration,
            overrides=["expect.sqnr_db=5"],
            progress=False,
        )


def test_what_cannot_be_captured_is_refused_before_it_is_calibrated() -> None:
    unet = small(torch.float32)
    unet.conv_in._hf_hook = object()
    with pytest.raises(CaptureError, match="cannot capture at conv_in"):
        dmqfx.compile(unet)


def without_context() -> dmqfx.Calibration:
    calls = dmqfx.Calibration.synthesize(model("plain"), steps=2, trajectories=1, progress=False)
    columns = [dict(group.columns) for group in calls.groups]
    for each in columns:
        del each["encoder_hidden_states"]
    groups = (replace(group, columns=left) for group, left in zip(calls.groups, columns, strict=True))
    return replace(calls, groups=tuple(groups))


def test_a_calibration_that_does_not_fit_is_refused_before_capture_in_the_words_of_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unet, other = small(torch.float32), quick(of_one_level(4))
    with pytest.raises(CalibrationError, match=r"sample is \[4, 8, 8\] and should be \[3, H, W\]") as later:
        other.check(dmqfx.capture(unet).inputs)
    monkeypatch.setattr("dmqfx.compiler.capture", pytest.fail)
    with pytest.raises(CalibrationError) as early:
        dmqfx.compile(unet, "w8a8", calibration=other)
    assert str(early.value) == str(later.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_calibration_without_the_context_that_no_block_reads_fits() -> None:
    unet = model("plain")
    q = dmqfx.compile(unet, "w8a8", calibration=without_context(), report_rows=0)
    assert q.report is not None
    assert q.report.got


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_calibration_without_the_context_that_is_read_is_refused_before_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dmqfx.compiler.capture", pytest.fail)
    with pytest.raises(CalibrationError, match="encoder_hidden_states not recorded"):
        dmqfx.compile(model("conditional"), "w8a8", calibration=without_context())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_before_anything_runs(value: float) -> None:
    unet = small(torch.float32)
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight[2, 3, 1] = value
    told = r"at mid_block\.resnets\.0\.conv1: weight has 3 of 2304 values that are not finite"
    with pytest.raises(CaptureError, match=told):
        dmqfx.compile(unet, "w8a16")
