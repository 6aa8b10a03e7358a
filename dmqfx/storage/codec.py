"""Values as JSON and back, explicitly: what a reader cannot tell from JSON alone carries a tag.

A tagged value is an object with one key: {"dtype": "float32"}, {"float": "inf"}, {"QuantSpec": {...}}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Final, TypeAlias

import torch

from dmqfx.errors import StoreError
from dmqfx.graph.address import Address, Site
from dmqfx.graph.inputs import Input, InputSpec
from dmqfx.graph.journal import Application, PassRecord, Refusal
from dmqfx.graph.table import (
    Bias,
    ChannelScale,
    Codes,
    LayerPair,
    Planned,
    Range,
    Sensitivity,
    Shift,
    SkipArm,
    SkipConcat,
)
from dmqfx.numbers.quant import QParams, QuantSpec

__all__ = ["Json", "Read", "Tag", "decode", "dump", "encode", "parse"]

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
Tag: TypeAlias = Callable[[object], "Json"]
"""Encodes a value that this module does not know (a node, a tensor); None if it does not know it either."""
Read: TypeAlias = Callable[[str, Json], object]
"""The value behind a tag that this module does not know and its content."""

RECORDS: Final[Mapping[str, type]] = {
    cls.__name__: cls
    for cls in (
        Input, InputSpec, QuantSpec, QParams, Planned, Range, SkipConcat, SkipArm, LayerPair, ChannelScale,
        Shift, Bias, Sensitivity, Codes, Application, Refusal, PassRecord,
    )
}  # fmt: skip
_WORDS: Final[Mapping[str, type]] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
_PARSED: Final[Mapping[str, Callable[[str], object]]] = {
    "float": float,
    "site": Site.parse,
    "address": Address.parse,
    "device": torch.device,
}


def encode(value: object, tag: Tag = lambda value: None) -> Json:
    """A value as JSON; `tag` says how the caller's own kinds of values are written.

    Raises: StoreError for a value of any other kind.
    Example:
        >>> encode((1, 1.0, torch.float16, [None, float("inf")]))
        {'tuple': [1, 1.0, {'dtype': 'float16'}, [None, {'float': 'inf'}]]}
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list):
        return [encode(each, tag) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(each, tag) for each in value]}
    if isinstance(value, slice):
        return {"slice": [encode(each, tag) for each in (value.start, value.stop, value.step)]}
    if isinstance(value, (Site, Address)):
        return {type(value).__name__.lower(): str(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for word, cls in _WORDS.items():
        if isinstance(value, cls):
            return {word: str(value).removeprefix("torch.")}
    if RECORDS.get(type(value).__name__) is type(value):
        record = {f.name: encode(getattr(value, f.name), tag) for f in fields(value)}  # type: ignore[arg-type]  # RECORDS holds dataclasses
        return {type(value).__name__: record}
    if isinstance(value, Mapping):
        return {"map": [[encode(k, tag), encode(v, tag)] for k, v in value.items()]}
    if (known := tag(value)) is not None:
        return known
    raise StoreError(f"a {type(value).__name__} cannot be stored: {value!r:.200}")


def decode(value: Json, read: Read | None = None) -> object:
    """Inverse of `encode`.

    Raises: StoreError for JSON that `encode` does not write.
    """
    if isinstance(value, list):
        return [decode(each, read) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise StoreError(f"not a tagged value: {json.dumps(value):.200}")
    (word, content), *_ = value.items()
    try:
        return _tagged(word, content, read)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StoreError(f"not a {word}: {json.dumps(content):.200} ({error})") from error


def _tagged(word: str, content: Json, read: Read | None) -> object:
    if word in _PARSED and isinstance(content, str):
        return _PARSED[word](content)
    if word in _WORDS and isinstance(content, str):
        found = getattr(torch, content, None)
        if isinstance(found, _WORDS[word]):
            return found
        raise ValueError("this torch does not know it")
    if word in ("tuple", "slice", "map") and isinstance(content, list):
        items = [decode(each, read) for each in content]
        return _collection(word, items)
    if word in RECORDS and isinstance(content, dict):
        return RECORDS[word](**{key: decode(each, read) for key, each in content.items()})
    if read is None:
        raise ValueError("unknown tag")
    return read(word, content)


def _collection(word: str, items: list[object]) -> object:
    if word == "tuple":
        return tuple(items)
    if word == "slice":
        start, stop, step = items
        return slice(start, stop, step)
    return dict(item for item in items if isinstance(item, list))


def dump(document: Mapping[str, Json]) -> str:
    """The one text of a JSON object: keys in order, each item of a top-level list on a line of its own."""
    parts = (f"{_compact(key)}: {_lines(value)}" for key, value in sorted(document.items()))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def parse(text: str | bytes, file: str) -> dict[str, Json]:
    """A JSON object from text.

    Raises: StoreError naming the file.
    """
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise StoreError(f"{file} does not hold a JSON object")
    return document


def _refuse_constant(word: str) -> object:
    raise ValueError(f"{word} is not JSON")


def _lines(value: Json) -> str:
    if not isinstance(value, list) or not value:
        return _compact(value)
    return "[\n" + ",\n".join(map(_compact, value)) + "\n]"


def _compact(value: Json) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)
