"""Implementations written from docs/method.md alone, by other means than ours: no false alarm may come of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Einsum:
    """PyTorch's einsum and softmax; in half precision, products in that dtype and everything else in float32."""

    dtypes = ("float64", "float32", "float16", "bfloat16")

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, center: Tensor, precision: Tensor, size: Any, mask: Any
    ) -> Tensor:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        rows, columns = (torch.arange(n, dtype=wide) + 0.5 for n in size)
        x, y = columns.repeat(size[0]), rows.repeat_interleave(size[1])
        away = torch.stack([x - center[..., :1], y - center[..., 1:]], dim=-1)
        log_g = torch.einsum("bhna,bhnla->bhnl", -precision / 2, away**2)
        if mask is not None:
            hidden = torch.from_numpy(np.array(mask))
            k, v = (tensor.masked_fill(hidden[:, None, :, None], 0) for tensor in (k, v))
        dots = torch.einsum("bhnd,bhld->bhnl", q / q.shape[-1] ** 0.5, k)
        logits = dots.to(wide) + log_g
        if mask is not None:
            logits = logits.masked_fill(hidden[:, None, None], -torch.inf)
        return torch.einsum("bhnl,bhld->bhnd", torch.softmax(logits, -1), v.to(wide)).to(q.dtype)

    def _leaves(self, values: Any, dtype: str) -> list[Tensor]:
        kinds = [dtype] * 3 + ["float64" if dtype == "float64" else "float32"] * 2
        return [
            torch.tensor(np.array(value), dtype=getattr(torch, kind), requires_grad=True)
            for value, kind in zip(values, kinds, strict=True)
        ]

    def smca_attention(self, *arguments: Any, dtype: str) -> Any:
        return self._attend(*self._leaves(arguments[:5], dtype), *arguments[5:]).detach().double().numpy()

    def smca_attention_vjp(self, grad_out: Any, *arguments: Any, dtype: str) -> Any:
        leaves = self._leaves(arguments[:5], dtype)
        out = self._attend(*leaves, *arguments[5:])
        gradients = torch.autograd.grad(out, leaves, torch.tensor(np.array(grad_out), dtype=out.dtype))
        return tuple(gradient.double().numpy() for gradient in gradients)

    def multi_scale_smca_attention(self, q: Any, levels: Any, level_weights: Any, *, dtype: str) -> Any:
        weights = np.moveaxis(level_weights, -1, 0)[:, :, None, :, None]
        return sum(w * self.smca_attention(q, *level, dtype=dtype) for w, level in zip(weights, levels, strict=True))


class Jax:
    """JAX's einsum, softmax and differentiation; in half precision, products in that dtype and everything else in float32."""

    name, dtypes = "JAX", ("float64", "float32", "float16", "bfloat16")

    def __init__(self) -> None:
        import jax

        jax.config.update("jax_enable_x64", True)
        self.jax, self.np = jax, jax.numpy

    def _attend(self, q: Any, k: Any, v: Any, center: Any, precision: Any, size: Any, mask: Any) -> Any:
        np_, wide = self.np, precision.dtype
        y, x = np_.meshgrid(*(np_.arange(n, dtype=wide) + 0.5 for n in size), indexing="ij")
        away = np_.stack([x.ravel() - center[..., :1], y.ravel() - center[..., 1:]], -1)
        log_g = np_.einsum("bhna,bhnla->bhnl", -precision / 2, away**2)
        if mask is not None:
            k, v = (np_.where(mask[:, None, :, None], 0, array) for array in (k, v))
        dots = np_.einsum("bhnd,bhld->bhnl", (q / q.shape[-1] ** 0.5).astype(k.dtype), k)
        logits = dots.astype(wide) + log_g
        if mask is not None:
            logits = np_.where(mask[:, None, None], -np_.inf, logits)
        return np_.einsum("bhnl,bhld->bhnd", self.jax.nn.softmax(logits, -1), v.astype(wide)).astype(q.dtype)

    def _leaves(self, values: Any, dtype: str) -> list[Any]:
        kinds = [dtype] * 3 + ["float64" if dtype == "float64" else "float32"] * 2
        return [self.np.asarray(np.array(value), dtype=kind) for value, kind in zip(values, kinds, strict=True)]

    def smca_attention(self, *arguments: Any, dtype: str) -> Any:
        return np.asarray(self._attend(*self._leaves(arguments[:5], dtype), *arguments[5:]), dtype=np.float64)

    def smca_attention_vjp(self, grad_out: Any, *arguments: Any, dtype: str) -> Any:
        out, back = self.jax.vjp(
            lambda *leaves: self._attend(*leaves, *arguments[5:]), *self._leaves(arguments[:5], dtype)
        )
        gradients = back(self.np.asarray(np.array(grad_out), dtype=out.dtype))
        return tuple(np.asarray(gradient, dtype=np.float64) for gradient in gradients)

    def multi_scale_smca_attention(self, q: Any, levels: Any, level_weights: Any, *, dtype: str) -> Any:
        weights = np.moveaxis(level_weights, -1, 0)[:, :, None, :, None]
        return sum(w * self.smca_attention(q, *level, dtype=dtype) for w, level in zip(weights, levels, strict=True))


class Loops:
    """One number after the other: GIoU and the assignment by trying everything."""

    dtypes = ("float64", "float32")

    def generalized_box_iou(self, boxes1: Any, boxes2: Any, *, dtype: str) -> Any:
        number = np.dtype(dtype).type
        out = np.zeros((len(boxes1), len(boxes2)), dtype)
        for i, a in enumerate(boxes1.astype(dtype)):
            for j, b in enumerate(boxes2.astype(dtype)):
                width = max(number(0), min(a[2], b[2]) - max(a[0], b[0]))
                height = max(number(0), min(a[3], b[3]) - max(a[1], b[1]))
                both = width * height
                either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
                hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
                out[i, j] = (both / either if either > 0 else 0) - ((hull - either) / hull if hull > 0 else 0)
        return out

    def assign(self, cost: Any, *, dtype: str) -> Any:
        """Best total of the first rows for every set of columns, by dynamic programming."""
        if cost.shape[0] > cost.shape[1]:
            rows, columns = self.assign(cost.T, dtype=dtype)
            return columns, rows
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for row in cost.astype(dtype):
            after: dict[int, tuple[float, tuple[int, ...]]] = {}
            for taken, (total, chosen) in best.items():
                for column, price in enumerate(row):
                    if not taken >> column & 1:
                        candidate = (total + price, (*chosen, column))
                        key = taken | 1 << column
                        after[key] = min(after.get(key, (np.inf, candidate[1])), candidate)
            best = after
        chosen = min(best.values())[1]
        return np.arange(len(chosen)), np.array(chosen, dtype=np.int64)
