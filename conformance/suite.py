"""All properties of all operations."""

from __future__ import annotations

from smca.conformance.properties import (
    anchored,
    attention,
    distance,
    dropout,
    gradients,
    loss,
    matching,
    model,
    multi_scale,
    softmax,
    symmetry,
    training,
    training_alone,
)
from smca.conformance.property import Property

PROPERTIES: list[Property] = [
    *attention.PROPERTIES,
    *symmetry.PROPERTIES,
    *distance.PROPERTIES,
    *dropout.PROPERTIES,
    *gradients.PROPERTIES,
    *multi_scale.PROPERTIES,
    *matching.PROPERTIES,
    *loss.PROPERTIES,
    *model.PROPERTIES,
    *anchored.PROPERTIES,
    *softmax.PROPERTIES,
    *training.PROPERTIES,
    *training_alone.PROPERTIES,
]
