"""Matching and the set loss."""

from smca.gpu.loss.criterion import SetCriterion
from smca.gpu.loss.matcher import NonFiniteError, match

__all__ = ["NonFiniteError", "SetCriterion", "match"]
