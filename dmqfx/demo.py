"""The demo: the bundled emoji model compiled by some policies, its pictures beside the float model's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dmqfx import emoji
from dmqfx.compiler import compile
from dmqfx.evaluation import emoji_calibration, mean_db, psnr_db
from dmqfx.graph import registry
from dmqfx.policy.policy import Policy
from dmqfx.seeing import wording
from dmqfx.seeing.report import Report
from dmqfx.storage.atomic import replacing_file

__all__ = ["Row", "draw", "remarks", "run", "table"]

PROMPTS, ZOOM, GAP, LEFT, LINE = 16, 3, 6, 172, 17
CELL = 32 * ZOOM


@dataclass(frozen=True, eq=False)
class Row:
    """One model's pictures and numbers; without a report it is the float model.

    Shapes: images [N, 3, 32, 32] in [-1, 1].
    Units: psnr_db of each picture against the float model's; seconds of compiling and of sampling.
    """

    name: str
    images: Tensor
    psnr_db: tuple[float, ...]
    report: Report | None
    compile_seconds: float
    sample_seconds: float

    def to_data(self) -> dict[str, object]:
        """The numbers as plain values."""
        told: dict[str, object] = {"name": self.name, "sample_seconds": self.sample_seconds}
        if self.report is None:
            return told
        return {
            **told,
            "compile_seconds": self.compile_seconds,
            "psnr_db": list(self.psnr_db),
            "mean_psnr_db": mean_db(self.psnr_db),
            "sqnr_db": self.report.mean_db,
            "bytes_before": self.report.bytes_before,
            "bytes_after": self.report.bytes_after,
            "sites_asked": self.report.asked,
            "sites_got": self.report.got,
        }


def run(
    policies: Sequence[str], out: Path, *, count: int = PROMPTS, seed: int = 0, progress: bool = False
) -> list[Row]:
    """Compile, sample the same prompts from the same noise (DDIM, 20 steps, guidance 3), write the picture.

    An interrupted demo leaves no half file.
    """
    chosen = [Policy.load(policy, check_step=registry.problems_with) for policy in policies]
    unet, prompts = emoji.load_unet(), emoji.demo_prompts(count)
    calibration = emoji_calibration(progress=progress, seed=seed)
    started = time.perf_counter()
    exact = emoji.decode(emoji.sample(unet, prompts, seed=seed, progress=progress))
    rows = [Row("float32", exact, (), None, 0.0, time.perf_counter() - started)]
    for policy in chosen:
        started = time.perf_counter()
        q = compile(unet, policy, calibration=calibration, seed=seed, progress=progress)
        compiled = time.perf_counter()
        images = emoji.decode(emoji.sample(q, prompts, seed=seed, progress=progress))
        psnr = tuple(psnr_db(a, b) for a, b in zip(exact, images, strict=True))
        rows.append(
            Row(policy.name, images, psnr, q.report, compiled - started, time.perf_counter() - compiled)
        )
    with replacing_file(out) as file:
        draw(rows, [caption(prompt) for prompt in prompts]).save(file, format="PNG")
    return rows


def table(rows: Sequence[Row]) -> str:
    """What was done, a line for each model."""
    head = [
        "policy",
        "size",
        "of float",
        "sites as asked",
        "output SQNR",
        "picture PSNR",
        "worst",
        "compile",
        "sample",
    ]
    return wording.columns([head, *map(_cells, rows)], right=set(range(1, len(head))))


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """For each policy, the layers that lose most and what was refused."""
    for row in rows:
        if row.report is not None:
            yield f"{row.name}: {row.report.summary()}\n{row.report.table(worst_first=True, limit=5)}"


def draw(rows: Sequence[Row], captions: Sequence[str]) -> Image.Image:
    """One line of pictures for each model: its name and numbers at the left, the prompts below."""
    words = [_broken(caption) for caption in captions]
    bottom = LINE * max((len(lines) for lines in words), default=0)
    width, height = LEFT + len(words) * (CELL + GAP), GAP + len(rows) * (CELL + GAP)
    sheet = Image.new("RGB", (width, height + bottom + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    large, small = (ImageFont.load_default(size=size) for size in (17, 13))
    for y, row in enumerate(rows):
        top = GAP + y * (CELL + GAP)
        name, *numbers = _label(row)
        pen.text((2 * GAP, top + 14), name, fill="black", font=large)
        pen.multiline_text((2 * GAP, top + 40), "\n".join(numbers), fill="#555555", font=small, spacing=4)
        for x, image in enumerate(row.images):
            sheet.paste(_picture(image), (LEFT + x * (CELL + GAP), top))
    for x, lines in enumerate(words):
        middle = LEFT + x * (CELL + GAP) + CELL // 2
        for k, line in enumerate(lines):
            pen.text((middle, height + k * LINE), line, fill="#555555", font=small, anchor="ma")
    return sheet


def caption(prompt: str) -> str:
    """A prompt without its category.

    Example:
        >>> caption("cat:smileys-emotion sub:face-smiling grinning face")
        'grinning face'
    """
    kept = [word for word in prompt.split(" ") if not word.startswith(("cat:", "sub:"))]
    return " ".join(kept)


def _broken(words: str, most: int = 14) -> list[str]:
    """Words in lines that fit below a picture, two at most."""
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [line if len(line) <= most else line[: most - 1] + "." for line in lines[:2]]


def _label(row: Row) -> list[str]:
    if row.report is None:
        return [row.name, "the original"]
    size = f"{wording.size(row.report.bytes_after)} of {wording.size(row.report.bytes_before)}"
    return [row.name, size, f"PSNR {mean_db(row.psnr_db):.1f} dB"]


def _cells(row: Row) -> list[str]:
    if row.report is None:
        return [row.name, "", "", "", "", "", "", "", f"{row.sample_seconds:.1f} s"]
    r = row.report
    return [
        row.name,
        wording.size(r.bytes_after),
        f"{r.bytes_after / r.bytes_before:.1%}",
        f"{r.got} of {r.asked}",
        "" if r.mean_db is None else f"{r.mean_db:.1f} dB",
        f"{mean_db(row.psnr_db):.1f} dB",
        f"{min(row.psnr_db):.1f} dB",
        f"{row.compile_seconds:.1f} s",
        f"{row.sample_seconds:.1f} s",
    ]


def _picture(image: Tensor) -> Image.Image:
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)
