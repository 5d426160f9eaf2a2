"""Our own matching, losses and assignments, by backend, behind the protocol of the suite."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from smca.conformance.implementations.pytorch import numpy_of
from smca.conformance.protocol import Unavailable
from smca.conformance.tolerances import HALVES, at_least_float32
from smca.datasets import Targets
from smca.gpu.config import LossConfig
from smca.gpu.loss import assignment, boxes, criterion, matcher
from smca.gpu.model import denoising, layers

Array = npt.NDArray[Any]


class Criterion:
    """`smca.gpu.loss.matcher` and `smca.gpu.loss.criterion` with one of the matcher's backends."""

    dtypes: tuple[str, ...] = ("float64", "float32")
    boxes: Any = boxes
    matcher: Any = matcher
    criterion: Any = criterion
    denoising: Any = denoising

    def __init__(self, backend: str, device: str) -> None:
        if device != "cpu" and not torch.cuda.is_available():
            raise Unavailable("PyTorch finds no CUDA device")
        missing = assignment.available(device) if backend == "cupy" else None
        if missing is not None:
            raise Unavailable(missing)
        self.name = f"criterion-{backend}"
        self.backend, self.device = backend, device
        if backend == "cupy":
            self.dtypes = ("float32",)  # of the kernel's costs; with others "auto" takes scipy

    def _tensor(self, values: Any, dtype: str, grad: bool = False) -> Tensor:
        return torch.tensor(values, dtype=getattr(torch, dtype), device=self.device, requires_grad=grad)

    def _targets(self, labels: Array, target_boxes: Array, valid: Array, dtype: str) -> Targets:
        return Targets(self._tensor(labels, "int64"), self._tensor(target_boxes, dtype), self._tensor(valid, "bool"))

    def match_cost(
        self, logits: Array, boxes: Array, labels: Array, target_boxes: Array, weights: Any, *, dtype: str
    ) -> Array:
        return self._cost(logits, boxes, labels, target_boxes, weights, "focal", dtype)

    def softmax_match_cost(
        self, logits: Array, boxes: Array, labels: Array, target_boxes: Array, weights: Any, *, dtype: str
    ) -> Array:
        return self._cost(logits, boxes, labels, target_boxes, weights, "softmax", dtype)

    def _cost(self, logits: Any, boxes: Any, labels: Any, truth: Any, weights: Any, loss: str, dtype: str) -> Array:
        targets = self._targets(labels[None], truth[None], np.ones((1, len(labels)), dtype=bool), dtype)
        outputs = self._tensor(logits, dtype)[None, None], self._tensor(boxes, dtype)[None, None]
        return numpy_of(self.matcher.match_costs(*outputs, targets, weights, loss)[0, 0])

    def generalized_box_iou(self, boxes1: Array, boxes2: Array, *, dtype: str) -> Array:
        one, two = self._tensor(boxes1, dtype), self._tensor(boxes2, dtype)
        return numpy_of(self.boxes.generalized_box_iou(one[:, None], two[None]))

    def set_loss(self, logits: Array, boxes: Array, targets: Any, weights: Any, *, dtype: str) -> dict[str, Array]:
        return self.training_loss({"logits": logits, "boxes": boxes}, targets, weights, "focal", dtype=dtype)

    def set_loss_vjp(
        self, logits: Array, boxes: Array, targets: Any, weights: Any, *, dtype: str
    ) -> tuple[Array, Array]:
        outputs = {"logits": logits, "boxes": boxes}
        gradients = self.training_loss_vjp(outputs, targets, weights, "focal", dtype=dtype)
        return gradients["logits"], gradients["boxes"]

    def softmax_set_loss(self, z: Array, boxes: Array, targets: Any, weights: Any, *, dtype: str) -> dict[str, Array]:
        return self.training_loss({"class_logits": z, "boxes": boxes}, targets, weights, "softmax", dtype=dtype)

    def softmax_set_loss_vjp(
        self, z: Array, boxes: Array, targets: Any, weights: Any, *, dtype: str
    ) -> tuple[Array, Array]:
        outputs = {"class_logits": z, "boxes": boxes}
        gradients = self.training_loss_vjp(outputs, targets, weights, "softmax", dtype=dtype)
        return gradients["class_logits"], gradients["boxes"]

    def noised_queries(self, targets: Any, noise: Any, *, dtype: str) -> tuple[Array, ...]:
        padded_targets = self._targets(targets.labels, targets.boxes, targets.valid, dtype)
        drawn = self.denoising.Noise(self._tensor(noise.corners, dtype), self._tensor(noise.labels, "int64"))
        return tuple(map(numpy_of, self.denoising.noised_queries(padded_targets, drawn)))

    def training_loss(
        self, outputs: Any, targets: Any, weights: Any, classification: str, *, dtype: str
    ) -> dict[str, Array]:
        terms, _ = self._loss(outputs, targets, weights, classification, dtype)
        return {name: numpy_of(value) for name, value in terms.items()}

    def training_loss_vjp(
        self, outputs: Any, targets: Any, weights: Any, classification: str, *, dtype: str
    ) -> dict[str, Array]:
        terms, leaves = self._loss(outputs, targets, weights, classification, dtype)
        gradients = torch.autograd.grad(terms["loss"], list(leaves.values()))
        return dict(zip(leaves, map(numpy_of, gradients), strict=True))

    def _loss(
        self, outputs: Any, targets: Any, weights: Any, classification: Any, dtype: str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms, and the leaves among the outputs. With a softmax, the class head's outputs are given in place of logits."""
        given = {"cell_anchors": at_least_float32(dtype), "cell_padding": "bool"}
        kinds = {name: at_least_float32(dtype) if name.endswith("boxes") else dtype for name in outputs} | given
        tensors = {name: self._tensor(value, kinds[name], name not in given) for name, value in outputs.items()}
        leaves = {name: value for name, value in tensors.items() if name not in given}
        if "logits" not in outputs:
            tensors["logits"] = layers.log_odds(tensors["class_logits"])
        padded_targets = self._targets(targets.labels, targets.boxes, targets.valid, dtype)
        loss = LossConfig(weights["class"], weights["l1"], weights["giou"], classification)
        return self.criterion.SetCriterion(loss, matcher_backend=self.backend)(tensors, padded_targets), leaves


class CriterionInHalf(Criterion):
    """`smca.gpu.loss.criterion` on scores in half precision, such as a network may have under autocast, and boxes in float32. The
    loss is computed in float32."""

    dtypes = HALVES
    match_cost = softmax_match_cost = generalized_box_iou = noised_queries = None  # type: ignore[assignment]

    def __init__(self, backend: str, device: str) -> None:
        super().__init__(backend, device)
        self.name = f"criterion-half-{backend}"


class SciPyAssignment:
    """`scipy.optimize.linear_sum_assignment`."""

    name = "scipy"
    dtypes = ("float64", "float32")

    def assign(self, cost: Array, *, dtype: str) -> tuple[Array, Array]:
        rows, cols = linear_sum_assignment(cost.astype(dtype))
        return rows, cols


class CudaAssignment:
    """`smca.gpu.loss.assignment`, one problem per launch."""

    name = "cuda-assignment"
    dtypes = ("float32",)
    leaves_out = ("assign.forbidden_pairs",)
    """A cost that is not finite ends the training, with its place named."""

    def __init__(self) -> None:
        missing = assignment.available("cuda")
        if missing is not None:
            raise Unavailable(missing)

    def assign(self, cost: Array, *, dtype: str) -> tuple[Array, Array]:
        rows, cols = cost.shape
        valid = torch.ones(1, cols, dtype=torch.bool, device="cuda")
        costs = torch.tensor(cost, dtype=torch.float32, device="cuda").reshape(1, 1, rows, cols)
        query = assignment.assign(costs, valid)[0][0, 0].cpu().numpy()
        matched = np.flatnonzero(query >= 0)
        order = np.argsort(query[matched])
        return query[matched][order], matched[order]
