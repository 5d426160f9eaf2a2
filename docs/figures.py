"""Rebuild the pictures and tables of docs/ from the metrics kept in docs/results/ (`make figures`).

docs/results/NAME-SEED.jsonl is the metrics.jsonl of one run; docs/convergence.md has the command of each.
docs/results/priors.jsonl is the priors.jsonl of a run whose command is in docs/method.md §3.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import starts

from smca.datasets import SyntheticShapes
from smca.gpu.pictures.drawing import compare_curves
from smca.gpu.pictures.priors import draw_priors
from smca.gpu.training.log import read_metrics
from smca.gpu.training.priors import read_priors
from smca.reference.attention import gaussian_weight_map

matplotlib.use("Agg")
from matplotlib import pyplot

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
HEADS = {"ap": "AP", "ap50": "AP50", "ap_small": "AP small", "ap_medium": "AP medium"}
LABELS = {
    "smca": "SMCA",
    "dense": "DETR (dense)",
    "small_objects": "stride 16",
    "small_objects_multiscale": "strides 8, 16, 32",
    "small_objects_stride8": "stride 8",
    "no_selection": "without scale selection: all levels weigh the same",
    "shared_heads": "one Gaussian for all heads",
    "single_scale": "one width for both axes",
    "fixed_scale": "fixed width",
    "recipe": "make demo: beyond the paper",
    "plain": "the paper's queries, prior and loss, AdamW",
    "single": "stride 8",
    "multi": "strides 8, 16, 32",
    "bccd": "BCCD",
    "trees": "tree crowns",
}


Runs = dict[str, list[list[dict[str, Any]]]]
"""Kind of run → seeds → evaluations."""


def runs_of(experiment: str) -> Runs:
    """All runs of an experiment by the label of their kind: files EXPERIMENT-KIND-SEED.jsonl."""
    runs: Runs = defaultdict(list)
    for path in sorted(RESULTS.glob(f"{experiment}-*.jsonl")):
        kind = path.stem.removeprefix(f"{experiment}-").rsplit("-", 1)[0]
        runs[LABELS.get(kind, kind)].append(read_metrics(path))
    return dict(sorted(runs.items(), reverse=True))


def spread(values: list[float]) -> str:
    """Mean over the seeds, and the least and the largest where there are several."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}–{max(values):.3f})"


def ap_table(runs: Runs, columns: tuple[str, ...] = ("ap", "ap50")) -> str:
    """Markdown: one row per epoch, the columns of every kind of run."""
    lines = ["| epoch | " + " | ".join(f"{kind} {HEADS[c]}" for kind in runs for c in columns) + " |"]
    lines.append("|" + "---|" * (1 + len(columns) * len(runs)))
    for epoch in sorted({line["epoch"] for seeds in runs.values() for run in seeds for line in run}):
        cells = []
        for seeds in runs.values():
            found = [line for run in seeds for line in run if line["epoch"] == epoch]
            cells += [spread([line[c] for line in found]) if found else "" for c in columns]
        lines.append(f"| {epoch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def last_table(runs: Runs, columns: tuple[str, ...]) -> str:
    """Markdown: one row per kind of run, its columns after the last epoch."""
    lines = ["| | " + " | ".join(HEADS[c] for c in columns) + " | seeds |", "|" + "---|" * (2 + len(columns))]
    for kind, seeds in runs.items():
        cells = [spread([run[-1][c] for run in seeds]) for c in columns]
        lines.append(f"| {kind} | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(lines)


def draw_prior(path: Path) -> None:
    """The Gaussian of one query on a map of 32 × 24 cells: three scales, and one with an axis switched off."""
    figure, axes = pyplot.subplots(1, 4, figsize=(12, 2.6), constrained_layout=True)
    center = np.array([20.0, 9.0])
    cases = [
        ((0.5, 0.5), "s = (½, ½)"),
        ((1.0, 1.0), "s = (1, 1): the start"),
        ((2.5, 1.0), "s = (2½, 1)"),
        ((1e6, 1.0), "s = (∞, 1): r_x = 0"),
    ]
    for axis, (scale, title) in zip(axes, cases, strict=True):
        axis.imshow(gaussian_weight_map(center, np.array(scale), 8.0, (24, 32)), cmap="magma", vmin=0, vmax=1)
        axis.plot(*(center - 0.5), "+", color="white")
        axis.set_title(title, fontsize=10)
        axis.set_xticks([]), axis.set_yticks([])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_trained_priors(path: Path) -> None:
    """The Gaussians of docs/results/priors.jsonl on their held-out image of the built-in data."""
    lines = read_priors(RESULTS)
    data = SyntheticShapes(60, 1, image_size=128)
    shown = next(
        sample for sample in map(data.__getitem__, range(60)) if sample.image_id == lines[-1]["map"]["image_id"]
    )
    draw_priors(lines, shown.image, shown.boxes_xyxy, path)


def draw_by_minute(runs: Runs, path: Path, title: str) -> None:
    """AP by minutes of training, without the evaluations: one line per run."""
    figure, axis = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    for kind, seeds in runs.items():
        for run in seeds:
            minutes = [0.0, *(line["train_seconds"] / 60 for line in run)]
            axis.plot(minutes, [0.0, *(line["ap"] for line in run)], marker=".", label=f"{kind} ({run[-1]['ap']:.3f})")
    axis.set_xlabel("minutes of training"), axis.set_ylabel("AP"), axis.set_title(title)
    axis.set_ylim(bottom=0), axis.set_xlim(left=0), axis.grid(alpha=0.3), axis.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_starts(path: Path) -> None:
    """AP by minutes of training, and by training images, for each start that docs/starts.py has measured."""
    lines = starts.read(starts.RESULTS)
    panels: list[tuple[str, str, list[starts.Line]]] = []
    for data in sorted({line["data"] for line in lines}):
        of_data = [line for line in lines if line["data"] == data]
        most = max(line["images"] for line in of_data)
        panels.append(
            (
                f"{LABELS.get(data, data)}, {most} images",
                "minutes",
                [line for line in of_data if line["images"] == most],
            )
        )
        for minutes in sorted({line["minutes"] for line in of_data if line["images"] < most}):
            part = [line for line in of_data if line["minutes"] == minutes]
            panels.append((f"{LABELS.get(data, data)}, {minutes:g} minutes", "images", part))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), constrained_layout=True)
    for axis, (title, column, part) in zip(axes, panels, strict=True):
        for start in starts.STARTS:
            values = sorted({line[column] for line in part if line["start"] == start})
            means = [starts.mean(part, start, column, value, "ap") for value in values]
            if len(values) > 1:
                axis.plot(values, means, marker=".", label=start)
        ticks = sorted({line[column] for line in part})
        axis.set_xscale("log"), axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks]), axis.minorticks_off()
        axis.set_xlabel({"minutes": "minutes of training", "images": "training images"}[column]), axis.set_ylabel("AP")
        axis.set_title(title), axis.grid(alpha=0.3), axis.legend(loc="best"), axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Write every picture; print every table."""
    draw_prior(DOCS / "prior.png")
    draw_trained_priors(DOCS / "priors.png")
    demo = runs_of("demo")
    comparisons = {
        "demo": ("Built-in data, 4 epochs of 250 steps", demo),
        "long": (
            "Built-in data, DETR for ten times as long",
            {"SMCA, 4 epochs": demo["SMCA"], "DETR, 40 epochs": runs_of("long")[LABELS["dense"]]},
        ),
        "bccd": ("BCCD, preset small", runs_of("bccd")),
        "scales": ("Built-in data, many small objects", scales := runs_of("scales")),
        "cells": ("BCCD, 40 epochs", runs_of("cells")),
    }
    for name, (title, runs) in comparisons.items():
        if runs:
            compare_curves(runs, DOCS / f"convergence-{name}.png", title=title, log_epochs=name == "long")
            by_size = name in ("scales", "cells")
            print(f"\n{title}\n\n{ap_table(runs, ('ap', 'ap_small', 'ap_medium') if by_size else ('ap', 'ap50'))}")
    draw_by_minute(runs_of("minutes"), DOCS / "convergence-minutes.png", "Built-in data, 2 cores")
    draw_starts(DOCS / "starts.png")
    whole = "everything: independent widths, a Gaussian for each head, scale selection"
    ablation = {whole: scales[LABELS["small_objects_multiscale"]], **runs_of("ablation")}
    print(f"\nAblation\n\n{last_table(ablation, ('ap', 'ap50', 'ap_small', 'ap_medium'))}")


if __name__ == "__main__":
    main()
