"""Matching and the losses."""

from smca.gpu.loss.criterion import SetCriterion, further_losses
from smca.gpu.loss.matcher import NonFiniteError, match

__all__ = ["NonFiniteError", "SetCriterion", "further_losses", "match"]
