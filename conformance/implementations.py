"""Our own implementations, by name, behind the protocol of the suite."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from smca.conformance.protocol import Unavailable
from smca.datasets import Targets
from smca.gpu import assignment, attention, boxes, criterion, fused_attention, matcher
from smca.gpu.config import LossConfig, ModelConfig
from smca.gpu.model import SMCADETR
from smca.reference import attention as reference_attention
from smca.reference import boxes as reference_boxes
from smca.reference import losses as reference_losses
from smca.reference import matching as reference_matching
from smca.reference import model as reference_model
from smca.reference.attention import Level

Array = npt.NDArray[Any]


class Oracle:
    """The specification itself: what holds between its own results holds without anyone else's."""

    name = "oracle"
    dtypes = ("float64",)
    attention: Any = reference_attention
    boxes: Any = reference_boxes
    matching: Any = reference_matching
    losses: Any = reference_losses
    model: Any = reference_model

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

    def generalized_box_iou(self, *arguments: Any, dtype: str) -> Array:
        return self.boxes.generalized_box_iou(*arguments)  # type: ignore[no-any-return]

    def set_loss(self, logits: Array, boxes: Array, targets: Any, weights: Mapping[str, float], *, dtype: str) -> Any:
        return self.losses.set_loss({"logits": logits, "boxes": boxes}, targets, weights)

    def forward(self, *arguments: Any, dtype: str) -> Any:
        return self.model.forward(*arguments)


class OracleOnCuPy(Oracle):
    """The specification on a GPU: the same code, given CuPy arrays."""

    name = "oracle-cupy"
    match_cost = assign = generalized_box_iou = set_loss = forward = None  # type: ignore[assignment]

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


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().to(device="cpu", dtype=torch.float64).numpy()


class TorchAttention:
    """A backend of `smca.gpu.attention`."""

    attention: Any = attention

    def __init__(self, backend: str, device: str, dtypes: Sequence[str], expanded_up_to: Mapping[str, float]) -> None:
        if device != "cpu" and not torch.cuda.is_available():
            raise Unavailable("PyTorch finds no CUDA device")
        self.name = backend if device == "cpu" else f"{backend}-{device}"
        self.backend, self.device, self.dtypes, self.expanded_up_to = backend, device, tuple(dtypes), expanded_up_to

    def _tensor(self, values: Array, dtype: str, grad: bool = False) -> Tensor:
        return torch.tensor(values, dtype=getattr(torch, dtype), device=self.device, requires_grad=grad)

    def _leaves(self, values: Sequence[Array], dtype: str, grad: bool) -> list[Tensor]:
        """k, v (after q) in `dtype`; the centre and the precision behind them in at least float32."""
        coarse = "float32" if dtype in ("float16", "bfloat16") else dtype
        wanted = [coarse if i >= len(values) - 2 else dtype for i in range(len(values))]
        return [self._tensor(value, name, grad) for value, name in zip(values, wanted, strict=True)]

    def _mask(self, mask: Array | None) -> Tensor | None:
        return None if mask is None else torch.tensor(mask, device=self.device)

    def _attend(self, *arguments: Any) -> Tensor:
        out: Tensor = self.attention.smca_attention(*arguments, backend=self.backend)
        return out

    def _attend_to_levels(self, *arguments: Any) -> Tensor:
        out: Tensor = self.attention.multi_scale_smca_attention(*arguments, backend=self.backend)
        return out

    def smca_attention(
        self, q: Array, k: Array, v: Array, center_xy: Array, precision_xy: Array, size: Any, mask: Any, *, dtype: str
    ) -> Array:
        leaves = self._leaves((q, k, v, center_xy, precision_xy), dtype, grad=False)
        return _numpy(self._attend(*leaves, size, self._mask(mask)))

    def smca_attention_vjp(
        self,
        grad_out: Array,
        q: Array,
        k: Array,
        v: Array,
        center_xy: Array,
        precision_xy: Array,
        size: Any,
        mask: Any,
        *,
        dtype: str,
    ) -> tuple[Array, ...]:
        leaves = self._leaves((q, k, v, center_xy, precision_xy), dtype, grad=True)
        out = self._attend(*leaves, size, self._mask(mask))
        return tuple(map(_numpy, torch.autograd.grad(out, leaves, self._tensor(grad_out, dtype))))

    def _levels(self, levels: Sequence[Level], dtype: str, grad: bool) -> list[attention.Level]:
        return [
            attention.Level(k, v, center, precision, level.size, self._mask(level.key_padding_mask))
            for level in levels
            for k, v, center, precision in [self._leaves(level[:4], dtype, grad)]
        ]

    def multi_scale_smca_attention(
        self, q: Array, levels: Sequence[Level], level_weights: Array, *, dtype: str
    ) -> Array:
        coarse = "float32" if dtype in ("float16", "bfloat16") else dtype
        arguments = self._tensor(q, dtype), self._levels(levels, dtype, False), self._tensor(level_weights, coarse)
        return _numpy(self._attend_to_levels(*arguments))

    def multi_scale_smca_attention_vjp(
        self, grad_out: Array, q: Array, levels: Sequence[Level], level_weights: Array, *, dtype: str
    ) -> Any:
        coarse = "float32" if dtype in ("float16", "bfloat16") else dtype
        there = self._levels(levels, dtype, True)
        tensors = self._tensor(q, dtype, True), self._tensor(level_weights, coarse, True)
        out = self._attend_to_levels(tensors[0], there, tensors[1])
        leaves = [tensors[0], tensors[1], *(x for level in there for x in level[:4])]
        dq, dweights, *rest = map(_numpy, torch.autograd.grad(out, leaves, self._tensor(grad_out, dtype)))
        return dq, [tuple(rest[4 * j : 4 * j + 4]) for j in range(len(levels))], dweights


class Triton(TorchAttention):
    """The fused kernels: on a GPU, or in Triton's interpreter on the CPU."""

    slow, share = True, 0.25

    def __init__(self, device: str) -> None:
        if device == "cpu" and torch.cuda.is_available():
            raise Unavailable("where there is a GPU the kernels run on it: triton-cuda")
        super().__init__("triton", device, ("float32", "float16", "bfloat16"), {})
        missing = fused_attention.available(device)
        if missing is not None:
            raise Unavailable(missing)


class TorchModel(TorchAttention):
    """A backend that the whole model and the criterion can be run with, besides attention alone."""

    def _model(self, params: Mapping[str, Array], config: Any, dtype: str) -> SMCADETR:
        model = _built(config.to_json(), self.backend).to(device=self.device, dtype=getattr(torch, dtype)).eval()
        state = {name: self._tensor(np.asarray(value), dtype) for name, value in params.items()}
        missing = model.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys
        assert all(name.startswith("backbone.") for name in missing.missing_keys), missing.missing_keys
        return model

    def forward(self, params: Any, features: Any, valid_sizes: Array, config: Any, *, dtype: str) -> dict[str, Array]:
        model, sizes = self._model(params, config, dtype), torch.tensor(valid_sizes, device=self.device)
        with torch.no_grad():
            found = model.detect([self._tensor(x, dtype) for x in features], sizes)
        return {name: _numpy(value) for name, value in found.items()}

    def forward_vjp(
        self,
        grad_logits: Array,
        grad_boxes: Array,
        params: Any,
        features: Any,
        valid_sizes: Array,
        config: Any,
        *,
        dtype: str,
    ) -> dict[str, Array]:
        model, sizes = self._model(params, config, dtype), torch.tensor(valid_sizes, device=self.device)
        found = model.detect([self._tensor(x, dtype) for x in features], sizes)
        leaves = {name: value for name, value in model.named_parameters() if name in params}
        seeds = [self._tensor(grad_logits, dtype), self._tensor(grad_boxes, dtype)]
        gradients = torch.autograd.grad(
            [found["logits"], found["boxes"]], list(leaves.values()), seeds, allow_unused=True
        )
        return {
            name: np.zeros(tuple(leaf.shape)) if gradient is None else _numpy(gradient)
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }


@functools.lru_cache(maxsize=64)
def _built(config: str, backend: str) -> SMCADETR:
    """Building a model costs more than running it; its weights are loaded anew for each example."""
    return SMCADETR(ModelConfig.from_json(config), attention_backend=backend)


class Compiled(TorchAttention):
    """`torch.compile` of the module's attention."""

    slow, share = True, 0.08  # each new shape is compiled: seconds

    def __init__(self) -> None:
        super().__init__("auto", "cpu", ("float32",), AUTO)
        self.name = "compiled"
        torch._dynamo.config.recompile_limit = 1000  # past it, what runs is no longer the compiled code
        compiled: Any = torch.compile(dynamic=True, fullgraph=True)
        self._attend, self._attend_to_levels = map(compiled, (super()._attend, super()._attend_to_levels))  # type: ignore[method-assign]


class Criterion:
    """`smca.gpu.matcher` and `smca.gpu.criterion` with one of the matcher's backends."""

    dtypes = ("float64", "float32")
    boxes: Any = boxes
    matcher: Any = matcher
    criterion: Any = criterion

    def __init__(self, backend: str, device: str) -> None:
        if device != "cpu" and not torch.cuda.is_available():
            raise Unavailable("PyTorch finds no CUDA device")
        missing = assignment.available(device) if backend == "cupy" else None
        if missing is not None:
            raise Unavailable(missing)
        self.name = f"criterion-{backend}"
        self.backend, self.device = backend, device

    def _tensor(self, values: Any, dtype: str, grad: bool = False) -> Tensor:
        return torch.tensor(values, dtype=getattr(torch, dtype), device=self.device, requires_grad=grad)

    def _targets(self, labels: Array, target_boxes: Array, valid: Array, dtype: str) -> Targets:
        return Targets(self._tensor(labels, "int64"), self._tensor(target_boxes, dtype), self._tensor(valid, "bool"))

    def match_cost(
        self, logits: Array, boxes: Array, labels: Array, target_boxes: Array, weights: Any, *, dtype: str
    ) -> Array:
        targets = self._targets(labels[None], target_boxes[None], np.ones((1, len(labels)), dtype=bool), dtype)
        found = self._tensor(logits, dtype)[None, None], self._tensor(boxes, dtype)[None, None]
        return _numpy(self.matcher.match_cost(*found, targets, weights)[0, 0])

    def generalized_box_iou(self, boxes1: Array, boxes2: Array, *, dtype: str) -> Array:
        one, two = self._tensor(boxes1, dtype), self._tensor(boxes2, dtype)
        return _numpy(self.boxes.generalized_box_iou(one[:, None], two[None]))

    def set_loss(self, logits: Array, boxes: Array, targets: Any, weights: Any, *, dtype: str) -> dict[str, Array]:
        terms, _ = self._loss(logits, boxes, targets, weights, dtype)
        return {name: _numpy(value) for name, value in terms.items()}

    def set_loss_vjp(
        self, logits: Array, boxes: Array, targets: Any, weights: Any, *, dtype: str
    ) -> tuple[Array, Array]:
        terms, leaves = self._loss(logits, boxes, targets, weights, dtype)
        dlogits, dboxes = torch.autograd.grad(terms["loss"], leaves)
        return _numpy(dlogits), _numpy(dboxes)

    def _loss(self, logits: Any, boxes: Any, targets: Any, weights: Any, dtype: str) -> tuple[dict[str, Tensor], Any]:
        leaves = self._tensor(logits, dtype, True), self._tensor(boxes, dtype, True)
        there = self._targets(targets.labels, targets.boxes, targets.valid, dtype)
        loss = LossConfig(class_weight=weights["class"], l1_weight=weights["l1"], giou_weight=weights["giou"])
        module = self.criterion.SetCriterion(loss, matcher_backend=self.backend)
        return module({"logits": leaves[0], "boxes": leaves[1]}, there), leaves


class SciPyAssignment:
    """`scipy.optimize.linear_sum_assignment`."""

    name = "scipy"
    dtypes = ("float64", "float32")

    def assign(self, cost: Array, *, dtype: str) -> tuple[Array, Array]:
        rows, cols = linear_sum_assignment(cost.astype(dtype))
        return rows, cols


ALL = ("float64", "float32", "float16", "bfloat16")
LIFTED = {"float64": float("inf"), "float32": float("inf")}
AUTO = {"float64": float("inf"), "float32": attention.LIFTED_LOGIT_LIMIT}


class CudaAssignment:
    """`smca.gpu.assignment`, one problem a launch."""

    name = "cuda-assignment"
    dtypes = ("float32",)

    def __init__(self) -> None:
        missing = assignment.available("cuda")
        if missing is not None:
            raise Unavailable(missing)

    def assign(self, cost: Array, *, dtype: str) -> tuple[Array, Array]:
        rows, cols = cost.shape
        valid = torch.ones(1, cols, dtype=torch.bool, device="cuda")
        there = torch.tensor(cost, dtype=torch.float32, device="cuda").reshape(1, 1, rows, cols)
        query = assignment.assign(there, valid)[0][0, 0].cpu().numpy()
        found = np.flatnonzero(query >= 0)
        order = np.argsort(query[found])
        return query[found][order], found[order]


IMPLEMENTATIONS: dict[str, Callable[[], Any]] = {
    "oracle": Oracle,
    "oracle-cupy": OracleOnCuPy,
    "eager": lambda: TorchModel("eager", "cpu", ALL, {}),
    "lifted": lambda: TorchModel("lifted", "cpu", tuple(LIFTED), LIFTED),
    "auto": lambda: TorchAttention("auto", "cpu", ALL, AUTO),
    "compiled": Compiled,
    "eager-cuda": lambda: TorchModel("eager", "cuda", ALL, {}),
    "lifted-cuda": lambda: TorchModel("lifted", "cuda", tuple(LIFTED), LIFTED),
    "triton": lambda: Triton("cpu"),
    "triton-cuda": lambda: Triton("cuda"),
    "criterion-scipy": lambda: Criterion("scipy", "cpu"),
    "criterion-cupy": lambda: Criterion("cupy", "cuda"),
    "scipy": SciPyAssignment,
    "cuda-assignment": CudaAssignment,
}
"""Name → how to make it; making it raises `Unavailable` on a machine that lacks what it needs."""
