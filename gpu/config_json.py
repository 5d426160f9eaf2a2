"""A configuration from JSON text, which may come from anywhere: every value is held to the type that its field declares."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from smca.datasets.settings import shortened, shown

T = TypeVar("T")

_LARGEST_WHOLE = 2**53
"""Whole numbers beyond it are not exact as floats, and mean nothing in a configuration."""
_REMEDY = "correct it, or take the file from the run or the copy that it came from"


def cut(text: object, length: int = 80) -> str:
    """A text, name or error for a message: on one line, printable, of at most `length` characters."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return shortened(line, length)


def read_json(kind: type[T], text: str, source: str) -> T:
    """Build a dataclass from the JSON text of its fields; fields that are not named take their defaults.

    Args:
        kind: a dataclass whose fields are declared as int, float, str, bool, Literal, X | None, tuple, X | tuple, Mapping or a
            dataclass.
        text: a JSON object.
        source: name of the file, with which every error begins.

    Raises:
        ValueError: not JSON, keys that are not fields, values of another type, or what the dataclass itself refuses.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON, got {cut(text)} ({cut(error)}): {_REMEDY}") from error
    try:
        return cast(T, _dataclass(kind, values, source, ""))
    except RecursionError as error:
        raise ValueError(f"{source}: expected values that are hardly nested, got {cut(text)}: {_REMEDY}") from error


def _dataclass(kind: Any, value: Any, source: str, where: str) -> Any:
    if not isinstance(value, dict):
        raise _unfit(source, where or "the file", "an object {…}", value)
    known, hints = [f.name for f in dataclasses.fields(kind)], get_type_hints(kind)
    if unknown := sorted(value.keys() - set(known)):
        nearest = difflib.get_close_matches(unknown[0][:80], known, 1)
        raise ValueError(
            f"{source}: {where + ' has ' if where else ''}unknown keys {shown(unknown)}"
            + (f"; the nearest that there is: {nearest[0]!r}" if nearest else "")
            + ". Was it written by another version of smca-detr? Correct or remove them"
        )
    fields = {k: _value(hints[k], v, source, f"{where}.{k}" if where else k) for k, v in value.items()}
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {cut(error, 300)}: {_REMEDY}") from error


def _value(kind: Any, value: Any, source: str, where: str) -> Any:
    """`value` as a field declared as `kind` holds it."""
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, source, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        lists = [a for a in kinds if get_origin(a) is tuple]
        return _value(lists[0] if lists and isinstance(value, list) else kinds[0], value, source, where)
    if origin is tuple:
        endless = args[-1] is Ellipsis
        if not isinstance(value, list) or not (endless or len(value) == len(args)):
            raise _unfit(source, where, "a list" if endless else f"a list of {len(args)} values", value)
        return tuple(_value(args[0 if endless else i], v, source, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal and value in args and isinstance(value, str):
        return value
    if origin is Mapping and isinstance(value, dict):
        _check_plain(value, source, where)
        return value
    if kind is float and _is_number(value):
        return float(value)
    if kind is int and _is_number(value) and isinstance(value, int):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str) and _is_text(value):
        return value
    raise _unfit(source, where, _expected(kind), value)


def _check_plain(value: Any, source: str, where: str) -> None:
    """Values of a free mapping: text and finite numbers, however nested."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        name = cut(f"{where}.{key}" if isinstance(value, dict) else f"{where}[{key}]")
        if isinstance(item, dict | list):
            _check_plain(item, source, name)
        elif not (item is None or isinstance(item, bool) or _is_number(item) or _is_text(item)):
            raise _unfit(source, name, "text, a finite number, true, false or null", item)


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_WHOLE
    return whole or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    """Half a surrogate pair, which JSON can hold, cannot be printed."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is Mapping:
        return "an object {…}"
    names = {int: "a whole number of at most 2^53", float: "a finite number", bool: "true or false"}
    return names.get(kind, "text")


def _unfit(source: str, where: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{source}: {where} must be {expected}, got {shown(value)}: {_REMEDY}")
