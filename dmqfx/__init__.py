"""Post-training quantization compiler for diffusion UNets.

import dmqfx
q = dmqfx.compile(unet, policy="w4a8")      # a diffusers UNet in, a drop-in quantized one out
pipe.unet = q
q.save_pretrained("out/"); q = dmqfx.load("out/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmqfx.address import Address as Address
    from dmqfx.address import Site as Site
    from dmqfx.calibration import Calibration as Calibration
    from dmqfx.capture import capture as capture
    from dmqfx.compile import compile as compile
    from dmqfx.errors import DmqfxError as DmqfxError
    from dmqfx.evaluation import evaluate as evaluate
    from dmqfx.facts import Fact as Fact
    from dmqfx.pattern import RewritePass as RewritePass
    from dmqfx.pattern import p as p
    from dmqfx.pattern import rule as rule
    from dmqfx.picture import picture as picture
    from dmqfx.pipeline import Pass as Pass
    from dmqfx.pipeline import PassContext as PassContext
    from dmqfx.pipeline import Pipeline as Pipeline
    from dmqfx.pipeline import Preserves as Preserves
    from dmqfx.policy import Policy as Policy
    from dmqfx.program import Program as Program
    from dmqfx.quant import QParams as QParams
    from dmqfx.quant import QuantSpec as QuantSpec
    from dmqfx.report import Report as Report
    from dmqfx.rewrite import Refuse as Refuse
    from dmqfx.rewrite import Rewriter as Rewriter
    from dmqfx.runtime.unet import CompiledUNet as CompiledUNet
    from dmqfx.show import diff as diff
    from dmqfx.show import show as show
    from dmqfx.store import load as load
    from dmqfx.table import Table as Table
    from dmqfx.verify import verify as verify
    from dmqfx.why import why as why

_HOME = {
    "Address": "address",
    "Calibration": "calibration",
    "CompiledUNet": "runtime.unet",
    "DmqfxError": "errors",
    "Fact": "facts",
    "Pass": "pipeline",
    "PassContext": "pipeline",
    "Pipeline": "pipeline",
    "Policy": "policy",
    "Preserves": "pipeline",
    "Program": "program",
    "QParams": "quant",
    "QuantSpec": "quant",
    "Refuse": "rewrite",
    "Report": "report",
    "RewritePass": "pattern",
    "Rewriter": "rewrite",
    "Site": "address",
    "Table": "table",
    "capture": "capture",
    "compile": "compile",
    "diff": "show",
    "evaluate": "evaluation",
    "load": "store",
    "p": "pattern",
    "picture": "picture",
    "rule": "pattern",
    "show": "show",
    "verify": "verify",
    "why": "why",
}
__all__ = sorted(_HOME)  # noqa: PLE0605  # a list, built from the table above


def __getattr__(name: str) -> object:
    """Public names are loaded when first used, so that `dmqfx --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"dmqfx has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"dmqfx.{_HOME[name]}"), name)
    globals()[name] = value
    return value
