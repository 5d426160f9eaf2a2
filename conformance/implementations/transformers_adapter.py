"""Other people's code under the suite: the matchers, GIoU and losses of Hugging Face transformers.

    smca conformance --implementation smca.conformance.implementations.transformers_adapter:DeformableDetr
    smca conformance --implementation smca.conformance.implementations.transformers_adapter:Detr

DETR scores classes by a softmax with one more column, for "no object", and its loss is a weighted cross-entropy;
Deformable DETR uses the focal loss that SMCA uses too. docs/conformance.md lists
what differs from docs/method.md, and why. This file is also an example: it holds everything that an adapter needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.loss import loss_deformable_detr, loss_for_object_detection

Array = npt.NDArray[Any]
DEFORMABLE: Any = loss_deformable_detr
PLAIN: Any = loss_for_object_detection


class DeformableDetr:
    """Matcher and loss of `transformers`' Deformable DETR: sigmoid and focal loss, as in SMCA."""

    name = "transformers-deformable-detr"
    dtypes = ("float64", "float32")
    module = DEFORMABLE

    def matcher(self, weights: Mapping[str, float]) -> Any:
        return DEFORMABLE.DeformableDetrHungarianMatcher(weights["class"], weights["l1"], weights["giou"])

    def loss(self, classes: int, weights: Mapping[str, float]) -> Any:
        return DEFORMABLE.DeformableDetrImageLoss(self.matcher(weights), classes, 0.25, ["labels", "boxes"])

    def columns(self, logits: Tensor) -> Tensor:
        """The logits as this loss wants them."""
        return logits

    def generalized_box_iou(self, boxes1: Array, boxes2: Array, *, dtype: str) -> Array:
        one, two = (torch.tensor(boxes, dtype=getattr(torch, dtype)) for boxes in (boxes1, boxes2))
        return PLAIN.generalized_box_iou(one, two).double().numpy()  # type: ignore[no-any-return]

    def match_cost(
        self,
        logits: Array,
        boxes: Array,
        labels: Array,
        target_boxes: Array,
        weights: Mapping[str, float],
        *,
        dtype: str,
    ) -> Array:
        """The matcher does not return its costs: they are read where it passes them to SciPy."""
        kind = getattr(torch, dtype)
        outputs = {
            "logits": self.columns(torch.tensor(logits, dtype=kind)[None]),
            "pred_boxes": torch.tensor(boxes, dtype=kind)[None],
        }
        target = {"class_labels": torch.tensor(labels), "boxes": torch.tensor(target_boxes, dtype=kind)}
        seen: list[Any] = []

        def watch(cost: Any) -> tuple[Array, Array]:
            seen.append(np.asarray(cost, dtype=np.float64))
            return np.zeros(0, dtype=int), np.zeros(0, dtype=int)

        with mock.patch.object(self.module, "linear_sum_assignment", watch):
            self.matcher(weights)(outputs, [target])
        return np.asarray(seen[0])

    def set_loss(
        self, logits: Array, boxes: Array, targets: Any, weights: Mapping[str, float], *, dtype: str
    ) -> dict[str, float]:
        terms, _ = self._terms(logits, boxes, targets, weights, dtype)
        return {name: float(value.detach()) for name, value in terms.items()}

    def set_loss_vjp(
        self, logits: Array, boxes: Array, targets: Any, weights: Mapping[str, float], *, dtype: str
    ) -> tuple[Array, Array]:
        terms, leaves = self._terms(logits, boxes, targets, weights, dtype)
        dlogits, dboxes = torch.autograd.grad(terms["loss"], leaves, allow_unused=True)
        return dlogits.double().numpy(), (torch.zeros_like(leaves[1]) if dboxes is None else dboxes).double().numpy()

    def _terms(
        self, logits: Array, boxes: Array, targets: Any, weights: Mapping[str, float], dtype: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        kind = getattr(torch, dtype)
        leaves = (
            torch.tensor(logits, dtype=kind, requires_grad=True),
            torch.tensor(boxes, dtype=kind, requires_grad=True),
        )
        layers = [{"logits": self.columns(scores), "pred_boxes": boxes} for scores, boxes in zip(*leaves, strict=True)]
        wanted = [
            {
                "class_labels": torch.tensor(targets.labels[b, valid]),
                "boxes": torch.tensor(targets.boxes[b, valid], dtype=kind),
            }
            for b, valid in enumerate(targets.valid)
        ]
        loss = self.loss(logits.shape[-1], weights).to(kind)
        loss_terms = loss({**layers[-1], "auxiliary_outputs": layers[:-1]}, wanted)
        term_names, last = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}, len(layers) - 1
        terms = {
            f"{name}/{m}": weights[name] * loss_terms[term_names[name] + ("" if m == last else f"_{m}")]
            for m in range(len(layers))
            for name in term_names
        }
        return {**terms, "loss": torch.stack([value.reshape(()) for value in terms.values()]).sum()}, leaves


class Detr(DeformableDetr):
    """Matcher and loss of `transformers`' DETR; a logit of 0 is added for "no object"."""

    name = "transformers-detr"
    module = PLAIN

    def matcher(self, weights: Mapping[str, float]) -> Any:
        return PLAIN.HungarianMatcher(weights["class"], weights["l1"], weights["giou"])

    def loss(self, classes: int, weights: Mapping[str, float]) -> Any:
        return PLAIN.ImageLoss(self.matcher(weights), classes, 0.1, ["labels", "boxes"])

    def columns(self, logits: Tensor) -> Tensor:
        return torch.cat([logits, logits.new_zeros(*logits.shape[:-1], 1)], dim=-1)

    def softmax_set_loss(
        self, z: Array, boxes: Array, targets: Any, weights: Mapping[str, float], *, dtype: str
    ) -> dict[str, float]:
        return _Softmax().set_loss(z, boxes, targets, weights, dtype=dtype)

    def softmax_set_loss_vjp(
        self, z: Array, boxes: Array, targets: Any, weights: Mapping[str, float], *, dtype: str
    ) -> tuple[Array, Array]:
        return _Softmax().set_loss_vjp(z, boxes, targets, weights, dtype=dtype)


class _Softmax(Detr):
    """The same, where the column for "no object" is given."""

    def loss(self, classes: int, weights: Mapping[str, float]) -> Any:
        return super().loss(classes - 1, weights)

    def columns(self, logits: Tensor) -> Tensor:
        return logits
