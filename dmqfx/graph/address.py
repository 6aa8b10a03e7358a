"""Names that live as long as the operation: one string in policies, logs, diffs, pictures and files."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_ADDRESS = re.compile(r"^(?P<path>[^/~#:]*)/(?P<op>[^/~#:]+)(?:#(?P<call>\d+))?(?:~(?P<made_by>[^/~#:]+))?$")


@dataclass(frozen=True, order=True)
class Address:
    """Where an operation stands: `path/op`, `path/op#k` for the k-th further call, `path/op~step.n` if a pass made it.

    Example:
        >>> str(Address("conv_in", "conv2d"))
        'conv_in/conv2d'
        >>> Address.parse("mid_block/add#2~apply-scaling.1").call
        2
    """

    path: str
    op: str
    call: int = 0
    made_by: str = ""

    def __str__(self) -> str:
        call = f"#{self.call}" if self.call else ""
        made_by = f"~{self.made_by}" if self.made_by else ""
        return f"{self.path}/{self.op}{call}{made_by}"

    @property
    def names(self) -> tuple[str, ...]:
        """What a pattern may match: the address itself and, if a pass made this of an operation, that operation's.

        Example:
            >>> Address.parse("conv/conv2d~split-skips.1").names
            ('conv/conv2d~split-skips.1', 'conv/conv2d')
        """
        return (str(self), str(replace(self, made_by=""))) if self.made_by else (str(self),)

    @staticmethod
    def parse(text: str) -> Address:
        """Inverse of str().

        Raises: ValueError if the text is not an address.
        """
        match = _ADDRESS.match(text)
        if match is None:
            raise ValueError(f"{text!r} is not an address such as 'conv_in/conv2d' or 'mid_block/add#1'")
        return Address(match["path"], match["op"], int(match["call"] or 0), match["made_by"] or "")


@dataclass(frozen=True, order=True)
class Site:
    """One tensor of one operation, by schema name: `conv_in/conv2d:weight`.

    Example:
        >>> str(Site.parse("conv_in/conv2d:weight"))
        'conv_in/conv2d:weight'
    """

    at: Address
    arg: str

    def __str__(self) -> str:
        return f"{self.at}:{self.arg}"

    @staticmethod
    def parse(text: str) -> Site:
        """Inverse of str().

        Raises: ValueError if the text is not a site.
        """
        address, colon, arg = text.rpartition(":")
        if not colon or not arg:
            raise ValueError(f"{text!r} is not a site such as 'conv_in/conv2d:weight'")
        return Site(Address.parse(address), arg)
