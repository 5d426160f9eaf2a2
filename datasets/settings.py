"""The check that every configuration makes of its values."""

from __future__ import annotations


def require(holds: bool, name: str, expected: str, got: object) -> None:
    """Raise a ValueError that says what the setting `name` must be and what came, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got!r}")
