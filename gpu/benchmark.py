"""Measure speed and memory on this machine.

    smca benchmark                    all of it
    smca benchmark --only attention   the SMCA attention backends against each other, over one level
    smca benchmark --only multi-scale the same over three levels
    smca benchmark --only step        a whole training step against transformers' DETR and Conditional DETR

Every case runs in a process of its own and the processes take turns (A B C, A B C …), so that a machine whose speed drifts
slows all alike. Times are medians; ratios are medians of the ratios turn by turn. Memory is the most that the process held
above what it held before the case was built.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from rich.progress import Progress
from torch import Tensor

from smca.datasets import Targets
from smca.gpu.attention import Level, multi_scale_smca_attention, smca_attention
from smca.gpu.config import BackboneConfig, LossConfig, ModelConfig
from smca.gpu.criterion import SetCriterion
from smca.gpu.model import SMCADETR

Step = Callable[[], dict[str, Tensor]]
"""One repetition of a case; returns tensors by which cases can be compared."""

STEP_BACKBONE: dict[str, Any] = {
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128, 256],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
"""A small stride-32 ResNet for the training step: what is compared is the detector, not the backbone they share."""


@dataclass(frozen=True)
class Size:
    """Sizes of the compared attention."""

    batch: int = 2
    """B, images."""
    heads: int = 8
    """h, attention heads."""
    queries: int = 300
    """N, object queries."""
    channels: int = 32
    """d, channels a head."""
    maps: tuple[tuple[int, int], ...] = ((50, 84), (25, 42), (13, 21))
    """(H, W) of each level, finest first: strides 16, 32 and 64 of an 800×1344 image. The single-scale part takes the first."""


@dataclass(frozen=True)
class BenchmarkArgs:
    """Measure speed and memory on this machine."""

    only: Literal["attention", "multi-scale", "step"] | None = None
    """Measure this part alone."""
    repeats: int = 7
    """Counted turns of each case, after one that is not counted."""
    threads: int = 2
    """CPU threads of each case."""
    attention: Size = Size()
    """Sizes of the attention comparison."""
    image_size: tuple[int, int] = (800, 1216)
    """(height, width) in pixels of the two images of the training step."""
    output: Path = Path("runs/benchmark")
    """Folder that receives benchmark.json and benchmark.md."""


def attention_case(backend: str, size: Size) -> Step:
    """Forward and backward of SMCA attention over every level in float32; compares output and all gradients."""
    generator = torch.Generator().manual_seed(0)
    b, h, n, d = size.batch, size.heads, size.queries, size.channels

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    inputs = {"q": leaf(b, h, n, d)}
    levels = []
    for index, (height, width) in enumerate(size.maps):
        keys = height * width
        center = torch.rand(b, h, n, 2, generator=generator) * torch.tensor([width, height])
        precision = (
            torch.rand(b, h, n, 2, generator=generator) * 0.25 * 4.0**index
        )  # the same width in pixels on every level
        level = Level(
            leaf(b, h, keys, d),
            leaf(b, h, keys, d),
            center.requires_grad_(),
            precision.requires_grad_(),
            (height, width),
        )
        levels.append(level)
        suffix = f" of level {index}" * (len(size.maps) > 1)
        inputs |= {f"{name}{suffix}": value for name, value in level._asdict().items() if isinstance(value, Tensor)}
    weights = torch.rand(b, n, len(levels), generator=generator).softmax(dim=-1).requires_grad_()
    if len(levels) > 1:
        inputs["level_weights"] = weights
    grad_out = torch.randn(b, h, n, d, generator=generator)

    def step() -> dict[str, Tensor]:
        if len(levels) == 1:
            out = smca_attention(inputs["q"], *levels[0], backend=backend)
        else:
            out = multi_scale_smca_attention(inputs["q"], levels, weights, backend=backend)
        grads = torch.autograd.grad(out, list(inputs.values()), grad_out)
        return {"out": out.detach(), **{f"grad {name}": grad for name, grad in zip(inputs, grads, strict=True)}}

    return step


def smca_step_case(cross_attention: Literal["smca", "dense"], image_size: tuple[int, int]) -> Step:
    """Forward, loss and backward of our model: 6 + 6 layers, 300 queries, 80 classes."""
    torch.manual_seed(0)
    backbone = BackboneConfig(options=STEP_BACKBONE, frozen_norm=True, frozen_stages=2)
    model = SMCADETR(ModelConfig(backbone=backbone, cross_attention=cross_attention)).train()
    criterion = SetCriterion(LossConfig())
    images, labels, boxes = _two_images(image_size)
    targets = Targets(labels, boxes, torch.ones_like(labels, dtype=torch.bool))

    def step() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        loss = criterion(model(images), targets)["loss"]
        loss.backward()
        return {"loss": loss.detach()}

    return step


def transformers_step_case(name: Literal["Detr", "ConditionalDetr"], image_size: tuple[int, int]) -> Step:
    """Forward, loss and backward of transformers' model of the same size around the same backbone."""
    torch.manual_seed(0)
    backbone: Any = transformers.AutoConfig.for_model("resnet", **STEP_BACKBONE, out_features=["stage4"])
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone,
        num_queries=300,
        num_labels=80,
        auxiliary_loss=True,
        activation_dropout=0.1,  # as DETR was published, and as ours has it: transformers' default leaves that work out
    )
    model = getattr(transformers, f"{name}ForObjectDetection")(config).train()
    # Train what DETR trains and what ours trains, all but the stem and the first stage: transformers means to, but looks for
    # "stage.1" where its own ResNet says "stages.1", and so leaves the whole backbone out of the backward pass.
    for parameter_name, parameter in model.model.backbone.named_parameters():
        parameter.requires_grad_(not any(part in parameter_name for part in ("embedder", "stages.0")))
    images, labels, boxes = _two_images(image_size)
    targets = [{"class_labels": c, "boxes": b} for c, b in zip(labels, boxes, strict=True)]

    def step() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        loss = model(pixel_values=images, labels=targets).loss
        loss.backward()
        return {"loss": loss.detach()}

    return step


def _two_images(image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, *image_size, generator=generator)
    labels = torch.randint(80, (2, 10), generator=generator)
    center = torch.rand(2, 10, 2, generator=generator) * 0.6 + 0.2
    extent = torch.rand(2, 10, 2, generator=generator) * 0.3 + 0.05
    return images, labels, torch.cat([center, extent], dim=-1)


def _serve(build: Callable[[], Step], threads: int, pipe: Connection) -> None:
    """In a process of its own: build the case, then run it once for each request."""
    torch.set_num_threads(threads)
    before = _peak_mib()
    step = build()
    while pipe.recv() == "run":
        start = time.perf_counter()
        values = step()
        seconds = time.perf_counter() - start
        pipe.send((seconds, _peak_mib() - before, {k: v.numpy() for k, v in values.items()}))


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def measure(cases: dict[str, Callable[[], Step]], repeats: int, threads: int, progress: Progress) -> dict[str, Any]:
    """Run `cases` in turn; the first named is what the others are compared with.

    Returns:
        by case: seconds (of each turn), peak_mib, and against the first case the ratio of time ("times as long", median of
        turns) and the relative difference of each value (‖a − b‖/‖b‖).
    """
    context = multiprocessing.get_context("spawn")
    workers = {}
    task = progress.add_task(" / ".join(cases), total=len(cases) * (repeats + 1))
    for name, build in cases.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(build, threads, theirs), daemon=True)
        process.start()
        workers[name] = (process, ours)
    results: dict[str, Any] = {name: {"seconds": []} for name in cases}
    values = {}
    for turn in range(repeats + 1):
        for name, (_, pipe) in workers.items():
            pipe.send("run")
            seconds, peak, values[name] = pipe.recv()
            results[name]["peak_mib"] = peak
            if turn:  # the first turn warms up
                results[name]["seconds"].append(seconds)
            progress.advance(task)
    for process, pipe in workers.values():
        pipe.send("stop")
        process.join()
    first = next(iter(cases))
    for name, result in results.items():
        result["median_seconds"] = statistics.median(result["seconds"])
        ratios = [a / b for a, b in zip(result["seconds"], results[first]["seconds"], strict=True)]
        result["times_as_long"] = statistics.median(ratios)
        result["times_as_long_spread"] = [min(ratios), max(ratios)]
        # A case smaller than a MiB hides in what importing took: no ratio can be read off it.
        result["times_the_memory"] = max(result["peak_mib"], 1.0) / max(results[first]["peak_mib"], 1.0)
        result["difference"] = {
            key: float(((values[name][key] - b) ** 2).sum() ** 0.5 / max((b**2).sum() ** 0.5, 1e-30))
            for key, b in values[first].items()
        }
    return results


def table(title: str, results: dict[str, Any], *, differences: bool) -> str:
    """One comparison as Markdown."""
    first = next(iter(results))
    lines = [
        f"### {title}",
        "",
        f"| case | median | time against {first} (min–max) | peak memory | memory against {first} |",
    ]
    lines.append("|---|---|---|---|---|")
    for name, r in results.items():
        low, high = r["times_as_long_spread"]
        lines.append(
            f"| {name} | {r['median_seconds']:.3f} s | {r['times_as_long']:.2f}× ({low:.2f}–{high:.2f}) "
            f"| {r['peak_mib']:.0f} MiB | {r['times_the_memory']:.2f}× |"
        )
    if differences:
        worst = {n: max(r["difference"].items(), key=lambda kv: kv[1]) for n, r in results.items() if n != first}
        lines += [
            "",
            *(f"Largest relative difference of {n} from {first}: {v:.1e} ({k})." for n, (k, v) in worst.items()),
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``smca benchmark``."""
    args = tyro.cli(BenchmarkArgs, args=argv, prog="smca benchmark")
    sizes = {
        "attention": ("SMCA attention", replace(args.attention, maps=args.attention.maps[:1])),
        "multi-scale": ("Multi-scale SMCA attention", args.attention),
    }
    parts: dict[str, tuple[str, dict[str, Callable[[], Step]], bool]] = {
        name: (
            f"{title}, forward and backward (B={a.batch}, h={a.heads}, N={a.queries}, d={a.channels}, keys: "
            f"{', '.join(f'{height}×{width}' for height, width in a.maps)})",
            {backend: partial(attention_case, backend, a) for backend in ("lifted", "eager")},
            True,
        )
        for name, (title, a) in sizes.items()
    }
    parts |= {
        "step": (
            f"Training step: forward, loss, backward (two {args.image_size[0]}×{args.image_size[1]} images, 6+6 layers, "
            "300 queries)",
            {
                "smca": partial(smca_step_case, "smca", args.image_size),
                "dense": partial(smca_step_case, "dense", args.image_size),
                "transformers Detr": partial(transformers_step_case, "Detr", args.image_size),
                "transformers ConditionalDetr": partial(transformers_step_case, "ConditionalDetr", args.image_size),
            },
            False,
        ),
    }
    chosen = [args.only] if args.only else list(parts)
    header = (
        f"{date.today()} · {platform.machine()} CPU, {args.threads} threads · torch {torch.__version__} · "
        f"transformers {transformers.__version__} · median of {args.repeats} turns, float32"
    )
    record: dict[str, Any] = {"header": header, "parts": {}}
    text = [header]
    with Progress() as progress:
        for name in chosen:
            title, cases, differences = parts[name]
            record["parts"][name] = measure(cases, args.repeats, args.threads, progress)
            text += ["", table(title, record["parts"][name], differences=differences)]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "benchmark.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.output / "benchmark.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    print(f"\nwritten to {args.output}/benchmark.json and benchmark.md")


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
