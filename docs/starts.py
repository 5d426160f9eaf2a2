"""What a start is worth: AP after so many minutes of training, and with so many images, from random weights, from the built-in
shapes, and from ImageNet.

    python docs/starts.py shapes --shapes runs/shapes                       10 minutes on the built-in shapes, for each preset
    python docs/starts.py compare DIR --name bccd --minutes 2 5 10 30       AP by minutes for each start
    python docs/starts.py compare DIR --name bccd --minutes 5 --images 10 25 50 100 205
    python docs/starts.py tables                                            of what has been measured

A minute is as many steps as this machine takes in one, measured beforehand (--step-seconds takes another figure, so that the same
steps can be taken on a busy machine); evaluations are not in it. Each figure is a run of its own, whose schedule ends there. It
becomes a line of --results; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from smca.datasets import find_split
from smca.gpu.cli import run
from smca.gpu.config import RunConfig
from smca.gpu.presets import shapes, small, small_pretrained
from smca.gpu.train import train
from smca.gpu.training.log import read_metrics

RESULTS = Path(__file__).parent / "results" / "starts.jsonl"
PRESETS: dict[str, Callable[[], RunConfig]] = {"small": small, "small_pretrained": small_pretrained}
STARTS: dict[str, tuple[Callable[[], RunConfig], bool]] = {
    "random": (small, False),
    "shapes": (small, True),
    "imagenet": (small_pretrained, False),
    "imagenet, then shapes": (small_pretrained, True),
}
"""Name of a start → its preset, and whether it takes the model that the preset gives on the built-in shapes."""
Line = dict[str, Any]


def on_shapes(base: RunConfig) -> RunConfig:
    """`base` on the data of the preset ``shapes``."""
    return replace(base, data="synthetic", synthetic=shapes().synthetic, cache_images=False)


def steps_of(config: RunConfig, folder: Path, steps: int, seed: int = 0) -> RunConfig:
    """`config` for so many steps, evaluated after the last."""
    length = {"max_steps": steps, "epochs": steps, "eval_every": steps}
    return replace(config, output=folder, seed=seed, trackers=(), overwrite=True, **length)  # type: ignore[arg-type]


def step_seconds(config: RunConfig) -> float:
    """Seconds per step on this machine, after the first ten."""
    with tempfile.TemporaryDirectory() as folder:
        times = []
        for steps in (10, 50):
            train(steps_of(config, Path(folder), steps))
            times.append(read_metrics(Path(folder) / "metrics.jsonl")[-1]["train_seconds"])
    return float(times[1] - times[0]) / 40


def of_images(config: RunConfig, data: Path, count: int, folder: Path) -> RunConfig:
    """`config` with `count` of the training images of `data`; those of a smaller count are among those of a larger one."""
    images_dir, file = find_split(data, "train")
    content = json.loads(file.read_text(encoding="utf-8"))
    order = np.random.default_rng(0).permutation(len(content["images"]))[:count]
    images = [content["images"][index] for index in sorted(order)]
    kept = {image["id"] for image in images}
    annotations = [each for each in content["annotations"] if each["image_id"] in kept]
    chosen = folder / "train.json"
    chosen.write_text(json.dumps({**content, "images": images, "annotations": annotations}), encoding="utf-8")
    return replace(config, data=str(data), train_json=chosen, train_images=images_dir)


def images_in(data: Path) -> int:
    """Training images of a folder."""
    return len(json.loads(find_split(data, "train")[1].read_text(encoding="utf-8"))["images"])


def compare(chosen: argparse.Namespace) -> None:
    """Train from every start for every number of minutes and images, and note what comes out."""
    counts = chosen.images or [images_in(chosen.data)]
    pace = dict(part.split("=") for part in chosen.step_seconds)
    for start in chosen.starts:
        preset, from_shapes = STARTS[start]
        config = replace(preset(), data=str(chosen.data))
        if from_shapes:
            config = replace(config, init=str(chosen.shapes / preset.__name__ / "model"))
        seconds = float(pace[preset.__name__]) if preset.__name__ in pace else step_seconds(config)
        pace[preset.__name__] = seconds
        print(f"{start}: {seconds:.3f} s per step", flush=True)
        for minutes in chosen.minutes:
            for count in counts:
                key = {"data": chosen.name, "start": start, "minutes": minutes, "images": count, "seed": chosen.seed}
                if any(key.items() <= line.items() for line in read(chosen.results)):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    part = of_images(config, chosen.data, count, Path(folder))
                    steps = max(1, round(60 * minutes / seconds))
                    train(steps_of(part, Path(folder) / "run", steps, chosen.seed))
                    last = read_metrics(Path(folder) / "run" / "metrics.jsonl")[-1]
                kept = {name: round(last[name], 4) for name in ("ap", "ap50", "ap_small")}
                kept["per_class"] = {
                    name: {metric: round(value, 4) for metric, value in ap.items()}
                    for name, ap in last["per_class"].items()
                }
                line = {**key, "steps": steps, "step_seconds": round(seconds, 4), **kept}
                with chosen.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


def read(results: Path) -> list[Line]:
    """What has been measured."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def mean(lines: Sequence[Line], start: str, column: str, value: float, metric: str) -> float:
    """Of a metric over the seeds of a start at `value` of `column`; NaN if there is none."""
    found = [line[metric] for line in lines if line["start"] == start and line[column] == value]
    return math.fsum(found) / len(found) if found else math.nan


def table(lines: Sequence[Line], column: str, title: str) -> str:
    """Markdown: one row per start, AP (AP50) by the values of `column`."""
    values = sorted({line[column] for line in lines})
    rows = [f"| {title} | " + " | ".join(f"{value:g}" for value in values) + " |", "|---" * (1 + len(values)) + "|"]
    for start in STARTS:
        cells = []
        for value in values:
            ap, ap50 = (mean(lines, start, column, value, metric) for metric in ("ap", "ap50"))
            cells.append("" if math.isnan(ap) else f"{ap:.3f} ({ap50:.3f})")
        if any(cells):
            rows.append(f"| {start} | {' | '.join(cells)} |")
    return "\n".join(rows)


def tables(chosen: argparse.Namespace) -> None:
    """Print AP (AP50) by minutes with all images, and by images at each number of minutes that several were measured at."""
    lines = read(chosen.results)
    for name in sorted({line["data"] for line in lines}):
        of_data = [line for line in lines if line["data"] == name]
        most = max(line["images"] for line in of_data)
        print(f"\n{name}\n\n{table([line for line in of_data if line['images'] == most], 'minutes', 'minutes')}")
        for minutes in sorted({line["minutes"] for line in of_data if line["images"] < most}):
            print(
                f"\n{table([line for line in of_data if line['minutes'] == minutes], 'images', f'{minutes:g} minutes; images')}"
            )


def pretrain(chosen: argparse.Namespace) -> None:
    """Train each preset on the built-in shapes."""
    for preset in chosen.presets:
        config = on_shapes(PRESETS[preset]())
        given = dict(part.split("=") for part in chosen.step_seconds)
        seconds = float(given[preset]) if preset in given else step_seconds(config)
        train(steps_of(config, chosen.shapes / preset, round(60 * chosen.minutes / seconds), chosen.seed))


def main(argv: list[str]) -> None:
    """Measure, or show what has been measured."""
    parser = argparse.ArgumentParser(description="What a start is worth.", prog="python docs/starts.py")
    commands = parser.add_subparsers(dest="command", required=True)
    of_shapes = commands.add_parser("shapes", help="train on the built-in shapes, which others then start from")
    of_shapes.add_argument("--minutes", type=float, default=10.0, help="of training, for each preset (default: 10)")
    of_shapes.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS, help="default: both")
    comparison = commands.add_parser("compare", help="train on a folder from every start")
    comparison.add_argument("data", type=Path, help="folder in COCO format")
    comparison.add_argument("--name", required=True, help="of the data, in the results")
    comparison.add_argument("--minutes", type=float, nargs="+", default=[2, 5, 10, 30], help="default: 2 5 10 30")
    comparison.add_argument("--images", type=int, nargs="+", help="numbers of training images (default: all)")
    comparison.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS, help="default: all")
    shown = commands.add_parser("tables", help="print what has been measured")
    for command in (of_shapes, comparison, shown):
        command.add_argument("--shapes", type=Path, default=Path("runs/shapes"), help="folder of the runs on shapes")
        command.add_argument("--results", type=Path, default=RESULTS, help="default: docs/results/starts.jsonl")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument(
            "--step-seconds", nargs="*", default=[], metavar="PRESET=SECONDS", help="instead of measuring"
        )
    chosen = parser.parse_args(argv)
    {"shapes": pretrain, "compare": compare, "tables": tables}[chosen.command](chosen)


if __name__ == "__main__":
    run(main, sys.argv[1:] or ["--help"])
