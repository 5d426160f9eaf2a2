"""Non-finite numbers stop training; nothing is repaired, and the error says where they arose."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class NonFiniteError(ValueError):
    """A cost, loss or gradient is NaN or infinite."""


def check_terms(terms: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError naming the first bad term of the loss and its decoder layer (one copy to the host)."""
    values = torch.stack([value.detach() for value in terms.values()])
    finite = values.isfinite().tolist()
    if all(finite):
        return
    name = next(name for name, good in zip(terms, finite, strict=True) if not good)
    term, _, layer = name.partition("/")
    where = f"the {term} term of decoder layer {layer}" if layer else "the sum of the terms"
    raise NonFiniteError(f"the loss is not finite: {where} is {terms[name].item()}")


def check_gradient(norm: Tensor, model: nn.Module) -> None:
    """Raise NonFiniteError naming the first parameter with a bad gradient, if the gradient's norm is not finite."""
    if torch.isfinite(norm):
        return
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            raise NonFiniteError(f"the gradient of {name} is not finite, though the loss is")
    raise NonFiniteError(f"the norm of the gradient is {norm.item()}: it overflows")
