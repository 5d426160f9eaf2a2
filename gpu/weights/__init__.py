"""Trained models to start from, of this project and of others: read, renamed, and fitted into a model part by part."""

from smca.gpu.weights.fit import Plan, plan_start
from smca.gpu.weights.opening import open_source
from smca.gpu.weights.source import PARTS, Part, Source

__all__ = ["PARTS", "Part", "Plan", "Source", "open_source", "plan_start"]
