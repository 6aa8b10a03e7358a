"""Record once what the UNet of a pipeline receives, and compile two policies with it.

python examples/calibrate_from_a_pipeline.py [FOLDER of pipe.save_pretrained]
"""

from __future__ import annotations

import sys

from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from tiny_pipeline import tiny_pipeline

import dmqfx

pipe = DiffusionPipeline.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else tiny_pipeline()
pipe.scheduler = DPMSolverMultistepScheduler.from_config(
    pipe.scheduler.config
)  # record with what you sample with

calibration = dmqfx.Calibration.record(
    pipe, prompts=["a cat", "a red apple"], steps=5, guidance_scale=7.5, negative_prompt="blurry", seed=1
)
print(calibration.describe())

calibration.save("calibration")
calibration = dmqfx.Calibration.load("calibration")

for policy in ("w8a8", "w4a8-quick"):
    q = dmqfx.compile(pipe.unet, policy, calibration=calibration)
    print(f"\n{policy}\n{q.report.summary()}")
