"""Implementations held to the specification: ours, an example for yours, and those of transformers."""

from smca.conformance.implementations.registry import IMPLEMENTATIONS, implementation_of

__all__ = ["IMPLEMENTATIONS", "implementation_of"]
