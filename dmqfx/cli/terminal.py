"""What all commands share: one parser each, results as text or JSON, errors as words and exit codes."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

OK, FAILED, WRONG_USE, MISSED, REFUTED, INTERRUPTED = 0, 1, 2, 3, 4, 130
TARGETS = ("auto", "simulate", "reference", "cpu")
EXIT_CODES: Final = MappingProxyType(
    {
        OK: "done",
        FAILED: "an error, said on standard error",
        WRONG_USE: "the command line is wrong",
        MISSED: "a quality gate was missed (--min-sqnr, --min-psnr, --min-ssim, a policy's `expect`); results are kept",
        REFUTED: "verification found a wrong pass, or a saved model that is damaged or of a newer format",
        INTERRUPTED: "interrupted",
    }
)
Commands = argparse._SubParsersAction  # argparse gives this type no public name
Run = Callable[[argparse.Namespace], int]
Examples = Sequence[tuple[str, str]]


class Layout(argparse.RawDescriptionHelpFormatter):
    """Help with room for long option names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def command(
    commands: Commands[argparse.ArgumentParser], name: str, run: Run, about: str, examples: Examples
) -> argparse.ArgumentParser:
    """A command, with the options that all have; examples are (command line, what it does)."""
    parser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=listed(examples),
        formatter_class=Layout,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="only warnings and errors on standard error")
    volume.add_argument("--verbose", action="store_true", help="everything that is logged")
    return parser


def listed(examples: Examples) -> str:
    """Examples as they stand below the help of a command."""
    width = max(len(line) for line, _ in examples)
    return "\n".join(["examples:", *(f"  {line:<{width}}  {what}".rstrip() for line, what in examples)])


def complain(run: Run, options: argparse.Namespace) -> int:
    """Run a command; what goes wrong becomes one message on standard error and an exit code."""
    from dmqfx.errors import DmqfxError, PolicyError, VerifyError

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _shown_by(warnings.showwarning if options.verbose else None)
            code = run(options)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # `dmqfx show ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except VerifyError as error:
        return _said(str(error), REFUTED)
    except PolicyError as error:
        return _said("\n".join(str(p) if p.line else p.message for p in error.problems), FAILED)
    except DmqfxError as error:
        return _said(str(error), FAILED)
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _said(where, FAILED)
    except KeyboardInterrupt:
        return _said("interrupted", INTERRUPTED)


def say(options: argparse.Namespace, text: str, data: Mapping[str, object] | Sequence[object]) -> None:
    """The result of a command on standard output: words, or JSON with --json."""
    if options.json:
        sys.stdout.write(as_json(data))
    else:
        sys.stdout.write(text.rstrip("\n") + "\n")


def as_json(data: Mapping[str, object] | Sequence[object]) -> str:
    """A result as JSON text; numbers that are not finite are words."""
    return json.dumps(_plain(data), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def gate(misses: Sequence[str]) -> int:
    """The exit code of a quality gate; what was missed goes to standard error."""
    for miss in misses:
        sys.stderr.write(f"dmqfx: gate missed: {miss}\n")
    return MISSED if misses else OK


def bars() -> bool:
    """Whether somebody watches, so that progress bars make sense."""
    return sys.stderr.isatty()


def add_model(parser: argparse.ArgumentParser, name: str = "model", *, compiled: bool = True) -> None:
    """The MODEL argument; `compiled` says that a saved compiled model makes sense too."""
    saved = "saved dmqfx folder, " if compiled else ""
    about = f"diffusers folder, {saved}hub id, or `emoji`"
    parser.add_argument(name, metavar=name.upper(), help=about)


def add_glob(parser: argparse.ArgumentParser) -> None:
    """--at."""
    about = "addresses: * stays inside one name, ** crosses names, re: starts a regular expression [**]"
    parser.add_argument("--at", type=_glob, metavar="GLOB", default="**", help=about)


def add_target(parser: argparse.ArgumentParser) -> None:
    """--target of commands that look."""
    about = "of a compiled model: what its layers run as on this machine, and why [as it is saved]"
    parser.add_argument("--target", choices=TARGETS, help=about)


def add_policy(parser: argparse.ArgumentParser) -> None:
    """--policy and --set."""
    parser.add_argument(
        "--policy", default="w4a8-quick", help="shipped name (see `dmqfx policies`) or YAML file [w4a8-quick]"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="A.B=C",
        action="append",
        default=[],
        help="change one setting, e.g. default.weight.bits=3, rules.ends.input.bits=8; may be repeated",
    )


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number of at least this, and of less than 2^62."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        if number >= 2**62:  # seeds are added to, and generators take 64 bits
            raise argparse.ArgumentTypeError(f"must be less than 2^62, not {text}")
        return number

    return read


def number(text: str) -> float:
    """The type of an option that takes a number, which may be infinite."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if math.isnan(found):
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}")
    return found


def finite(text: str) -> float:
    """The type of an option that takes a finite number."""
    if not math.isfinite(found := number(text)):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text!r}")
    return found


def seconds(text: str) -> float:
    """The type of an option that takes a time, in seconds."""
    from dmqfx.sweep.budget import seconds_of

    try:
        return seconds_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> int:
    """The type of an option that takes a size, in bytes."""
    from dmqfx.sweep.budget import bytes_of

    try:
        return bytes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _glob(text: str) -> str:
    """The type of --at: a pattern that is legal, whatever it fits."""
    from dmqfx.globs import problem_with_glob

    if problem := problem_with_glob(text):
        raise argparse.ArgumentTypeError(problem)
    return text


def _said(message: str, code: int) -> int:
    sys.stderr.write(f"dmqfx: {message}\n")
    return code


def _plain(value: object) -> object:
    """The same in what JSON has: numbers that are not finite and everything unknown become words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _shown_by(others: Callable[..., None] | None) -> Callable[..., None]:
    """Our own warnings as one line; those of other packages as they were, or not at all."""

    def show(message: Warning | str, category: type[Warning], *rest: object, **named: object) -> None:
        if category.__module__.startswith("dmqfx"):
            sys.stderr.write(f"dmqfx: {message}\n")
        elif others is not None:
            others(message, category, *rest, **named)

    return show
