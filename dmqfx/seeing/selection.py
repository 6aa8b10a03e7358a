"""Addresses that a person asked for, by glob or in full, and the nearest ones when there are none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from dmqfx.errors import DmqfxError
from dmqfx.globs import matcher
from dmqfx.graph.address import Address

__all__ = ["AddressError", "find", "select"]


class AddressError(DmqfxError, LookupError):
    """An address or glob that fits nothing in the program; names the nearest that do."""

    def __init__(self, asked: str, nearest: Sequence[str], reason: str = "") -> None:
        self.asked, self.nearest = asked, tuple(nearest)
        near = f"; nearest: {', '.join(nearest)}" if nearest else ""
        super().__init__(reason or f"{asked!r} fits no operation of this program{near}")


def select(addresses: Iterable[Address], at: str) -> frozenset[Address]:
    """The addresses that a glob (or `re:` expression) fits.

    Raises: AddressError if it fits none or is no legal glob.
    """
    known = list(addresses)
    try:
        fits = matcher(at)
    except ValueError as error:
        raise AddressError(at, (), str(error)) from error
    found = frozenset(address for address in known if fits(str(address)))
    if not found and (known or at != "**"):
        raise AddressError(at, _nearest(at.removeprefix("re:").replace("*", ""), known))
    return found


def find(addresses: Iterable[Address], text: str) -> Address:
    """The address that is written like this; a site such as `conv_in/conv2d:weight` means its operation.

    Raises: AddressError with the three nearest.
    """
    known = list(addresses)
    wanted = text.partition(":")[0]
    found = next((address for address in known if str(address) == wanted), None)
    if found is None:
        raise AddressError(text, _nearest(wanted, known))
    return found


def _nearest(text: str, known: Sequence[Address]) -> list[str]:
    words = list(dict.fromkeys(str(address) for address in known if not address.made_by))
    return difflib.get_close_matches(text, words, n=3, cutoff=0.0)
