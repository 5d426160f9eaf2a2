"""The detector."""

from smca.gpu.model.detections import Detections, decode
from smca.gpu.model.detector import SMCADETR

__all__ = ["SMCADETR", "Detections", "decode"]
