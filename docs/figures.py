"""Rebuild the pictures and tables of docs/ from the metrics kept in docs/results/ (`make figures`).

docs/results/NAME-SEED.jsonl is the metrics.jsonl of one run; docs/convergence.md has the command of each.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from smca.gpu.drawing import compare_curves
from smca.gpu.run_log import read_metrics
from smca.reference.attention import gaussian_weight_map

matplotlib.use("Agg")
from matplotlib import pyplot

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
LABELS = {"smca": "SMCA", "dense": "DETR (dense)"}


def runs_of(experiment: str) -> dict[str, list[list[dict[str, Any]]]]:
    """All runs of an experiment by the label of their kind: files EXPERIMENT-KIND-SEED.jsonl."""
    runs: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for path in sorted(RESULTS.glob(f"{experiment}-*.jsonl")):
        kind = path.stem.removeprefix(f"{experiment}-").rsplit("-", 1)[0]
        runs[LABELS.get(kind, kind)].append(read_metrics(path))
    return dict(sorted(runs.items(), reverse=True))


def ap_table(runs: dict[str, list[list[dict[str, Any]]]]) -> str:
    """AP and AP50 by epoch: mean over seeds, and least to largest."""
    lines = ["| epoch | " + " | ".join(f"{label} AP | {label} AP50" for label in runs) + " |"]
    lines.append("|" + "---|" * (1 + 2 * len(runs)))
    epochs = sorted({m["epoch"] for seeds in runs.values() for run in seeds for m in run})
    for epoch in epochs:
        cells = []
        for seeds in runs.values():
            for metric in ("ap", "ap50"):
                values = [m[metric] for run in seeds for m in run if m["epoch"] == epoch]
                spread = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {epoch} | " + " | ".join(cells) + " |")
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


def main() -> None:
    """Write every picture; print every table."""
    draw_prior(DOCS / "prior.png")
    demo = runs_of("demo")
    comparisons = {
        "demo": ("Built-in data, 4 epochs of 250 steps", demo),
        "long": (
            "Built-in data, DETR for ten times as long",
            {"SMCA, 4 epochs": demo["SMCA"], "DETR, 40 epochs": runs_of("long")[LABELS["dense"]]},
        ),
        "bccd": ("BCCD, preset small", runs_of("bccd")),
        "scales": ("Built-in data, many small objects", runs_of("scales")),
    }
    for name, (title, runs) in comparisons.items():
        if runs:
            compare_curves(runs, DOCS / f"convergence-{name}.png", title=title, log_epochs=name == "long")
            print(f"\n{title}\n\n{ap_table(runs)}")


if __name__ == "__main__":
    main()
