"""Post-training quantization compiler for diffusion UNets.

import dmqfx
q = dmqfx.compile(unet, policy="w4a8")      # a diffusers UNet in, a drop-in quantized one out
pipe.unet = q
q.save_pretrained("out/"); q = dmqfx.load("out/")
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmqfx.calibration.calibration import Calibration as Calibration
    from dmqfx.calibration.recording import recording as recording
    from dmqfx.checking.verify import verify as verify
    from dmqfx.compiler import compile as compile
    from dmqfx.errors import DmqfxError as DmqfxError
    from dmqfx.evaluation import evaluate as evaluate
    from dmqfx.frontend.capture import capture as capture
    from dmqfx.graph.address import Address as Address
    from dmqfx.graph.address import Site as Site
    from dmqfx.graph.facts import Fact as Fact
    from dmqfx.graph.pattern import RewritePass as RewritePass
    from dmqfx.graph.pattern import p as p
    from dmqfx.graph.pattern import rule as rule
    from dmqfx.graph.pipeline import Pass as Pass
    from dmqfx.graph.pipeline import PassContext as PassContext
    from dmqfx.graph.pipeline import Pipeline as Pipeline
    from dmqfx.graph.pipeline import Preserves as Preserves
    from dmqfx.graph.program import Program as Program
    from dmqfx.graph.rewrite import Refuse as Refuse
    from dmqfx.graph.rewrite import Rewriter as Rewriter
    from dmqfx.graph.table import Table as Table
    from dmqfx.numbers.quant import QParams as QParams
    from dmqfx.numbers.quant import QuantSpec as QuantSpec
    from dmqfx.policy.policy import Policy as Policy
    from dmqfx.runtime.unet import CompiledUNet as CompiledUNet
    from dmqfx.seeing.explain import explain as explain
    from dmqfx.seeing.picture import picture as picture
    from dmqfx.seeing.report import Report as Report
    from dmqfx.seeing.show import diff as diff
    from dmqfx.seeing.show import show as show
    from dmqfx.seeing.why import why as why
    from dmqfx.storage.store import load as load

_HOME = {
    "Address": "graph.address",
    "Calibration": "calibration.calibration",
    "CompiledUNet": "runtime.unet",
    "DmqfxError": "errors",
    "Fact": "graph.facts",
    "Pass": "graph.pipeline",
    "PassContext": "graph.pipeline",
    "Pipeline": "graph.pipeline",
    "Policy": "policy.policy",
    "Preserves": "graph.pipeline",
    "Program": "graph.program",
    "QParams": "numbers.quant",
    "QuantSpec": "numbers.quant",
    "Refuse": "graph.rewrite",
    "Report": "seeing.report",
    "RewritePass": "graph.pattern",
    "Rewriter": "graph.rewrite",
    "Site": "graph.address",
    "Table": "graph.table",
    "capture": "frontend.capture",
    "compile": "compiler",
    "diff": "seeing.show",
    "evaluate": "evaluation",
    "explain": "seeing.explain",
    "load": "storage.store",
    "p": "graph.pattern",
    "picture": "seeing.picture",
    "recording": "calibration.recording",
    "rule": "graph.pattern",
    "show": "seeing.show",
    "verify": "checking.verify",
    "why": "seeing.why",
}
__all__ = sorted(_HOME)


def __dir__() -> list[str]:
    """For completion: the public names, loaded or not."""
    return sorted({*globals(), *__all__, "__version__"})


def __getattr__(name: str) -> object:
    """Public names are loaded when first used, so that `dmqfx --help` does not wait for torch."""
    if name == "__version__":
        return version("dmqfx")
    if name not in _HOME:
        raise AttributeError(f"dmqfx has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"dmqfx.{_HOME[name]}"), name)
    globals()[name] = value
    return value
