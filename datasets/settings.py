"""The check that every configuration applies to its values, and how messages show what came."""

from __future__ import annotations


def require(holds: bool, name: str, expected: str, got: object) -> None:
    """Unless `holds`, raise a ValueError that says what the setting `name` must be and what it was."""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {shown(got)}")


def shown(value: object) -> str:
    """`value` as Python writes it, short enough for a message."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits; a list nested a thousand deep
        return f"a {type(value).__name__} too large to show"


def shortened(text: str, length: int = 80) -> str:
    """The first `length` characters of `text`."""
    return text if len(text) <= length else text[: length - 1] + "…"
