"""Matching and the losses."""

from smca.gpu.loss.count import boxes_per_process
from smca.gpu.loss.criterion import SetCriterion, further_losses
from smca.gpu.loss.matcher import NonFiniteError, match

__all__ = ["NonFiniteError", "SetCriterion", "boxes_per_process", "further_losses", "match"]
