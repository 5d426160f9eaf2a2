"""Muon for the matrices of the network, AdamW for everything else, as one optimiser.

    B ← 0.95·B + 0.05·G                           momentum B of the gradient G, both as matrices [out, in·k·k]
    U = orthogonal(0.05·G + 0.95·B)               Nesterov's look ahead; all singular values become about 1
    W ← W − lr·√max(1, out/in·k·k)·U

Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/; at scale: arXiv 2502.16982. ``torch.optim.Muon`` does not serve: it
takes no convolution kernels, ignores ``found_inf`` (smca.gpu.training.guard), and goes through the matrices one by one. A step with
the 56 of ``demo`` (1.3 M numbers; kernels handed over as matrices) takes it 25 ms on one thread of an EPYC CPU, 31 ms on two; here,
AdamW's part included, 17 and 18 ms: 0.68 and 0.58 of that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smca.gpu.training.sharding import local, part_like, whole_like

MOMENTUM = 0.95
LEAST_SIDE = 16
"""A matrix with a shorter side is left to AdamW: of few rows, making all equally long says little."""
_HEADS = ("class_head", "offset_head", "scale_head", "level_head")
"""Layers whose outputs are quantities of their own (a class's logit, an offset, a width, a weight), which need not change alike."""
_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Of the polynomial a·s + b·s³ + c·s⁵ that each step applies to the singular values: it lifts small ones the fastest."""
_STEPS = 5


def matrices_of(model: nn.Module) -> list[Tensor]:
    """The trained parameters that Muon takes: the one place that says so.

    Weights of linear layers and of convolutions between feature maps, if as a matrix [out, in·k·k] both sides are ``LEAST_SIDE`` or
    more. Not taken: convolutions that read the image or in which an output reads only some of the inputs (depthwise ones: no
    matrix), the heads of ``_HEADS``, and parameters of no such layer (queries, embeddings, norms, biases).
    """
    taken = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or name.rpartition(".")[2] in _HEADS:
            continue
        if isinstance(module, nn.Conv2d) and (module.in_channels == 3 or module.groups > 1):
            continue
        if module.weight.requires_grad and min(_as_matrix(module.weight).shape) >= LEAST_SIDE:
            taken.append(module.weight)
    return taken


def fast_dtype(device: torch.device) -> torch.dtype:
    """The precision in which ``orthogonalize`` is fast: bfloat16 where the device multiplies it in hardware, float32 elsewhere.

    On one thread of an EPYC CPU with AVX512-BF16, a step of ``demo`` takes Muon 17 ms in bfloat16 and 47 ms in float32. Kept from
    these instructions, the same CPU takes 58 ms in bfloat16, and kept to AVX2 760 ms; in float32 as long as before.
    """
    bf16 = False
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        bf16 = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly the orthogonal matrix nearest to each: the same singular vectors, singular values of about 1.

    Five Newton–Schulz steps. Singular values of at least 0.0015 of the matrix's Frobenius norm end between 0.68 and 1.20, smaller
    ones below; in bfloat16 they are off by 0.01.

    Args:
        matrices: [k, m, n], m ≤ n (with m > n it is as exact, but slower).
        dtype: to compute in.

    Returns:
        [k, m, n] in `dtype`; of a matrix of zeros, zeros.
    """
    a, b, c = _QUINTIC
    norm = matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(matrices.dtype).tiny)
    x: Tensor = (matrices / norm).to(dtype)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon for some groups of parameters, AdamW for others.

    No step waits for the device. A checkpoint holds the momentum of each matrix beside AdamW's state. As with a fused AdamW,
    ``found_inf`` may be set: a scalar on the device, 1 = skip the next step.
    """

    def __init__(
        self, others: Sequence[dict[str, Any]], matrices: Sequence[dict[str, Any]], dtype: torch.dtype, **adamw: Any
    ) -> None:
        """Take groups of parameters, each with its "lr"; ``param_groups`` lists them in this order.

        Args:
            others: for AdamW.
            matrices: for Muon, each parameter with at least two axes.
            dtype: of the Newton–Schulz steps.
            adamw: further arguments of ``torch.optim.AdamW``.
        """
        self._adamw = torch.optim.AdamW(others, **adamw)
        self._dtype = dtype
        super().__init__([*self._adamw.param_groups, *matrices], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        first = len(self._adamw.param_groups)
        # Loading a state dict replaces both, so they are handed over anew each time.
        self._adamw.param_groups, self._adamw.state = self.param_groups[:first], self.state
        self._adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self._adamw.step()

        alike: defaultdict[tuple[int, ...], list[tuple[Tensor, float]]] = defaultdict(list)
        for group in self.param_groups[first:]:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[tuple(sorted(_as_matrix(parameter).shape))].append((parameter, group["lr"]))
        for pairs in alike.values():
            self._step_alike([parameter for parameter, _ in pairs], [lr for _, lr in pairs], found_inf)

    def _step_alike(self, parameters: list[Tensor], lrs: list[float], found_inf: Tensor | None) -> None:
        """Move matrices whose shorter and longer sides are the same, in one batch: tall ones lie on their side. Of a matrix that is
        divided over processes, each makes all of the update, and takes its part of it."""
        grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        momenta = [local(self._momentum(parameter)) for parameter in parameters]
        if found_inf is not None:  # then the momentum stays as it is
            grads = [torch.where(found_inf > 0, b, g) for b, g in zip(momenta, grads, strict=True)]
        torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
        updates = torch._foreach_lerp(grads, momenta, MOMENTUM)
        ahead = [_as_matrix(whole_like(u, p)) for u, p in zip(updates, parameters, strict=True)]
        tall = [update.shape[0] > update.shape[1] for update in ahead]
        lying = torch.stack([update.mT if t else update for update, t in zip(ahead, tall, strict=True)])
        moves = orthogonalize(lying, self._dtype).to(lying.dtype)
        if found_inf is not None:
            moves *= 1 - found_inf
        for parameter, lr, move, t in zip(parameters, lrs, moves, tall, strict=True):
            rows, columns = (move.mT if t else move).shape
            step = part_like((move.mT if t else move).reshape(parameter.shape), parameter)
            local(parameter).add_(step, alpha=-lr * math.sqrt(max(1.0, rows / columns)))

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Of the gradient, in the parameter's shape."""
        state: dict[str, Tensor] = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def _as_matrix(parameter: Tensor) -> Tensor:
    """[out, in] or [out, in, k, k] → [out, in·k·k]."""
    return parameter.flatten(1)
