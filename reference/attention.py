"""Spatially modulated co-attention, the method itself: all of it under one name.

`gaussian` has the prior, (1) to (3); `attention_forward` the attention that it modulates, (4) to (6) and (13);
`attention_backward` the gradients, (7) to (12), (14) and (15).
"""

from smca.reference.attention_backward import multi_scale_smca_attention_vjp, smca_attention_vjp
from smca.reference.attention_forward import Level, multi_scale_smca_attention, smca_attention
from smca.reference.gaussian import gaussian_weight_map, precision_from_scale

__all__ = [
    "Level",
    "gaussian_weight_map",
    "multi_scale_smca_attention",
    "multi_scale_smca_attention_vjp",
    "precision_from_scale",
    "smca_attention",
    "smca_attention_vjp",
]
