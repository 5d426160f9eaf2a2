"""What ``smca benchmark`` measures: each function here builds one case, on any device.

A case is a dictionary of steps by mode, "forward" and "forward+backward" or "inference" and "training"; a step does the work
once and returns tensors by which cases can be compared. The last mode is the heaviest.

Shape letters: B images, N queries, h heads, d channels a head, L keys of a map, M decoder layers, T targets.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from smca.gpu.attention import Level, cell_centers, multi_scale_smca_attention, smca_attention

Step = Callable[[], dict[str, Tensor]]
"""One repetition of a case in one mode."""
Case = dict[str, Step]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int]], Tensor]
"""(q, k, v, center_xy, precision_xy, size) → [B, h, N, d], shapes as in ``smca_attention``."""

STEP_BACKBONE: dict[str, Any] = {
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128, 256],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
"""A small stride-32 ResNet for the training step on a CPU: what is compared is the detector, not the backbone they share."""
RESNET50: dict[str, Any] = {"depths": [3, 4, 6, 3]}

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Kernels of scaled_dot_product_attention that store nothing of size N × L."""

QUERIES, TARGETS, LAYERS = 300, 20, 6  # of an assignment problem


@dataclass(frozen=True)
class Size:
    """Sizes of the compared attention."""

    batch: int | None = None
    """B, images; 2 on a CPU and 16 on a GPU if not given."""
    heads: int = 8
    """h, attention heads."""
    queries: int = 300
    """N, object queries."""
    channels: int = 32
    """d, channels a head."""
    maps: tuple[tuple[int, int], ...] = ((50, 84), (25, 42), (13, 21))
    """(H, W) of each level, finest first: strides 16, 32 and 64 of an 800×1344 image. The single-scale part takes the first,
    on a GPU the second too."""


@dataclass(frozen=True)
class Work:
    """What a detector is given to do."""

    image_size: tuple[int, int]
    """(height, width) in pixels; no padding."""
    batch: int = 2
    """B, images."""
    dtype: torch.dtype = torch.float32
    """bfloat16 means autocast."""
    device: str = "cpu"
    small: bool = True
    """STEP_BACKBONE, and training without the optimiser; otherwise a ResNet-50, gradient clipping and AdamW."""


def attention_case(name: str, dtype: torch.dtype, size: Size, device: str = "cpu") -> Case:
    """SMCA attention over every level: "forward", and "forward+backward" with all gradients.

    q, k, v and the output's gradient are numbers that bfloat16 holds exactly, whatever `dtype` they are in, and the priors
    are float32: every case of a comparison computes on the same numbers, so that what differs is its arithmetic.

    Args:
        name: "eager", "lifted" or "triton" (of ``smca_attention``; "lifted" in float32 whatever `dtype`), or a key of
            ``ATTENTIONS``.
        dtype: of q, k, v and the output.
        size: `batch` must be given.
        device: "cpu" or "cuda".

    Raises:
        ValueError: an unknown name, or a backend that cannot run on `device`.
    """
    start, maps, weights, grad_out = _attention_inputs(size)
    weights = weights.to(device, copy=True).requires_grad_()
    grad_out = grad_out.to(device, dtype)
    inputs = {"q": start.to(device, dtype, copy=True).requires_grad_()}
    levels = []
    for index, level in enumerate(maps):
        low = (t.to(device, dtype, copy=True).requires_grad_() for t in level[:2])
        prior = (t.to(device, copy=True).requires_grad_() for t in level[2:4])
        levels.append(Level(*low, *prior, level.size))
        suffix = f" of level {index}" * (len(maps) > 1)
        inputs |= {f"{n}{suffix}": t for n, t in levels[-1]._asdict().items() if isinstance(t, Tensor)}
    if len(levels) > 1:
        inputs["level_weights"] = weights
    if name == "plain":  # what has no prior has no gradient to it
        inputs = {n: t for n, t in inputs.items() if "_xy" not in n}

    def attend() -> Tensor:
        if name in ATTENTIONS:
            attention = ATTENTIONS[name]
            found = [attention(inputs["q"], *level[:4], level.size) for level in levels]
            if len(levels) == 1:
                return found[0]
            parts = (o * w[:, None, :, None].to(o.dtype) for o, w in zip(found, weights.unbind(-1), strict=True))
            return functools.reduce(torch.add, parts)
        q, given, wide = inputs["q"], levels, torch.float32
        if name == "lifted" and dtype != wide:
            q, given = q.to(wide), [level._replace(k=level.k.to(wide), v=level.v.to(wide)) for level in levels]
        with _fused_only(q) if name == "lifted" else contextlib.nullcontext():
            if len(levels) == 1:
                return smca_attention(q, *given[0], backend=name).to(dtype)
            return multi_scale_smca_attention(q, given, weights, backend=name).to(dtype)

    def forward() -> dict[str, Tensor]:
        # FlexAttention is compiled anew for the other grad mode; what it keeps for a backward pass is next to nothing.
        with torch.set_grad_enabled(name.startswith("flex")):
            return {"out": attend().detach()}

    def both() -> dict[str, Tensor]:
        out = attend()
        grads = torch.autograd.grad(out, list(inputs.values()), grad_out)
        return {"out": out.detach(), **{f"grad {n}": grad for n, grad in zip(inputs, grads, strict=True)}}

    return {"forward": forward, "forward+backward": both}


@functools.lru_cache(maxsize=1)
def _attention_inputs(size: Size) -> tuple[Tensor, list[Level], Tensor, Tensor]:
    """q, levels, level weights and gradient of the output, in float32 on the host."""
    generator = torch.Generator().manual_seed(0)
    assert size.batch is not None
    b, h, n, d = size.batch, size.heads, size.queries, size.channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().float()

    q, levels = normal(b, h, n, d), []
    for index, (height, width) in enumerate(size.maps):
        center = torch.rand(b, h, n, 2, generator=generator) * torch.tensor([width, height])
        # The same width in pixels on every level.
        precision = torch.rand(b, h, n, 2, generator=generator) * 0.25 * 4.0**index
        keys = height * width
        levels.append(Level(normal(b, h, keys, d), normal(b, h, keys, d), center, precision, (height, width)))
    weights = torch.rand(b, n, len(levels), generator=generator).softmax(dim=-1)
    return q, levels, weights, normal(b, h, n, d)


def _fused_only(q: Tensor) -> contextlib.AbstractContextManager[None]:
    """On CUDA, rather fail than fall back to the form that stores N × L numbers: that would be another case."""
    return sdpa_kernel(FUSED) if q.is_cuda else contextlib.nullcontext()


def plain(q: Tensor, k: Tensor, v: Tensor, _c: Tensor, _p: Tensor, _s: tuple[int, int]) -> Tensor:
    """Attention without a prior: the floor."""
    with _fused_only(q):
        return functional.scaled_dot_product_attention(q, k, v)


def sdpa_mask(q: Tensor, k: Tensor, v: Tensor, center_xy: Tensor, precision_xy: Tensor, size: tuple[int, int]) -> Tensor:
    """log G written out as a mask, which the kernel wants in the dtype of q. Any kernel may serve it."""
    x, y = cell_centers(size, center_xy)
    dx, dy = x - center_xy[..., 0, None], y - center_xy[..., 1, None]
    log_g = -0.5 * (precision_xy[..., 0, None] * dx.square() + precision_xy[..., 1, None] * dy.square())
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=log_g.to(q.dtype))


def lifted_bf16_split(
    q: Tensor, k: Tensor, v: Tensor, center_xy: Tensor, precision_xy: Tensor, size: tuple[int, int]
) -> Tensor:
    """The lifted form in bfloat16, each extra factor a sum of bfloat16 parts, so that fused half-precision kernels apply.

    Positions x relative to the middle are exact in one part and x² in two, on maps of up to 256 cells a side; −½λ and λc take
    three parts. Products of bfloat16 are exact in the float32 that kernels sum in, so the forward logits are those of the
    lifted form in float32, but for the third part of −½λ times the second of x², about 2⁻²⁴ of the whole, which is left out:
    eight channels an axis. The backward pass is not as exact: kernels round the logits' gradient to bfloat16 before they sum
    it times x and x², which cancel. (Factors by low rank: arXiv 2505.12044. Sums of bfloat16: arXiv 1904.06376.)

    Raises:
        ValueError: a map of more than 256 cells a side.
    """
    if max(size) > 256:
        raise ValueError(f"lifted-bf16-split needs maps of at most 256 cells a side, got {size}")
    channels, half = q.shape[-1], torch.bfloat16
    q_extra, k_extra = [], []
    for axis, positions in enumerate(cell_centers(size, center_xy.float())):
        middle = size[1 - axis] / 2
        position = positions - middle
        # scaled_dot_product_attention divides all by √d: scaling q itself beforehand would round it again.
        precision = precision_xy[..., axis].float() * channels**0.5
        square = _split(position.square(), 2)
        narrow = _split(-0.5 * precision, 3)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0)):
            q_extra.append(narrow[i])
            k_extra.append(square[j])
        for part in _split(precision * (center_xy[..., axis].float() - middle), 3):
            q_extra.append(part)
            k_extra.append(position.to(half))
    width = -(-(channels + len(q_extra)) // 8) * 8
    pad = width - channels - len(q_extra)
    key_terms = functional.pad(torch.stack(k_extra, dim=-1), (0, pad)).expand(*k.shape[:3], -1)
    q_lifted = torch.cat([q.to(half), functional.pad(torch.stack(q_extra, dim=-1), (0, pad))], dim=-1)
    k_lifted = torch.cat([k.to(half), key_terms], dim=-1)
    v_lifted = functional.pad(v.to(half), (0, width - channels))
    with _fused_only(q):
        out = functional.scaled_dot_product_attention(q_lifted, k_lifted, v_lifted, scale=channels**-0.5)
    return out[..., :channels].to(q.dtype)


def _split(value: Tensor, parts: int) -> list[Tensor]:
    """bfloat16 tensors whose sum is `value`, but for what the last rounds off. Gradients reach `value` through the first."""
    found, rest = [], value
    for _ in range(parts):
        found.append(rest.to(torch.bfloat16))
        rest = (rest - found[-1].to(rest.dtype)).detach()
    return found


def flex(q: Tensor, k: Tensor, v: Tensor, center_xy: Tensor, precision_xy: Tensor, size: tuple[int, int]) -> Tensor:
    """FlexAttention with log G as its score_mod; not compiled, so that it writes all scores out. On CUDA see ``ATTENTIONS``."""
    from torch.nn.attention.flex_attention import flex_attention

    width = size[1]

    def score_mod(score: Tensor, b: Tensor, h: Tensor, n: Tensor, key: Tensor) -> Tensor:
        dx = key % width + 0.5 - center_xy[b, h, n, 0]
        dy = key // width + 0.5 - center_xy[b, h, n, 1]
        return score - 0.5 * (precision_xy[b, h, n, 0] * dx * dx + precision_xy[b, h, n, 1] * dy * dy)

    out = flex_attention(q, k, v, score_mod=score_mod)
    assert isinstance(out, Tensor)
    return out


def _flex_compiled(*args: Any) -> Tensor:
    return _compiled_flex()(*args)


@functools.cache
def _compiled_flex() -> Attention:
    # Every shape, dtype and grad mode is a compilation of its own; past the limit of 8 Dynamo would give up.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex, dynamic=False, fullgraph=True)


ATTENTIONS: dict[str, Attention] = {
    "plain": plain,
    "sdpa-mask": sdpa_mask,
    "lifted-bf16-split": lifted_bf16_split,
    "flex": _flex_compiled,
    "flex-uncompiled": flex,
}
"""Ways to compute SMCA attention beside the backends of ``smca_attention``. "flex-uncompiled" is for tests."""


def assignment_case(name: str, batch: int, device: str = "cpu") -> Case:
    """M·B assignments of 300 queries to 20 targets, all valid: "forward", costs on `device` to query indices on `device`.

    Args:
        name: "scipy" (copies to the host and back, and solves there) or "kernel" (``smca.gpu.assignment``).
        batch: B.
        device: "cpu" or "cuda".
    """
    generator = torch.Generator().manual_seed(batch)
    cost = torch.rand(LAYERS, batch, QUERIES, TARGETS, generator=generator).to(device)
    valid = torch.ones(batch, TARGETS, dtype=torch.bool, device=device)

    def kernel() -> dict[str, Tensor]:
        from smca.gpu.assignment import assign

        return {"query": assign(cost, valid)[0]}

    def scipy() -> dict[str, Tensor]:
        from scipy.optimize import linear_sum_assignment

        costs, chosen = cost.cpu().numpy(), torch.empty(LAYERS, batch, TARGETS, dtype=torch.int64)
        for layer in range(LAYERS):
            for image in range(batch):
                rows, columns = linear_sum_assignment(costs[layer, image])
                chosen[layer, image, torch.from_numpy(columns)] = torch.from_numpy(rows)
        return {"query": chosen.to(device)}

    return {"forward": {"kernel": kernel, "scipy": scipy}[name]}


def smca_step_case(preset: str, backend: str, work: Work) -> Case:
    """Our model of a preset, 80 classes: "inference", and "training", which is forward, loss and backward (see ``Work``).

    Args:
        preset: name of a preset; its backbone is replaced by that of `work`, which trains the same stages: all but the stem
            and the first, as DETR does. Weights are random.
        backend: of ``smca_attention``.
        work: what it is given to do.
    """
    from smca.datasets import Targets
    from smca.gpu.config import LossConfig
    from smca.gpu.criterion import SetCriterion
    from smca.gpu.model import SMCADETR
    from smca.gpu.presets import PRESETS, RESNET50 as PUBLISHED

    torch.manual_seed(0)
    options = STEP_BACKBONE if work.small else RESNET50
    config = PRESETS[preset]().model
    config = replace(config, backbone=replace(PUBLISHED, options=options, weights=None))
    with torch.device(work.device):
        model = SMCADETR(config, attention_backend=backend).to(work.device)
    criterion = SetCriterion(LossConfig())
    images, labels, boxes = _images(work)
    targets = Targets(labels, boxes, torch.ones_like(labels, dtype=torch.bool))

    def loss() -> Tensor:
        with _autocast(work):
            outputs = model(images)
        return criterion(outputs, targets)["loss"]  # type: ignore[no-any-return]

    return _modes(model, model.backbone, lambda: model(images)["logits"], loss, work)


def transformers_step_case(name: str, work: Work) -> Case:
    """transformers' model of the same size around the same backbone: modes as ``smca_step_case``.

    Args:
        name: "Detr", "ConditionalDetr" or "DeformableDetr". The last as published: four levels, feed-forward width 1024. Its
            attention is transformers' PyTorch code, not the authors' CUDA kernel.
        work: what it is given to do.
    """
    import transformers

    torch.manual_seed(0)
    stages = ["stage2", "stage3", "stage4"] if name == "DeformableDetr" else ["stage4"]
    options = STEP_BACKBONE if work.small else RESNET50
    backbone: Any = transformers.AutoConfig.for_model("resnet", **options, out_features=stages)
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone,
        num_queries=300,
        num_labels=80,
        auxiliary_loss=True,
        activation_dropout=0.1,  # as DETR was published, and as ours has it: transformers' default leaves that work out
    )
    with torch.device(work.device):
        model = getattr(transformers, f"{name}ForObjectDetection")(config).to(work.device)
    # Train what DETR trains and what ours trains, all but the stem and the first stage: transformers means to, but looks for
    # "stage.1" where its own ResNet says "stages.1", and so leaves the whole backbone out of the backward pass.
    for parameter_name, parameter in model.model.backbone.named_parameters():
        parameter.requires_grad_(not any(part in parameter_name for part in ("embedder", "stages.0")))
    images, labels, boxes = _images(work)
    targets = [{"class_labels": c, "boxes": b} for c, b in zip(labels, boxes, strict=True)]

    def loss() -> Tensor:
        with _autocast(work):
            return model(pixel_values=images, labels=targets).loss  # type: ignore[no-any-return]

    return _modes(model, model.model.backbone, lambda: model(pixel_values=images).logits, loss, work)


def _autocast(work: Work) -> torch.autocast:
    return torch.autocast(torch.device(work.device).type, torch.bfloat16, enabled=work.dtype == torch.bfloat16)


def _modes(
    model: nn.Module, backbone: nn.Module, outputs: Callable[[], Tensor], loss: Callable[[], Tensor], work: Work
) -> Case:
    """The steps of a detector; both sides of a comparison get theirs here."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = None
    if not work.small:
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=1e-4, fused=True)

    def inference() -> dict[str, Tensor]:
        if model.training:
            model.eval()
        with torch.no_grad(), _autocast(work):
            return {"logits": outputs().float()}

    def training() -> dict[str, Tensor]:
        if not model.training:
            model.train()
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            nn.utils.clip_grad_norm_(trained, 0.1)
            optimizer.step()
        return {"loss": value.detach()}

    return {"inference": inference, "training": training}


def _images(work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 3, H, W] in [0, 1], and ten objects in each: labels [B, 10] and boxes [B, 10, 4] cxcywh."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(work.batch, 3, *work.image_size, generator=generator).to(work.device)
    if not work.small:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(80, (work.batch, 10), generator=generator)
    center = torch.rand(work.batch, 10, 2, generator=generator) * 0.6 + 0.2
    extent = torch.rand(work.batch, 10, 2, generator=generator) * 0.3 + 0.05
    return images, labels.to(work.device), torch.cat([center, extent], dim=-1).to(work.device)
