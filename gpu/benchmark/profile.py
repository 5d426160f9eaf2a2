"""Where the time of a training step goes, part by part, compared with the least that each part could take on this machine.

A clock reading cuts a step where one part hands over to the next, forward and backward. (On a GPU it is an event in the stream,
so that time in which the GPU waits is included.) The cuts are identity functions on the tensors that are handed over; their
backward passes cut the backward pass, in which autograd runs a part's operations before those of the parts that precede it.

A floor is a time that no implementation can beat: operations over the rate of a large matrix product, or bytes over the rate of a
large copy, whichever takes longer, both rates measured in the same run. Operations are those of products and convolutions
(``torch.utils.flop_counter``; for SMCA attention the four and eight of its definition). Bytes are a part's inputs, outputs and
parameters once, twice for a backward pass, and nothing that stays inside a part.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from smca.gpu.benchmark.cases import Work, autocast, smca_detector, trained_by_adamw
from smca.gpu.benchmark.measure import timed
from smca.gpu.benchmark.report import PARTS
from smca.gpu.loss import criterion as criterion_module
from smca.gpu.model import decoder as decoder_module
from smca.gpu.training.determinism import without_denormals

Where = tuple[str, str]
"""Part and direction, "forward" or "backward"; what has no backward pass is all "forward"."""


class Cuts:
    """Clock readings at the borders between the parts of a step, and the bytes that cross them."""

    def __init__(self, read: Callable[[], Any]) -> None:
        """`read`: a clock, or any other counter that increases."""
        self.read = read
        self.taken: list[tuple[Where, Any]] = []
        self.bytes: dict[Where, float] = defaultdict(float)
        self.attention_flops = 0.0

    def enter(self, part: str, direction: str = "forward") -> None:
        """What runs from here on belongs to `part`."""
        self.taken.append(((part, direction), self.read()))

    def cross(self, outer: str, inner: str, tree: Any) -> Any:
        """`tree`, whose tensors are handed from `outer` to `inner`, and whose gradients the other way."""
        leaves, spec = tree_flatten(tree)
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for part in (outer, inner):
            self.bytes[part, "forward"] += _bytes(leaves[i] for i in at)
        handed = _Border.apply(self, outer, inner, *(leaves[i] for i in at))  # type: ignore[no-untyped-call]
        for i, tensor in zip(at, handed, strict=True):
            leaves[i] = tensor
        return tree_unflatten(leaves, spec)

    def spans(self, between: Callable[[Any, Any], float]) -> dict[Where, float]:
        """Differences between successive readings, summed by part and direction; clears the readings."""
        total: dict[Where, float] = defaultdict(float)
        for (where, start), (_, end) in zip(self.taken, self.taken[1:], strict=False):
            total[where] += between(start, end)
        self.taken = []
        return total


class _Border(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cuts: Cuts, outer: str, inner: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.cuts, ctx.outer = cuts, outer
        cuts.enter(inner)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.cuts.enter(ctx.outer, "backward")
        return (None, None, None, *grads)


@without_denormals()  # as in training
def profile_step(preset: str, work: Work, repeats: int, stem: Path, threads: int | None = None) -> dict[str, Any]:
    """Profile our training step, including gradient clipping, AdamW and the transfer of images from the host.

    Args:
        preset, work: as in ``smca_step_case``, with the backend "auto".
        repeats: counted steps.
        stem: STEM.trace.json.gz receives one step for chrome://tracing, STEM.ops.txt its operators by time.
        threads: number of threads on a CPU.

    Returns:
        "rates" (flops, bytes and transfer, per second), "step_seconds", and "parts": part → direction → "seconds" (median),
        "floor_seconds", "flops", "bytes".
    """
    if threads is not None:
        torch.set_num_threads(threads)
    cuda = work.device.startswith("cuda")
    model, criterion, targets, images = smca_detector(preset, "auto", work)
    optimizer = trained_by_adamw(model, model.backbone)
    pixels = (images * 255).byte().contiguous().cpu()
    pixels = pixels.pin_memory() if cuda else pixels
    del images
    cuts = Cuts(_event if cuda else time.perf_counter)

    def step() -> None:
        cuts.enter("input")
        on_device = pixels.to(work.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        cuts.enter("rest")
        with autocast(work):
            outputs = model(on_device)
        loss = criterion(cuts.cross("rest", "criterion", outputs), targets)["loss"]
        optimizer.zero_grad(set_to_none=True)
        cuts.enter("criterion", "backward")
        loss.backward()
        cuts.enter("optimizer")
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        cuts.enter("end")

    model.train()
    with _cut(model, cuts):
        for _ in range(2):  # not counted
            step()
        seconds = []
        for _ in range(repeats):
            cuts.taken = []
            step()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(cuts.spans(_elapsed if cuda else lambda a, b: b - a))
        cuts.bytes.clear()
        cuts.attention_flops = 0.0
        with FlopCounterMode(display=False) as counter:
            clock, cuts.read = cuts.read, counter.get_total_flops
            step()
        flops = cuts.spans(lambda a, b: b - a)
        flops["attention", "forward"], flops["attention", "backward"] = cuts.attention_flops, 2 * cuts.attention_flops
        moved = _bytes_moved(cuts.bytes, model, pixels)
        cuts.read = clock
        _trace(step, stem, cuda)
    return _compare(seconds, flops, moved, measured_rates(work))


def measured_rates(work: Work) -> dict[str, float]:
    """Rates per second of this machine: "flops" of a large matrix product in the dtype of `work`, "bytes" read and written by a
    large copy, and bytes of "transfer" from the host's pinned memory (on a CPU: of a copy)."""
    cuda = work.device.startswith("cuda")
    n, size = (8192, 2**30) if cuda else (1024, 2**26)
    a, b = (torch.randn(n, n, device=work.device).to(work.dtype) for _ in range(2))
    here = torch.zeros(size, dtype=torch.uint8, device=work.device)
    target = torch.empty_like(here)
    host = torch.zeros(size // 4, dtype=torch.uint8, pin_memory=cuda)

    def best(step: Callable[[], Any]) -> float:
        return min(timed(step, work.device, 1) for _ in range(5))  # the first is slow, and so not the best

    rates = {"flops": 2 * n**3 / best(lambda: torch.mm(a, b)), "bytes": 2 * size / best(lambda: target.copy_(here))}
    return {**rates, "transfer": host.numel() / best(lambda: target[: host.numel()].copy_(host, non_blocking=True))}


@contextmanager
def _cut(model: Any, cuts: Cuts) -> Iterator[None]:
    """Within the context, cuts are taken around the model's parts, its attention and the matcher."""
    removable = []
    for name in ("backbone", "encoder", "decoder"):
        part: nn.Module = getattr(model, name)
        removable.append(part.register_forward_pre_hook(lambda _, args, name=name: cuts.cross("rest", name, args)))
        removable.append(part.register_forward_hook(lambda _, __, out, name=name: cuts.cross(name, "rest", out)))
    decoder, criterion = cast(Any, decoder_module), cast(Any, criterion_module)  # their imports are replaced
    attend, match = decoder.multi_scale_smca_attention, criterion.match

    def cut_attend(q: Tensor, levels: Any, level_weights: Tensor, **options: Any) -> Any:
        keys = sum(level.k.shape[2] for level in levels)
        cuts.attention_flops += 4 * q.numel() * keys  # q·k and A·v: two operations each per query, key and channel
        q, levels, level_weights = cuts.cross("decoder", "attention", (q, levels, level_weights))
        return cuts.cross("attention", "decoder", attend(q, levels, level_weights, **options))

    def cut_match(*args: Any, **options: Any) -> Tensor:
        cuts.bytes["matcher", "forward"] += _bytes(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        cuts.enter("matcher")
        query: Tensor = match(*args, **options)
        cuts.enter("criterion")
        return query

    decoder.multi_scale_smca_attention, criterion.match = cut_attend, cut_match
    try:
        yield
    finally:
        decoder.multi_scale_smca_attention, criterion.match = attend, match
        for handle in removable:
            handle.remove()


def _bytes_moved(crossed: dict[Where, float], model: nn.Module, pixels: Tensor) -> dict[Where, float]:
    """Bytes that each part must move at least."""
    moved = dict(crossed)
    for name in ("backbone", "encoder", "decoder"):
        moved[name, "forward"] += _bytes(model.get_submodule(name).parameters())
    for part in PARTS:
        if part != "matcher":
            moved[part, "backward"] = 2 * moved.get((part, "forward"), 0.0)
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    # AdamW reads weight, gradient and two moments and writes all but the gradient; clipping reads the gradients once before.
    moved["optimizer", "forward"] = 8 * trained
    moved["input", "forward"] = pixels.numel()
    return moved


def _compare(
    seconds: list[dict[Where, float]], flops: dict[Where, float], moved: dict[Where, float], rates: dict[str, float]
) -> dict[str, Any]:
    parts: dict[str, dict[str, dict[str, float]]] = {}
    for part in PARTS:
        for direction in ("forward", "backward"):
            where = part, direction
            if not any(where in turn for turn in seconds):
                continue
            floor = moved.get(where, 0.0) / rates["transfer" if part == "input" else "bytes"]
            parts.setdefault(part, {})[direction] = {
                "seconds": statistics.median(turn.get(where, 0.0) for turn in seconds),
                "floor_seconds": max(floor, flops.get(where, 0.0) / rates["flops"]),
                "flops": flops.get(where, 0.0),
                "bytes": moved.get(where, 0.0),
            }
    step = statistics.median(sum(turn.values()) for turn in seconds)
    return {"rates": rates, "step_seconds": step, "parts": parts}


def _trace(step: Callable[[], None], stem: Path, cuda: bool) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    stem.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(f"{stem}.trace.json.gz")
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    Path(f"{stem}.ops.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=60), encoding="utf-8")


def _bytes(tensors: Any) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _event() -> Any:
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _elapsed(start: Any, end: Any) -> float:
    return float(start.elapsed_time(end)) / 1e3
