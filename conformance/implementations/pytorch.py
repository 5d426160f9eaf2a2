"""Our own attention and model, by backend, behind the protocol of the suite."""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smca.conformance.implementations import torch_setting  # noqa: F401 - first: before Triton is imported
from smca.conformance.inputs.model import STAGES, given_strides
from smca.conformance.protocol import DTYPES, Unavailable
from smca.conformance.tolerances import at_least_float32
from smca.gpu import attention
from smca.gpu.attention import dispatch, fused
from smca.gpu.config import BackboneConfig, ModelConfig
from smca.gpu.model import SMCADETR, layers
from smca.gpu.model.backbone import Backbone
from smca.gpu.model.denoising import FurtherQueries
from smca.reference import config as reference_config
from smca.reference.attention import Level

Array = npt.NDArray[Any]


def production_config(config: reference_config.ModelConfig) -> ModelConfig:
    """The model that the specification means, with a small backbone, whose maps are not read: features come from the inputs."""
    widths = [STAGES[stride] for stride in STAGES if stride <= max(8, *given_strides(config.strides))]
    options = {"embedding_size": 8, "hidden_sizes": widths, "depths": [1] * len(widths), "layer_type": "basic"}
    return ModelConfig(backbone=BackboneConfig(options=options, frozen_norm=False), **dataclasses.asdict(config))


LIFTED = dict.fromkeys(DTYPES, float("inf"))
AUTO = {**dict.fromkeys(DTYPES, dispatch.LIFTED_LOGIT_LIMIT), "float64": float("inf")}
"""dtype → largest λ·(extent/2)² at which log G is in the expanded form; in half precision that is computed in float32."""


def numpy_of(tensor: Tensor) -> Array:
    """In float64, on the host."""
    return tensor.detach().to(device="cpu", dtype=torch.float64).numpy()


def has_padding(features: Sequence[Array], valid_sizes: Array, config: reference_config.ModelConfig) -> bool:
    """Whether a cell holds no pixel of its image. Where none does, the model is told so, and works without masks."""
    sizes = np.stack([np.shape(x)[2:] for x in features])  # [levels, 2]
    strides = np.array(config.strides[: len(features)])[:, None, None]
    return bool((np.ceil(valid_sizes / strides) < sizes[:, None]).any())


def laid_out_like(dense: Tensor, values: Array) -> Tensor:
    """The same numbers with the strides of an array. What lies between them in memory is NaN, in a mask True."""
    if not isinstance(values, np.ndarray) or values.flags.c_contiguous:
        return dense
    strides = [stride // values.itemsize for stride in values.strides]
    length = 1 + sum((count - 1) * stride for count, stride in zip(values.shape, strides, strict=True))
    memory = dense.new_full((length,), float("nan") if dense.is_floating_point() else 1)
    first = tuple(slice(0, 1 if stride == 0 else None) for stride in strides)
    memory.as_strided(dense[first].shape, strides).copy_(dense[first])
    return memory.as_strided(dense.shape, strides)


class TorchAttention:
    """A backend of `smca.gpu.attention`."""

    attention: Any = attention

    def __init__(self, backend: str, device: str, dtypes: Sequence[str], expanded_up_to: Mapping[str, float]) -> None:
        if device != "cpu" and not torch.cuda.is_available():
            raise Unavailable("PyTorch finds no CUDA device")
        self.name = backend if device == "cpu" else f"{backend}-{device}"
        self.backend, self.device, self.dtypes, self.expanded_up_to = backend, device, tuple(dtypes), expanded_up_to

    def _tensor(self, values: Array, dtype: str, grad: bool = False) -> Tensor:
        dense = torch.tensor(values, dtype=getattr(torch, dtype), device=self.device)
        return laid_out_like(dense, values).requires_grad_(grad)

    def _leaves(self, values: Sequence[Array], dtype: str, grad: bool) -> list[Tensor]:
        """k, v (after q) in `dtype`; the centre and the precision behind them in at least float32."""
        coarse = at_least_float32(dtype)
        wanted = [coarse if i >= len(values) - 2 else dtype for i in range(len(values))]
        return [self._tensor(value, name, grad) for value, name in zip(values, wanted, strict=True)]

    def _mask(self, mask: Array | None) -> Tensor | None:
        return None if mask is None else laid_out_like(torch.tensor(mask, device=self.device), mask)

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
        return numpy_of(self._attend(*leaves, size, self._mask(mask)))

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
        return tuple(map(numpy_of, torch.autograd.grad(out, leaves, self._tensor(grad_out, dtype).to(out.dtype))))

    def _levels(self, levels: Sequence[Level], dtype: str, grad: bool) -> list[attention.Level]:
        return [
            attention.Level(k, v, center, precision, level.size, self._mask(level.key_padding_mask))
            for level in levels
            for k, v, center, precision in [self._leaves(level[:4], dtype, grad)]
        ]

    def multi_scale_smca_attention(
        self, q: Array, levels: Sequence[Level], level_weights: Array, *, dtype: str
    ) -> Array:
        coarse = at_least_float32(dtype)
        arguments = self._tensor(q, dtype), self._levels(levels, dtype, False), self._tensor(level_weights, coarse)
        return numpy_of(self._attend_to_levels(*arguments))

    def multi_scale_smca_attention_vjp(
        self, grad_out: Array, q: Array, levels: Sequence[Level], level_weights: Array, *, dtype: str
    ) -> Any:
        coarse = at_least_float32(dtype)
        level_leaves = self._levels(levels, dtype, True)
        tensors = self._tensor(q, dtype, True), self._tensor(level_weights, coarse, True)
        out = self._attend_to_levels(tensors[0], level_leaves, tensors[1])
        leaves = [tensors[0], tensors[1], *(x for level in level_leaves for x in level[:4])]
        dq, dweights, *rest = map(
            numpy_of, torch.autograd.grad(out, leaves, self._tensor(grad_out, dtype).to(out.dtype))
        )
        return dq, [tuple(rest[4 * j : 4 * j + 4]) for j in range(len(levels))], dweights


class Auto(TorchAttention):
    """What ``auto`` chooses: one of the other backends, so that fewer examples are as informative."""

    examples_factor = 0.25

    def __init__(self, device: str) -> None:
        super().__init__("auto", device, DTYPES, AUTO if device == "cpu" else {"float64": float("inf")})


class Autocast(Auto):
    """``auto`` on float32 tensors under autocast, held to the bounds of the lower dtype."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.dtypes = ("bfloat16",)
        self.name = self.name.replace("auto", "autocast")

    def _tensor(self, values: Array, dtype: str, grad: bool = False) -> Tensor:
        return super()._tensor(values, "float32", grad)

    def _attend(self, *arguments: Any) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return super()._attend(*arguments)

    def _attend_to_levels(self, *arguments: Any) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return super()._attend_to_levels(*arguments)


class Triton(TorchAttention):
    """The fused kernels: on a GPU, or in Triton's interpreter on the CPU."""

    slow, examples_factor = True, 0.05
    fused: Any = fused

    def __init__(self, device: str) -> None:
        if device == "cpu" and torch.cuda.is_available():
            raise Unavailable("on a machine with a GPU the kernels run there: use triton-cuda")
        super().__init__("triton", device, ("float32", "float16", "bfloat16"), {})
        missing = fused.available(device)
        if missing is not None:
            raise Unavailable(missing)

    def smca_attention_dropout(
        self,
        grad_out: Array,
        q: Array,
        k: Array,
        v: Array,
        center_xy: Array,
        precision_xy: Array,
        size: Any,
        mask: Any,
        rate: float,
        seed: int,
        *,
        dtype: str,
    ) -> tuple[Array, ...]:
        leaves = self._leaves((q, k, v, center_xy, precision_xy), dtype, grad=True)
        arguments: tuple[Any, ...] = (*leaves, size, self._mask(mask), rate, seed)
        out = self.fused.fused_smca_attention(*arguments)
        return tuple(map(numpy_of, (out, *torch.autograd.grad(out, leaves, self._tensor(grad_out, dtype)))))


class AutocastTriton(Triton):
    """The fused kernels on float32 tensors under autocast, held to the bounds of the lower dtype."""

    quick_operations = ("smca_attention",)
    smca_attention_dropout = None  # type: ignore[assignment]

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.dtypes = ("bfloat16",)
        self.name = self.name.replace("triton", "autocast-triton")

    def _tensor(self, values: Array, dtype: str, grad: bool = False) -> Tensor:
        return super()._tensor(values, "float32", grad)

    def _attend(self, *arguments: Any) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return super()._attend(*arguments)


class TorchModel(TorchAttention):
    """A backend that can run the whole model as well as attention alone."""

    model: Any = SMCADETR
    layers: Any = layers

    def log_odds(self, z: Array, *, dtype: str) -> Array:
        return numpy_of(self.layers.log_odds(self._tensor(z, dtype)))

    def log_odds_vjp(self, grad_out: Array, z: Array, *, dtype: str) -> Array:
        leaf = self._tensor(z, dtype, True)
        out = self.layers.log_odds(leaf)
        (gradient,) = torch.autograd.grad(out, leaf, self._tensor(grad_out, dtype).to(out.dtype))
        return numpy_of(gradient)

    def _model(self, params: Mapping[str, Array], config: Any, dtype: str) -> SMCADETR:
        model: SMCADETR = (
            _built(self.model, config, self.backend).to(device=self.device, dtype=getattr(torch, dtype)).eval()
        )
        state = {name: self._tensor(np.asarray(value), dtype) for name, value in params.items()}
        missing = model.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys
        assert all(name.startswith("backbone.") for name in missing.missing_keys), missing.missing_keys
        return model

    def forward(
        self,
        params: Any,
        features: Any,
        valid_sizes: Array,
        config: Any,
        *,
        dtype: str,
        padded_size: tuple[int, int] | None = None,
    ) -> dict[str, Array]:
        model = self._model(params, config, dtype)
        with torch.no_grad():
            outputs = self._detect(model, features, valid_sizes, config, dtype, padded_size=padded_size)
        return {name: numpy_of(value) for name, value in outputs.items()}

    def anchored_forward(
        self, params: Any, features: Any, valid_sizes: Array, config: Any, further: Any, *, dtype: str
    ) -> dict[str, Array]:
        model = self._model(params, config, dtype)
        with torch.no_grad():
            outputs = self._detect(model, features, valid_sizes, config, dtype, further)
        return {name: numpy_of(value) for name, value in outputs.items()}

    def anchored_forward_vjp(
        self,
        gradients: Mapping[str, Array],
        params: Any,
        features: Any,
        valid_sizes: Array,
        config: Any,
        further: Any,
        *,
        dtype: str,
    ) -> dict[str, Array]:
        model = self._model(params, config, dtype)
        outputs = self._detect(model, features, valid_sizes, config, dtype, further)
        return self._gradients(model, params, {outputs[name]: grad for name, grad in gradients.items()}, dtype)

    def _detect(
        self,
        model: SMCADETR,
        features: Any,
        valid_sizes: Array,
        config: Any,
        dtype: str,
        further: Any = None,
        padded_size: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        return model.detect(
            [self._tensor(x, dtype) for x in features],
            torch.tensor(valid_sizes, device=self.device),
            self._further(further, dtype),
            padded=has_padding(features, valid_sizes, config),
            padded_size=padded_size,
        )

    def _further(self, further: Any, dtype: str) -> FurtherQueries | None:
        if further is None:
            return None
        labels, sees = (torch.tensor(each, device=self.device) for each in (further.labels, further.sees))
        return FurtherQueries(self._tensor(further.box_logits, dtype), labels, sees)

    def _gradients(
        self, model: SMCADETR, params: Any, gradients: Mapping[Tensor, Array], dtype: str
    ) -> dict[str, Array]:
        """Of every parameter, by name, from those of outputs; 0 for a parameter that no output depends on."""
        leaves = {name: value for name, value in model.named_parameters() if name in params}
        seeds = [self._tensor(grad, dtype) for grad in gradients.values()]
        found = torch.autograd.grad(list(gradients), list(leaves.values()), seeds, allow_unused=True)
        return {
            name: np.zeros(tuple(leaf.shape)) if gradient is None else numpy_of(gradient)
            for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
        }

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
        model = self._model(params, config, dtype)
        outputs = self._detect(model, features, valid_sizes, config, dtype)
        gradients = {outputs["logits"]: grad_logits, outputs["boxes"]: grad_boxes}
        return self._gradients(model, params, gradients, dtype)


class Lifted(TorchModel):
    """The lifted form; ``auto`` chooses it most of the time, so that fewer examples are as informative."""

    examples_factor, quick_always = 0.35, 9
    log_odds = log_odds_vjp = None  # type: ignore[assignment]  # no attention in them: as eager's

    def __init__(self, device: str) -> None:
        super().__init__("lifted", device, DTYPES, LIFTED)


@functools.lru_cache(maxsize=64)
def _built(model: Any, config: reference_config.ModelConfig, backend: str) -> SMCADETR:
    """A model, kept because building it costs more than running it; its weights are loaded anew for each example. All models
    with the same levels use one backbone: it costs the most, and the tested part begins at its features."""
    with mock.patch.object(sys.modules[model.__module__], "Backbone", _backbone):
        return model(production_config(config), attention_backend=backend)  # type: ignore[no-any-return]


_backbones: dict[tuple[str, tuple[int, ...]], Backbone] = {}


def _backbone(config: BackboneConfig, strides: tuple[int, ...], **options: Any) -> Backbone:
    key = repr(config), tuple(strides)
    if key not in _backbones:
        _backbones[key] = Backbone(config, strides, **options)
    return _backbones[key]


class Compiled(TorchAttention):
    """`torch.compile` of the module's attention."""

    slow, examples_factor, quick_always = True, 0.02, 2  # each new shape is compiled: seconds
    quick_operations = ("smca_attention", "smca_attention_vjp")  # several levels are a loop over what these compile

    def __init__(self) -> None:
        super().__init__("auto", "cpu", ("float32",), AUTO)
        self.name = "compiled"
        # A cached graph that cannot be used costs one more compilation and nothing else.
        logging.getLogger("torch._inductor.codecache").setLevel(logging.ERROR)
        torch._dynamo.config.recompile_limit = 1000  # past it, what runs is no longer the compiled code
        compiled: Any = torch.compile(dynamic=True, fullgraph=True)
        self._attend, self._attend_to_levels = map(compiled, (super()._attend, super()._attend_to_levels))  # type: ignore[method-assign]
