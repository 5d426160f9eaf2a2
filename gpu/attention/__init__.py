"""SMCA attention, with the ways to compute it side by side."""

from smca.gpu.attention.dispatch import BACKENDS, Level, multi_scale_smca_attention, smca_attention

__all__ = ["BACKENDS", "Level", "multi_scale_smca_attention", "smca_attention"]
