"""The demo: its sheet of pictures, its table, and (slow) the whole of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dmqfx import demo, emoji
from dmqfx.cli import main
from dmqfx.demo import CELL, GAP, LEFT, Row
from dmqfx.errors import PolicyError
from dmqfx.seeing.report import LayerReport, Report, SiteReport

SITE = SiteReport("weight", 4, 4, "4 bit", "default")
LAYER = LayerReport("conv_in/conv2d", (SITE,), 12.0, 4000, 500, 10, 1.0)
REPORT = Report("UNet2DConditionModel", (LAYER,), {500.0: 20.0, 0.0: 10.0}, 2, 8_000_000, 2_000_000, ())


def plain(red: float, green: float, blue: float) -> Tensor:
    """Two pictures of one colour, in [-1, 1]."""
    return torch.tensor([red, green, blue])[None, :, None, None].expand(2, 3, 32, 32)


def rows() -> list[Row]:
    return [
        Row("float32", plain(1, -1, -1), (), None, 0.0, 1.5),
        Row("w4a8", plain(-1, -1, 1), (30.0, 20.0), REPORT, 2.0, 1.5),
    ]


def test_each_model_has_a_line_of_its_own_pictures() -> None:
    sheet = demo.draw(rows(), ["red apple", "ghost"])
    middle = CELL // 2
    for y, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        for x in range(2):
            at = LEFT + x * (CELL + GAP) + middle, GAP + y * (CELL + GAP) + middle
            assert sheet.getpixel(at) == colour


def test_the_names_of_models_stand_left_and_the_prompts_below() -> None:
    sheet = demo.draw(rows(), ["red apple", "ghost"])
    inked = sheet.convert("L").point(lambda value: 255 if value < 200 else 0)
    height = GAP + 2 * (CELL + GAP)
    assert inked.crop((0, 0, LEFT, height)).getbbox() is not None
    for x in range(2):
        left = LEFT + x * (CELL + GAP)
        assert inked.crop((left, height, left + CELL, sheet.height)).getbbox() is not None
    assert inked.crop((LEFT - GAP, 0, LEFT, height)).getbbox() is None, "a label runs into the pictures"


def test_a_long_prompt_is_broken_and_stays_below_its_picture() -> None:
    assert demo._broken("smiling face with sunglasses on") == ["smiling face", "with"]
    assert demo._broken("incomprehensibilities") == ["incomprehensi."]


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [("cat:food-drink sub:food-fruit red apple", "red apple"), ("ghost", "ghost"), ("", "")],
)
def test_a_caption_is_the_prompt_without_its_category(prompt: str, caption: str) -> None:
    assert demo.caption(prompt) == caption


def test_the_captions_of_the_demo_fit_below_their_pictures() -> None:
    for prompt in emoji.demo_prompts(demo.PROMPTS):
        assert " ".join(demo._broken(demo.caption(prompt))) == demo.caption(prompt)


def test_the_table_tells_size_bits_and_quality() -> None:
    lines = demo.table(rows()).splitlines()
    assert lines[2].split() == ("w4a8 2 MB 25.0% 1 of 1 15.0 dB 25.0 dB 20.0 dB 2.0 s 1.5 s".split())


def test_the_numbers_are_there_as_plain_values() -> None:
    told = json.loads(json.dumps([row.to_data() for row in rows()]))
    assert told[0] == {"name": "float32", "sample_seconds": 1.5}
    assert (told[1]["mean_psnr_db"], told[1]["sqnr_db"], told[1]["bytes_after"]) == (25, 15, 2_000_000)


def test_the_remarks_name_the_layers_that_lose_most() -> None:
    (remark,) = demo.remarks(rows())
    assert remark.startswith("w4a8: UNet2DConditionModel: 8 MB -> 2 MB, 4x smaller")
    assert "conv_in/conv2d" in remark


def test_a_wrong_policy_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emoji, "load_unet", pytest.fail)
    with pytest.raises(PolicyError, match="w4a9"):
        demo.run(["w4a8", "w4a9"], tmp_path / "demo.png")


@pytest.mark.slow
def test_the_demo_draws_float_and_quantized_pictures_that_look_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "new" / "demo.png"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    with Image.open(told["picture"]) as sheet:
        assert sheet.size[0] == LEFT + 16 * (CELL + GAP)
    exact, *quantized = told["rows"]
    assert exact["name"] == "float32"
    assert [row["name"] for row in quantized] == ["w4a8-quick", "w4a6"]
    for row, sites in zip(quantized, (236, 248), strict=True):  # each arm of a skip is a layer of its own
        assert row["sites_got"] == row["sites_asked"] == sites
        assert row["bytes_after"] < 0.25 * row["bytes_before"]
        assert row["mean_psnr_db"] > 22
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["demo.png"]
