"""Commands that look at a program: inspect, show, diff, why, explain."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from dmqfx.cli import files, sources, terminal
from dmqfx.cli.terminal import Commands, command, whole

if TYPE_CHECKING:
    from dmqfx.policy.policy import Explanation
    from dmqfx.seeing.inventory import Item
    from dmqfx.seeing.lines import Line


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    _inspect(commands)
    _show(commands)
    _diff(commands)
    _why(commands)
    _explain(commands)


def _inspect(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        commands,
        "inspect",
        inspect,
        "list every layer with shape, weights, bits and share of the multiply-adds",
        (
            ("dmqfx inspect emoji", ""),
            ("dmqfx inspect unet/ --at '**.attentions.**'", "some layers"),
            ("dmqfx inspect out/ --picture u.svg", "also the U: order, resolution, skips, bits"),
            ("dmqfx inspect out/ --target cpu", "also what each layer runs as on this machine, and why"),
        ),
    )
    terminal.add_model(parser)
    terminal.add_target(parser)
    terminal.add_glob(parser)
    parser.add_argument("--picture", metavar="SVG", help="also draw the U of the whole program")


def inspect(options: argparse.Namespace) -> int:
    """dmqfx inspect."""
    from dmqfx.seeing.inventory import inventory, listing
    from dmqfx.seeing.picture import picture
    from dmqfx.storage.atomic import replacing_file

    drawing = files.to_be_file(options.picture) if options.picture else None
    name = options.model
    compiled = sources.load_stored(name) if sources.is_compiled(name) else None
    if compiled is not None:
        program = sources.lowered(compiled.program, options.target, apart=True)
    elif options.target is None:
        program = sources.program_of(sources.load_outline(name))
    else:
        program = sources.load_program(name, options.target)  # which says why not
    report = compiled.report if compiled is not None else None
    items = inventory(program, options.at)
    text = listing(items, lowered=options.target is not None)
    if report is not None:
        text += f"\n\n{report.summary()}"
    if drawing is not None:
        with replacing_file(drawing) as file:
            shown = program if compiled is None else compiled.program
            file.write_text(picture(sources.flagged(shown), report), encoding="utf-8")
        text += f"\n\npicture: {drawing.resolve()}"
    data = {
        "layers": [_item(item) for item in items],
        "report": None if report is None else report.to_data(),
        "picture": None if drawing is None else str(drawing.resolve()),
    }
    terminal.say(options, text, data)
    return terminal.OK


def _item(item: Item) -> dict[str, object]:
    plain = {f.name: getattr(item, f.name) for f in dataclasses.fields(item) if f.name != "sites"}
    sites = {
        s.site.arg: {"asked": str(s.asked or "float"), "got_bits": s.got, "rule": s.rule} for s in item.sites
    }
    return {**plain, "sites": sites}


def _show(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        commands,
        "show",
        show,
        "print the graph, one line for each operation, with what the table knows",
        (
            ("dmqfx show out/ --at 'mid_block.**'", "one block"),
            ("dmqfx show emoji | grep conv2d", "the float graph"),
            ("dmqfx show out/ --target cpu | grep kernel_", "what native kernels compute on this machine"),
        ),
    )
    terminal.add_model(parser)
    terminal.add_target(parser)
    terminal.add_glob(parser)


def show(options: argparse.Namespace) -> int:
    """dmqfx show."""
    from dmqfx.seeing.lines import lines
    from dmqfx.seeing.selection import select

    found = lines(sources.load_program(options.model, options.target))
    wanted = select(found, options.at)
    shown = [line for address, line in found.items() if address in wanted]
    terminal.say(options, "\n".join(map(str, shown)), [_line(line) for line in shown])
    return terminal.OK


def _line(line: Line) -> dict[str, object]:
    return {
        "address": str(line.at),
        "op": line.op,
        "arguments": {name: part.words for name, part in line.arguments.items()},
        "shape": line.shape,
        "notes": {name: part.words for name, part in line.notes.items()},
    }


def _diff(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        commands,
        "diff",
        diff,
        "what differs between two programs, aligned by address",
        (
            ("dmqfx diff emoji emoji-w4a8/ --at 'conv_in/*'", "float and compiled"),
            ("dmqfx diff w4a8/ w4a6/", "two policies"),
        ),
    )
    terminal.add_model(parser, "before")
    terminal.add_model(parser, "after")
    terminal.add_glob(parser)
    parser.add_argument(
        "--context", type=whole(0), default=0, metavar="N", help="unchanged lines around a change [0]"
    )


def diff(options: argparse.Namespace) -> int:
    """dmqfx diff."""
    from dmqfx.seeing.show import diff as difference

    before, after = sources.load_program(options.before), sources.load_program(options.after)
    text = difference(before, after, options.at, context=options.context)
    terminal.say(options, text, {"equal": text.startswith("equal: "), "lines": text.splitlines()})
    return terminal.OK


def _why(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        commands,
        "why",
        why,
        "the life of one address: rule, bits, scales, rewrites, refusals",
        (
            ("dmqfx why out/ mid_block.resnets.0.conv1/conv2d", ""),
            ("dmqfx why out/ conv_in/conv2d --target cpu", "also what became of it on this machine"),
        ),
    )
    terminal.add_model(parser)
    terminal.add_target(parser)
    parser.add_argument("address", metavar="ADDRESS", help="as `dmqfx show` prints it")


def why(options: argparse.Namespace) -> int:
    """dmqfx why."""
    from dmqfx.seeing.why import why as life

    text = life(sources.load_program(options.model, options.target), options.address)
    terminal.say(options, text, {"address": text.splitlines()[0], "lines": text.splitlines()[1:]})
    return terminal.OK


def _explain(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        commands,
        "explain",
        explain,
        "bits and deciding rule of every site under a policy; nothing is compiled",
        (
            ("dmqfx explain unet/ --policy my.yaml", ""),
            (
                "dmqfx explain emoji --set default.input.bits=6 --at '**.to_q/*'",
                "some sites, one setting changed",
            ),
        ),
    )
    terminal.add_model(parser)
    terminal.add_policy(parser)
    terminal.add_glob(parser)


def explain(options: argparse.Namespace) -> int:
    """dmqfx explain."""
    from dmqfx.graph import registry
    from dmqfx.policy.policy import Policy
    from dmqfx.seeing.explain import explanations, table

    policy = Policy.load(options.policy, options.overrides, check_step=registry.problems_with)
    found = explanations(sources.load_captured(options.model), policy, options.at)
    terminal.say(options, table(found), [_explained(each) for each in found])
    return terminal.OK


def _explained(found: Explanation) -> dict[str, object]:
    return {
        "site": str(found.site),
        "bits": found.spec.bits if found.spec else None,
        "asked": str(found.spec or "float"),
        "rule": found.rule,
        "overrides": list(found.overridden),
    }
