"""Implementations held to the specification: ours, an example for yours, and those of transformers."""

from smca.conformance.implementations.ours import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS"]
