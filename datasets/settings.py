"""The check that every configuration applies to its values."""

from __future__ import annotations


def require(holds: bool, name: str, expected: str, got: object) -> None:
    """Unless `holds`, raise a ValueError that says what the setting `name` must be and what it was."""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got!r}")
