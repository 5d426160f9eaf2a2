"""Detections of whole datasets, and their COCO metrics."""

from smca.gpu.evaluation.check import warnings_of
from smca.gpu.evaluation.coco import CocoMetrics, evaluate_detections
from smca.gpu.evaluation.data import evaluation_loader, open_split, pick_device
from smca.gpu.evaluation.detect import coco_results, detect
from smca.gpu.evaluation.diagnosis import why_ap_is_zero

__all__ = [
    "CocoMetrics",
    "coco_results",
    "detect",
    "evaluate_detections",
    "evaluation_loader",
    "open_split",
    "pick_device",
    "warnings_of",
    "why_ap_is_zero",
]
