"""What is held to the specification: ours, an example of yours, and transformers'."""

from smca.conformance.implementations.ours import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS"]
