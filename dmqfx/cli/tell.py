"""Commands that tell what is there: passes, policies, env."""

from __future__ import annotations

import argparse
import dataclasses
import inspect as python
import os
import platform
import typing
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from dmqfx.cli import terminal
from dmqfx.cli.terminal import Commands, command
from dmqfx.machine import processor

if TYPE_CHECKING:
    from dmqfx.graph.pipeline import Pass

PACKAGES = (
    "dmqfx torch diffusers transformers accelerate safetensors huggingface_hub networkx numpy pyyaml"
).split()


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    parser = command(
        commands,
        "passes",
        passes,
        "the installed passes, those of other packages included",
        (("dmqfx passes", "all"), ("dmqfx passes round-weights", "one, with its options")),
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one pass")
    parser = command(
        commands,
        "policies",
        policies,
        "the shipped policies",
        (("dmqfx policies", "all"), ("dmqfx policies w4a8 > my.yaml", "the YAML of one, to start from")),
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one policy")
    command(
        commands,
        "env",
        env,
        "processor, threads and versions, for a bug report",
        (("dmqfx env", ""), ("dmqfx env --json", "")),
    )


def passes(options: argparse.Namespace) -> int:
    """dmqfx passes."""
    from dmqfx.errors import PassNotFoundError
    from dmqfx.graph import registry
    from dmqfx.words import suggest

    known = registry.passes()
    if options.name:
        if options.name not in known:
            raise PassNotFoundError(f"there is no pass {options.name!r}; {suggest(options.name, known)}")
        step = known[options.name]
        terminal.say(options, _page(options.name, step), _facts(step))
        return terminal.OK
    width = max(map(len, known))
    text = "\n".join(f"{n:<{width}}  {c.preserves.value:<8} {_sentence(c)}" for n, c in known.items())
    terminal.say(options, text, {n: _facts(c) for n, c in known.items()})
    return terminal.OK


def policies(options: argparse.Namespace) -> int:
    """dmqfx policies."""
    from dmqfx import policies as shipped
    from dmqfx.policy.policy import Policy

    if options.name:
        policy = Policy.load(options.name)
        yaml = shipped.text(policy.name) if policy.name in shipped.names() else str(policy)
        terminal.say(options, yaml, {"name": policy.name, "yaml": yaml})
        return terminal.OK
    loaded = {name: Policy.load(name) for name in shipped.names()}
    listed = "\n".join(f"{name:<8} {policy.description}" for name, policy in loaded.items())
    terminal.say(options, listed, {name: policy.description for name, policy in loaded.items()})
    return terminal.OK


def env(options: argparse.Namespace) -> int:
    """dmqfx env."""
    import torch

    found: dict[str, object] = {
        "processor": processor(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **kernels(),
        "cuda": torch.version.cuda or "none",
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
    }
    terminal.say(options, "\n".join(f"{name:<16} {value}" for name, value in found.items()), found)
    return terminal.OK


def kernels() -> dict[str, object]:
    """The library of native kernels and what it runs on, or why there is none."""
    from dmqfx.runtime.kernels.native import absent, library

    found = library()
    if found is None:
        return {"kernels": f"none: {absent()}"}
    threads = "OpenMP" if found.has_threads else "one thread: its compiler had no OpenMP"
    others = f" (of {', '.join(found.instruction_sets)})"
    return {
        "kernels": f"{found.chosen}{others}, {threads}",
        "kernel library": str(found.file),
        "layer costs": costs(),
    }


def costs() -> str:
    """What `dmqfx bench` found with this number of threads, in words."""
    from dmqfx.runtime.costs import Costs, file

    known = Costs.here().found.values()
    slow = sum(cost.native_loses for cost in known)
    if not known:
        return "none measured: layers are native, and so is attention over few keys (dmqfx bench)"
    return f"{len(known)} kinds of layers and attention, {slow} of them slower by native kernels: {file()}"


def version_of(package: str) -> str:
    """The version that is installed, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _page(name: str, step: type[Pass]) -> str:
    about = _facts(step)
    options = about.pop("options")
    lines = [name, "", python.getdoc(step) or "", ""]
    lines += [
        f"{key:<10} {', '.join(value) if isinstance(value, list) else value}" for key, value in about.items()
    ]
    if isinstance(options, dict) and options:
        lines += ["", "options:", *(f"  {key}: {value}" for key, value in options.items())]
    return "\n".join(line.rstrip() for line in lines)


def _facts(step: type[Pass]) -> dict[str, object]:
    facts = {key: sorted(map(str, getattr(step, key))) for key in ("requires", "provides", "clears")}
    kinds = typing.get_type_hints(step)
    return {
        "preserves": step.preserves.value,
        **facts,
        "options": {field.name: _option(field, kinds[field.name]) for field in dataclasses.fields(step)},
        "from": step.__module__,
    }


def _option(field: dataclasses.Field[object], hint: object) -> str:
    """Its type, with the words that are legal where it is one of some, and its default."""
    kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    if field.default is not dataclasses.MISSING:
        return f"{kind} = {field.default!r}"
    return kind if field.default_factory is dataclasses.MISSING else f"{kind} = {field.default_factory()!r}"


def _sentence(step: type[Pass]) -> str:
    return (python.getdoc(step) or "").partition("\n")[0]
