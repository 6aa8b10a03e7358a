"""The command line: `dmqfx COMMAND`. Parses, calls the library, prints; nothing is computed here."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from dmqfx.cli import judge, look, make, measure, tell, terminal
from dmqfx.cli.terminal import complain

__all__ = ["build_parser", "main"]

ABOUT = """\
dmqfx quantizes diffusion UNets: it captures a diffusers UNet as a graph, rewrites it by verified passes
and gives back a drop-in module with packed low-bit weights. A YAML policy says which bits go where.
"""
EXAMPLES = (
    ("dmqfx demo --out demo.png", "the bundled emoji model, float beside w4a8-quick and w4a6"),
    ("dmqfx inspect unet/", "what is in a model, and where its multiply-adds are"),
    ("dmqfx explain unet/ --policy w4a8", "which bits each tensor would get, by which rule"),
    ("dmqfx compile unet/ --policy w4a8 --out unet-w4a8/", "quantize and save"),
    ("dmqfx show unet-w4a8/ --at 'mid_block.**'", "the compiled graph, line by line"),
)
MODELS = """\
MODEL is a local diffusers folder (a UNet, or a pipeline with unet/ inside), a saved dmqfx folder where a
compiled model makes sense, a hub id where there is a network, or the word `emoji` for the bundled model.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if not hasattr(options, "run"):
        parser.print_help(sys.stderr)
        return terminal.WRONG_USE
    level = logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("dmqfx").setLevel(level)
    return complain(options.run, options)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; making it costs no torch."""
    codes = "\n".join(f"  {code:<3}  {meaning}" for code, meaning in terminal.EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog="dmqfx",
        description=ABOUT,
        epilog=f"{terminal.listed(EXAMPLES)}\n\n{MODELS}\nexit codes:\n{codes}",
        formatter_class=terminal.Layout,
    )
    parser.add_argument("-V", "--version", action="version", version=f"dmqfx {tell.version_of('dmqfx')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (make, judge, measure, look, tell):
        module.add_commands(commands)
    return parser
