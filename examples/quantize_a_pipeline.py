"""Quantize the UNet of a diffusers pipeline and put it back.

python examples/quantize_a_pipeline.py            a tiny random pipeline, offline, in seconds
python examples/quantize_a_pipeline.py FOLDER     your own: a folder of pipe.save_pretrained
"""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline
from tiny_pipeline import tiny_pipeline

import dmqfx

pipe = DiffusionPipeline.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else tiny_pipeline()
prompts = ["a cat", "a red apple", "a ship"]


def picture(seed: int = 0):
    """The same noise and prompt every time."""
    noise = torch.Generator().manual_seed(seed)
    return pipe("a mat", generator=noise, num_inference_steps=5, output_type="np").images[0]


before = picture()

calibration = dmqfx.Calibration.record(pipe, prompts=prompts, steps=5)
q = dmqfx.compile(pipe.unet, policy="w8a8", calibration=calibration)
print(q.report.summary())

pipe.unet = q
after = picture()
print(f"mean difference of the two pictures, of 1.0: {abs(before - after).mean():.4f}")

q.save_pretrained("quantized-unet")
pipe.unet = dmqfx.load("quantized-unet")
print("a loaded model gives the same picture:", bool((picture() == after).all()))
