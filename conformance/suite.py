"""Everything there is to check: the properties of all operations."""

from __future__ import annotations

from smca.conformance import (
    properties_attention,
    properties_distance,
    properties_dropout,
    properties_gradients,
    properties_loss,
    properties_matching,
    properties_model,
    properties_multi_scale,
    properties_symmetry,
)
from smca.conformance.property import Property

PROPERTIES: list[Property] = [
    *properties_attention.PROPERTIES,
    *properties_symmetry.PROPERTIES,
    *properties_distance.PROPERTIES,
    *properties_dropout.PROPERTIES,
    *properties_gradients.PROPERTIES,
    *properties_multi_scale.PROPERTIES,
    *properties_matching.PROPERTIES,
    *properties_loss.PROPERTIES,
    *properties_model.PROPERTIES,
]
