"""The specification itself, behind the protocol of the suite; and on a GPU, given CuPy's arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from smca.conformance.protocol import Unavailable
from smca.reference import attention as reference_attention
from smca.reference import boxes as reference_boxes
from smca.reference import denoising as reference_denoising
from smca.reference import dense_loss as reference_dense_loss
from smca.reference import losses as reference_losses
from smca.reference import losses_backward as reference_losses_backward
from smca.reference import matching as reference_matching
from smca.reference import model as reference_model
from smca.reference import softmax_scores as reference_softmax_scores
from smca.reference import training_run as reference_training_run
from smca.reference.attention import Level

Array = npt.NDArray[Any]


def by_place(params: Mapping[str, Array], average: Mapping[str, Array]) -> dict[str, Array]:
    """Parameters and their average under the names that `train` gives them: "params.norm.bias", "average.norm.bias"."""
    places = {"params": params, "average": average}
    return {f"{place}.{name}": value for place, values in places.items() for name, value in values.items()}


class Oracle:
    """The specification itself: what holds between its own results holds without anyone else's."""

    name = "oracle"
    dtypes = ("float64",)
    examples_factor = 0.5
    is_oracle = True
    """Compared with nobody: equality with itself cannot fail."""
    attention: Any = reference_attention
    boxes: Any = reference_boxes
    matching: Any = reference_matching
    losses: Any = reference_losses
    model: Any = reference_model
    dense_loss: Any = reference_dense_loss
    denoising: Any = reference_denoising
    softmax_scores: Any = reference_softmax_scores
    losses_backward: Any = reference_losses_backward
    training_run: Any = reference_training_run

    def smca_attention(self, *arguments: Any, dtype: str) -> Array:
        return self.attention.smca_attention(*arguments)  # type: ignore[no-any-return]

    def smca_attention_vjp(self, *arguments: Any, dtype: str) -> tuple[Array, ...]:
        return self.attention.smca_attention_vjp(*arguments)  # type: ignore[no-any-return]

    def multi_scale_smca_attention(self, *arguments: Any, dtype: str) -> Array:
        return self.attention.multi_scale_smca_attention(*arguments)  # type: ignore[no-any-return]

    def multi_scale_smca_attention_vjp(self, *arguments: Any, dtype: str) -> Any:
        return self.attention.multi_scale_smca_attention_vjp(*arguments)

    def match_cost(self, *arguments: Any, dtype: str) -> Array:
        return self.matching.match_cost(*arguments)  # type: ignore[no-any-return]

    def assign(self, cost: Array, *, dtype: str) -> tuple[Array, Array]:
        return self.matching.linear_sum_assignment(cost)  # type: ignore[no-any-return]

    def generalized_box_iou(self, boxes1: Array, boxes2: Array, *, dtype: str) -> Array:
        return self.boxes.generalized_box_iou(boxes1[:, None], boxes2)  # type: ignore[no-any-return]

    def set_loss(self, logits: Array, boxes: Array, targets: Any, weights: Mapping[str, float], *, dtype: str) -> Any:
        return self.losses.set_loss({"logits": logits, "boxes": boxes}, targets, weights)

    def set_loss_vjp(
        self, logits: Array, boxes: Array, targets: Any, weights: Mapping[str, float], *, dtype: str
    ) -> tuple[Array, Array]:
        outputs = {"logits": logits, "boxes": boxes}
        gradients = self.losses_backward.set_loss_backward(outputs, targets, weights)
        return gradients["logits"], gradients["boxes"]

    def log_odds(self, z: Array, *, dtype: str) -> Array:
        return self.softmax_scores.log_odds(z)  # type: ignore[no-any-return]

    def softmax_match_cost(self, *arguments: Any, dtype: str) -> Array:
        return self.matching.match_cost(*arguments, "softmax")  # type: ignore[no-any-return]

    def softmax_set_loss(
        self, z: Array, boxes: Array, targets: Any, weights: Mapping[str, float], *, dtype: str
    ) -> Any:
        outputs = {"logits": self.softmax_scores.log_odds(z), "class_logits": z, "boxes": boxes}
        return self.losses.set_loss(outputs, targets, weights, "softmax")

    def softmax_set_loss_vjp(
        self, z: Array, boxes: Array, targets: Any, weights: Mapping[str, float], *, dtype: str
    ) -> tuple[Array, Array]:
        outputs = {"logits": self.softmax_scores.log_odds(z), "class_logits": z, "boxes": boxes}
        gradients = self.losses_backward.set_loss_backward(outputs, targets, weights, "softmax")
        return gradients["class_logits"], gradients["boxes"]

    def train(self, params: Any, steps: Any, settings: Any, *, dtype: str) -> dict[str, Array]:
        went = self.training_run.training_run(params, steps, settings)
        return {"loss": went.loss, "gradient_norm": went.gradient_norm} | by_place(went.params, went.average)

    def forward(self, *arguments: Any, dtype: str, padded_size: tuple[int, int] | None = None) -> Any:
        return self.model.forward(*arguments, padded_size=padded_size)

    anchored_forward = forward

    def noised_queries(self, targets: Any, noise: Any, *, dtype: str) -> Any:
        return self.denoising.noised_queries(targets, noise)

    def training_loss(
        self, outputs: Any, targets: Any, weights: Mapping[str, float], classification: str, *, dtype: str
    ) -> dict[str, float]:
        terms = dict(self.losses.set_loss(outputs, targets, weights, classification))
        if "further_logits" in outputs:
            groups = outputs["further_logits"].shape[2] // (2 * targets.valid.shape[1])
            terms |= self.denoising.denoising_loss(outputs, targets, weights, groups, classification)
        if "cell_logits" in outputs:
            terms |= self.dense_loss.dense_loss(outputs, targets, weights)
        return terms | {"loss": sum(value for name, value in terms.items() if name != "loss")}


class OracleOnCuPy(Oracle):
    """The specification on a GPU: the same code, given CuPy arrays."""

    name = "oracle-cupy"
    is_oracle = False
    match_cost = assign = generalized_box_iou = set_loss = forward = None  # type: ignore[assignment]
    anchored_forward = noised_queries = training_loss = None  # type: ignore[assignment]
    log_odds = softmax_match_cost = softmax_set_loss = None  # type: ignore[assignment]
    set_loss_vjp = softmax_set_loss_vjp = train = None  # type: ignore[assignment]

    def __init__(self) -> None:
        try:
            import cupy

            cupy.zeros(1)
        except ImportError as error:
            raise Unavailable("CuPy is not installed: pip install cupy-cuda13x (or cupy-cuda12x)") from error
        except Exception as error:
            raise Unavailable(f"CuPy finds no working CUDA device: {error}") from error
        self.cupy: Any = cupy

    def _there(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self.cupy.asarray(value)
        if isinstance(value, Level):
            return Level(*map(self._there, value))
        return list(map(self._there, value)) if isinstance(value, list) else value

    def _back(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._back, value))
        return self.cupy.asnumpy(value)

    def smca_attention(self, *arguments: Any, dtype: str) -> Array:
        return self._back(super().smca_attention(*map(self._there, arguments), dtype=dtype))  # type: ignore[no-any-return]

    def smca_attention_vjp(self, *arguments: Any, dtype: str) -> tuple[Array, ...]:
        return self._back(super().smca_attention_vjp(*map(self._there, arguments), dtype=dtype))  # type: ignore[no-any-return]

    def multi_scale_smca_attention(self, *arguments: Any, dtype: str) -> Array:
        return self._back(super().multi_scale_smca_attention(*map(self._there, arguments), dtype=dtype))  # type: ignore[no-any-return]

    def multi_scale_smca_attention_vjp(self, *arguments: Any, dtype: str) -> Any:
        return self._back(super().multi_scale_smca_attention_vjp(*map(self._there, arguments), dtype=dtype))
