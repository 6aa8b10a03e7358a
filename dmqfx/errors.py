"""The one tree of errors. Each carries data, names a place and says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class DmqfxError(Exception):
    """Root of every error that dmqfx raises on purpose.

    Example:
        >>> issubclass(CaptureError, DmqfxError)
        True
    """


class CaptureError(DmqfxError):
    """A module cannot become a Program: names the address, the operator and what to do."""

    def __init__(self, reason: str, *, address: str = "", operator: str = "", mend: str = "") -> None:
        self.reason, self.address, self.operator, self.mend = reason, address, operator, mend
        where = f" at {address}" if address else ""
        what = f" ({operator})" if operator else ""
        super().__init__(f"cannot capture{where}{what}: {reason}" + (f"\n  mend: {mend}" if mend else ""))


class RewriteError(DmqfxError):
    """A pass left a broken program; names the pass and the address."""


class PipelineError(DmqfxError):
    """Passes in an order that cannot work, or a pass that broke its promise."""


class PassNotFoundError(DmqfxError):
    """A pass name or option that does not exist; names the nearest that does."""


class CalibrationError(DmqfxError):
    """Calibration data that is empty, does not fit the model or is not finite."""


class ProcessError(DmqfxError):
    """Another process of the same calibration failed or is gone; what it said itself is the reason."""


class VerifyError(DmqfxError):
    """A rewrite changed what it promised to keep: says which one, where, by how much, and how to see it again.

    Units: error and limit are relative L2 distances, unless `what` says otherwise; nan where there is no number.
    """

    def __init__(
        self,
        what: str,
        *,
        step: str,
        rule: str = "",
        address: str = "",
        error: float = float("nan"),
        limit: float = float("nan"),
        fuel: int | None = None,
        mend: str = "",
    ) -> None:
        self.what, self.step, self.rule, self.address = what, step, rule, address
        self.error, self.limit, self.fuel = error, limit, fuel
        where = f", rule {rule!r}" if rule else ""
        place = f" at {address}" if address else ""
        super().__init__(f"{step}{where}{place}: {what}" + (f"\n  {mend}" if mend else ""))


class StoreError(DmqfxError):
    """A saved model that is truncated, altered, newer than this version or not ours."""


class CallError(DmqfxError, TypeError):
    """A compiled UNet was called with inputs that it does not take."""


class NotAProgramError(DmqfxError, TypeError):
    """Something was to be looked at that is neither a Program nor a compiled UNet."""

    def __init__(self, view: str, given: object, instead: str) -> None:
        what = "None" if given is None else f"a {type(given).__name__}"
        super().__init__(f"{view} is for a Program or a compiled UNet, not {what}; pass {instead}")


class FixedGraphError(DmqfxError, AttributeError):
    """A compiled UNet was asked for something that only a model with layers can do."""

    def __init__(self, name: str, root: str, mend: str = "do it to the float model, then compile") -> None:
        super().__init__(f"a compiled {root} has no {name}: its graph is fixed\n  mend: {mend}")


@dataclass(frozen=True)
class Problem:
    """One mistake in a policy file.

    Units: line and column count from 1; 0 means that the policy did not come from a file.
    """

    message: str
    file: str = "<policy>"
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class PolicyError(DmqfxError):
    """Every mistake of a policy at once, each with file:line:column."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))
