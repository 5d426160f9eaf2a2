"""The detector."""

from smca.gpu.model.detections import DRAW_THRESHOLD, Detections, decode, draw_thresholds
from smca.gpu.model.detector import SMCADETR

__all__ = ["DRAW_THRESHOLD", "SMCADETR", "Detections", "decode", "draw_thresholds"]
