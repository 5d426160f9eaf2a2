"""Checks one example again, by the snippet that a failure prints:

from smca.conformance.replay import *
replay("smca_attention.equals_the_oracle", "eager", "float32", AttentionInputs(size=(2, 3), seed=7))
"""

from __future__ import annotations

from typing import Any

from smca.conformance.implementations.registry import implementation_of
from smca.conformance.inputs.anchored import AnchoredInputs
from smca.conformance.inputs.attention import AttentionInputs, LevelsInputs
from smca.conformance.inputs.distance import DistantInputs, DropoutInputs, ManyInputs
from smca.conformance.inputs.matching import BoxInputs, CostInputs, LossInputs
from smca.conformance.inputs.model import ModelInputs
from smca.conformance.inputs.softmax import OddsInputs, SoftmaxLossInputs
from smca.conformance.inputs.training import TrainingInputs
from smca.conformance.property import Judge
from smca.conformance.protocol import address_of, name_of
from smca.conformance.runner import checked
from smca.conformance.suite import PROPERTIES

__all__ = [
    "AnchoredInputs",
    "AttentionInputs",
    "BoxInputs",
    "CostInputs",
    "DistantInputs",
    "DropoutInputs",
    "LevelsInputs",
    "LossInputs",
    "ManyInputs",
    "ModelInputs",
    "OddsInputs",
    "SoftmaxLossInputs",
    "TrainingInputs",
    "replay",
]


def replay(property_name: str, implementation: Any, dtype: str, recipe: Any) -> Judge:
    """Check one property of one implementation on one example.

    Args:
        property_name: as printed, "smca_attention.equals_the_oracle".
        implementation: one of ours by name, "package.module:Class", or the object itself.
        dtype: one of the implementation's.
        recipe: as printed; `recipe.arrays(dtype)` gives its arrays.

    Returns:
        The judge of the comparison; its `worst` holds the largest error as a multiple of the bound.

    Raises:
        Mismatch: the property does not hold.
        ValueError: no property or implementation of that name.
    """
    matching = [prop for prop in PROPERTIES if prop.name == property_name]
    if not matching:
        raise ValueError(f"no property {property_name!r}: choose one of {', '.join(prop.name for prop in PROPERTIES)}")
    made = implementation_of(implementation) if isinstance(implementation, str) else implementation
    judge = Judge(matching[0], name_of(made), dtype, recipe, address=address_of(made))
    checked(judge, made, recipe)
    return judge
