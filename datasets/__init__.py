"""smca.datasets: COCO-format data in, padded batches out; and built-in synthetic data. Knows no model."""

from smca.datasets.augmented import Augmented
from smca.datasets.batch import Batch, Category, DetectionDataset, Report, Sample, Targets, collate
from smca.datasets.coco import CocoDetection, require_same_categories
from smca.datasets.images import read_image
from smca.datasets.joined import Joined
from smca.datasets.layout import find_split
from smca.datasets.options import AnnotationOptions
from smca.datasets.synthetic import SyntheticShapes
from smca.datasets.transforms import Augmentation

__all__ = [
    "AnnotationOptions",
    "Augmentation",
    "Augmented",
    "Batch",
    "Category",
    "CocoDetection",
    "DetectionDataset",
    "Joined",
    "Report",
    "Sample",
    "SyntheticShapes",
    "Targets",
    "collate",
    "find_split",
    "read_image",
    "require_same_categories",
]
